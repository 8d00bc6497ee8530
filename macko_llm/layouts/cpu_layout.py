"""What the layouts of CPUs have in common: the short way to the library, dense rows for many tokens, and torch ops."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm.format import MackoMatrix
from macko_llm.layouts.canonical import pack_finite
from macko_llm.layouts.layout import Layout, modes_counter, wants_gradient

DENSE_ELEMENTS = 2**22
"""Of the rows that are dense at a time while many tokens are multiplied: they stay in a CPU's last cache."""

ALIGNMENT = 64
"""Bytes, of each array of a layout."""


class CpuLayout(Layout):
    """A layout whose arrays lie in one buffer on a CPU. Its torch ops, see `define_ops`, begin with its `name`.

    Attributes:
        data: the buffer, uint8.
        rows, cols: of the dense matrix.
        count: of the values, none of which is zero.
    """

    name: ClassVar[str]
    max_tokens: ClassVar[dict[torch.dtype, int]]
    """Up to this many tokens of a dtype SpMV is faster than a dense product of unpacked rows (measured, docs/design.md)."""
    row_step: ClassVar[int] = 1
    """Dense rows can begin at multiples of it."""
    data: Tensor
    rows: int
    cols: int
    count: int

    @property
    @abstractmethod
    def numbers(self) -> list[int]:
        """Rows, columns, and all but the data and its dtype in whole numbers, which the schema of a torch op can carry."""

    @classmethod
    @abstractmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "CpuLayout":
        """The matrix that has these `numbers`."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The library's product of a few tokens, x [..., cols] and bias contiguous -> [..., rows]."""

    @abstractmethod
    def unpack_rows(self, first_row: int, weight: Tensor) -> None:
        """Fill [some rows, cols] of `dtype` with the dense rows from one on that is a multiple of `row_step`."""

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """See Layout."""
        return self.rows, self.cols

    @property
    def buffer(self) -> Tensor:  # type: ignore[override]
        """See Layout."""
        return self.data

    @property
    def summary(self) -> str:  # type: ignore[override]
        """See Layout."""
        return f"nonzeros={self.count}"

    def few_tokens(self, dtype: torch.dtype) -> int:
        """See Layout."""
        return self.max_tokens[dtype] if dtype in (self.dtype, torch.float32) else 0

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct that the library is given, whose addresses are this matrix's."""
        return {name: value for name, value in self.__dict__.items() if name != "struct"}

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See Layout."""
        if self._is_plain(x, bias):
            return self.multiply(x, bias)
        return super().linear(x, bias)

    def _is_plain(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the library can be called at once, past the dispatch of an op, which takes longer than a small product."""
        return (
            type(x) is Tensor
            and type(self.data) is Tensor
            and not torch.compiler.is_compiling()
            and x.is_cpu
            and x.shape[-1] == self.cols
            and 0 < x.numel() <= self.few_tokens(x.dtype) * self.cols
            and x.is_contiguous()
            and (bias is None or (bias.is_cpu and bias.dtype is x.dtype and bias.is_contiguous()))
            and not wants_gradient(x, bias)
            and not torch.is_autocast_enabled("cpu")
            and not torch.autograd._profiler_enabled()  # it times ops
            and not _python_modes()
        )

    def canonical(self) -> MackoMatrix:
        """See Layout."""
        return pack_finite(self._unpacked())

    def dense(self) -> Tensor:
        """See Layout."""
        weight: Tensor = self._op("unpack")(self.data, self.dtype, self.numbers)
        return weight

    def row_parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The dense matrix a few rows at a time, in the same memory: which, and [those, cols] of `dtype`."""
        steps = max(1, DENSE_ELEMENTS // (self.cols * self.row_step))
        step = min(steps * self.row_step, max(self.rows, 1))
        memory = torch.empty(step, self.cols, dtype=self.dtype)
        for first in range(0, self.rows, step):
            part = memory[: self.rows - first]
            self.unpack_rows(first, part)
            yield slice(first, first + len(part)), part

    def _unpacked(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.dtype)
        self.unpack_rows(0, weight)
        return weight

    def _op(self, name: str) -> Any:
        return getattr(torch.ops.macko, f"{self.name}_{name}")

    def _dense_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, self.cols)
        y: Tensor = self._op("dense_product")(flat, self.data, bias, self.dtype, self.numbers)
        return y.view(*x.shape[:-1], self.rows)

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._op("spmv")(x, self.data, bias, self.dtype, self.numbers)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._op("linear")(x, self.data, bias, self.dtype, self.numbers)
        return y


def offsets_of(sizes: Iterable[int]) -> list[int]:
    """Bytes at which arrays of these sizes begin in a buffer, each at a multiple of `ALIGNMENT`, and at which it ends."""
    offsets = [0]
    for nbytes in sizes:
        offsets.append(offsets[-1] + -(-nbytes // ALIGNMENT) * ALIGNMENT)
    return offsets


_python_modes = modes_counter()
_library = torch.library.Library("macko", "FRAGMENT")


def define_ops(layout: type[CpuLayout]) -> None:
    """The torch ops of a layout, `numbers` being its numbers: NAME_unpack, NAME_spmv, NAME_dense_product and NAME_linear.

    The last is the dense product whose gradient unpacks again.
    """
    name = layout.name
    _library.define(f"{name}_unpack(Tensor data, ScalarType dtype, int[] numbers) -> Tensor")
    for product in ("spmv", "dense_product", "linear"):
        arguments = "Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers"
        _library.define(f"{name}_{product}({arguments}) -> Tensor")

    def unpack(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
        return layout.from_numbers(data, dtype, numbers)._unpacked()

    def spmv(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
        matrix = layout.from_numbers(data, dtype, numbers)
        return matrix.multiply(x.contiguous(), None if bias is None else bias.contiguous())

    def dense_product(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
        y = x.new_empty(x.shape[0], numbers[0])
        for rows, part in layout.from_numbers(data, dtype, numbers).row_parts():
            y[:, rows] = F.linear(x, part.to(x.dtype), None if bias is None else bias[rows])
        return y

    def unpacked(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
        weight: Tensor = getattr(torch.ops.macko, f"{name}_unpack")(data, dtype, numbers)
        return weight

    def linear(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
        return F.linear(x, unpacked(data, dtype, numbers).to(x.dtype), bias)

    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        (data,) = ctx.saved_tensors
        x = upstream @ unpacked(data, ctx.dtype, ctx.numbers).to(upstream.dtype) if wants_x else None
        return x, None, upstream.sum_to_size(upstream.shape[-1]) if wants_bias else None, None, None

    _library.impl(f"{name}_unpack", unpack, "CPU")
    _library.impl(f"{name}_spmv", spmv, "CPU")
    _library.impl(f"{name}_dense_product", dense_product, "CPU")
    _library.impl(f"{name}_linear", linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"macko::{name}_unpack", _unpack_fake)
    for product in ("spmv", "dense_product", "linear"):
        torch.library.register_fake(f"macko::{name}_{product}", _product_fake)
    torch.library.register_autograd(f"macko::{name}_linear", backward, setup_context=_keep_packed, lib=_library)


def _unpack_fake(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return data.new_empty(numbers[:2], dtype=dtype)


def _product_fake(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    del data, bias, dtype
    return x.new_empty(*x.shape[:-1], numbers[0])


def _keep_packed(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, torch.dtype, list[int]], output: Tensor
) -> None:
    del output
    _, data, _, ctx.dtype, ctx.numbers = inputs
    ctx.save_for_backward(data)
