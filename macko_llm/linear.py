"""A linear layer whose weight is a packed matrix."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from macko_llm import ops
from macko_llm.errors import FormatError
from macko_llm.format import ENTRY_ALIGNMENT, MackoMatrix
from macko_llm.packed_checkpoint import ARRAY_NAMES
from macko_llm.sliced import SlicedMatrix


class MackoLinear(nn.Module):
    """y = x Wᵀ + b like `nn.Linear`, with W in the MACKO format.

    The layer holds the canonical arrays as parameters or, once arranged for a GPU, the sliced layout as a buffer and no
    canonical arrays; the layers of a group (`arrange_group`) share that buffer. `state_dict()` gives canonical arrays
    either way, and moving the layer to another device restores them.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        padded: length of the values array, a multiple of 8.
        bias: whether the layer has one.
        dtype: of the values and the bias, float16 or bfloat16.
        device: "meta" makes a placeholder that a checkpoint fills.
    """

    weight_values: Tensor
    weight_deltas: Tensor
    weight_row_offsets: Tensor
    weight_sliced: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        padded: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if padded % ENTRY_ALIGNMENT:
            raise ValueError(f"padded is {padded}, not a multiple of {ENTRY_ALIGNMENT}")
        self.in_features = in_features
        self.out_features = out_features
        # Parameters rather than buffers, so that accelerate moves and offloads them like any weight.
        self.weight_values = _constant(torch.zeros(padded, dtype=dtype, device=device))
        self.weight_deltas = _constant(torch.zeros(padded // 2, dtype=torch.uint8, device=device))
        self.weight_row_offsets = _constant(torch.zeros(out_features + 1, dtype=torch.int32, device=device))
        self.bias = _constant(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("weight_sliced", None, persistent=False)
        self._sliced: SlicedMatrix | None = None

    @classmethod
    def from_matrix(cls, matrix: MackoMatrix, bias: Tensor | None = None) -> "MackoLinear":
        """A layer around a valid matrix, and a bias [rows] of the same dtype or float32."""
        rows, cols = matrix.shape
        layer = cls(cols, rows, len(matrix.values), bias=bias is not None, dtype=matrix.values.dtype, device="meta")
        layer._set_canonical(matrix)
        if bias is not None:
            layer.bias = _constant(bias)
        return layer

    @property
    def matrix(self) -> MackoMatrix:
        """The packed weight in canonical order; shares memory with the layer unless it is arranged."""
        if self._sliced is not None:
            return ops.restore(self._sliced)
        shape = (self.out_features, self.in_features)
        return MackoMatrix(self.weight_values, self.weight_deltas, self.weight_row_offsets, shape)

    @property
    def is_arranged(self) -> bool:
        """Whether the layer holds the sliced layout."""
        return self._sliced is not None

    def arrange(self) -> None:
        """Change valid canonical arrays on a GPU to its fastest layout; elsewhere, and if it does not suit, do nothing."""
        arranged = None if self.is_arranged else ops.arrange(self.matrix)
        if arranged is not None:
            self._set_sliced(arranged)

    def restore(self) -> None:
        """Go back to the canonical arrays."""
        if self.is_arranged:
            matrix = self.matrix
            self.weight_sliced = self._sliced = None
            self._set_canonical(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype: the values' dtype or float32."""
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.linear(x, self._sliced or self.matrix, bias)

    def _set_canonical(self, matrix: MackoMatrix) -> None:
        self.weight_values = _constant(matrix.values)
        self.weight_deltas = _constant(matrix.deltas)
        self.weight_row_offsets = _constant(matrix.row_offsets)

    def _set_sliced(self, matrix: SlicedMatrix) -> None:
        for name in ARRAY_NAMES:
            self._parameters[name] = None
        self.weight_sliced, self._sliced = matrix.data, matrix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MackoLinear":
        self.restore()
        was_real = not self.weight_values.is_meta
        super()._apply(fn, recurse)
        if was_real:
            self._arrange_if_valid()
        return self

    def _arrange_if_valid(self) -> None:
        # Moving and loading bring anything at all: to_empty() garbage, load_state_dict() what it was given.
        if self.weight_values.is_cuda:
            with contextlib.suppress(FormatError):
                ops.validate(self.matrix, "the layer")
                self.arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_arranged:
            matrix = self.matrix
            for name, array in zip(ARRAY_NAMES, (matrix.values, matrix.deltas, matrix.row_offsets), strict=True):
                destination[prefix + name] = array

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        arranged = self.is_arranged
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if arranged:
            self._arrange_if_valid()

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        plan = self._sliced.plan if self._sliced else None
        holds = f"delta_bits={plan.delta_bits}" if plan else f"entries={self.weight_values.numel()}"
        dtype = plan.dtype if plan else self.weight_values.dtype
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {holds}, "
            f"dtype={dtype}, bias={self.bias is not None}"
        )


def arrange_group(layers: Sequence[MackoLinear]) -> None:
    """Change layers that read the same input to one layout between them, so that one kernel can multiply them all.

    Each layer still works by itself, as a view. Where no layout suits them together, each is arranged alone.

    Args:
        layers: with valid weights, at least one.
    """
    if group_of(layers) is not None:
        return
    members = ops.arrange_group([layer.matrix for layer in layers])
    if members is None:
        for layer in layers:
            layer.arrange()
        return
    for layer, member in zip(layers, members, strict=True):
        layer._set_sliced(member)


def group_of(layers: Sequence[MackoLinear]) -> SlicedMatrix | None:
    """The weights of these layers one below the other as one matrix, None unless they are all of one group, in its order."""
    first = layers[0]._sliced
    if first is None or len(layers) != len(first.plan.member_rows):
        return None
    for index, layer in enumerate(layers):
        own = layer._sliced
        if own is None or own.data is not first.data or own.member != index:
            return None
    return SlicedMatrix(first.data, first.plan)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
