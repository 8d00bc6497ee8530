"""What all layouts of a packed matrix have in common: the rules of their product with an input."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix


class Layout(ABC):
    """A packed matrix, in the order in which some device multiplies it. Its arrays are valid, since no kernel checks them.

    Attributes:
        shape: (rows, cols) of the dense matrix.
        dtype: of its values, float16 or bfloat16.
        buffer: what a layer that is multiplied in this layout keeps; None where it is the layer's canonical arrays.
        summary: what a layer prints of it.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    buffer: Tensor | None
    summary: str

    @abstractmethod
    def canonical(self) -> MackoMatrix:
        """The canonical arrays, bit for bit those that the layout was made of if they came from `canonical.pack`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The dense matrix, [rows, cols] of `dtype`."""

    @abstractmethod
    def few_tokens(self, dtype: torch.dtype) -> int:
        """Up to how many tokens of a dtype `_spmv` takes and is faster than a dense product."""

    @abstractmethod
    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[tokens, cols], at least one token, -> [tokens, rows] of the same dtype, without a gradient."""

    @abstractmethod
    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The dense product, which keeps the packed arrays for its gradient, and not the dense matrix."""

    def _dense_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of many tokens [..., cols], with a bias of x's dtype, without a gradient."""
        return F.linear(x, self.dense().to(x.dtype), bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Y = x Wᵀ + bias, in x's dtype.

        A few tokens are multiplied with the exact weights and accumulated in float32. Many, and float64, are multiplied as
        `nn.Linear` would with weights of x's dtype. Under autocast x is cast as `nn.Linear` casts it. Where x has a NaN or
        an infinity, so has every element of that token's y, whatever the layout and the number of tokens.

        Args:
            x: [..., cols], floating, on the matrix's device.
            bias: [rows], of any floating dtype, or None.

        Returns:
            [..., rows] of x's dtype, or of autocast's.

        Raises:
            FormatError: x has another width, or is not floating.
        """
        x = _autocast(x)
        rows, cols = self.shape
        if x.shape[-1] != cols:
            raise FormatError(
                f"The input has {x.shape[-1]} features and the matrix {cols} columns; give it [..., {cols}]."
            )
        if x.dtype not in _FLOATS:
            raise FormatError(f"The input is {x.dtype}; convert it to float16, bfloat16, float32 or float64.")
        tokens = x.numel() // cols
        if not wants_gradient(x, bias):
            exact = x.dtype if x.dtype == self.dtype else torch.float32
            if x.dtype != torch.float64 and tokens <= self.few_tokens(exact):
                y = self._spmv(x.reshape(tokens, cols).to(exact), _cast(bias, exact))
                return y.view(*x.shape[:-1], rows).to(x.dtype)
            return self._dense_product(x, _cast(bias, x.dtype))
        return self._differentiable(x, _cast(bias, x.dtype))


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd follows a product of these."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def modes_counter() -> Callable[[], int]:
    """How many modes, transforms (vmap, jvp) and tracers want to see an op. A name of torch that is gone says "some"."""
    try:
        dispatch, function = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
        transforms, tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
    except AttributeError:
        return lambda: 1
    return lambda: dispatch() + function() + (transforms() is not None) + (tracer() is not None)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
