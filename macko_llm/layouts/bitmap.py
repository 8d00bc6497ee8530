"""The layout in which a CPU multiplies: a bit a column, and the values of the columns whose bits are set (csrc/cpu/bitmap.h).

Vector instructions expand values to the columns that 32 bits name. Of the canonical arrays it lacks the zeros that bridge
long gaps, which the format's rule determines; so packing what it unpacks to gives the same canonical bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import native
from macko_llm.dtypes import CODES
from macko_llm.format import MackoMatrix
from macko_llm.layouts.canonical import pack_finite
from macko_llm.layouts.layout import Layout, modes_counter, wants_gradient
from macko_llm.native import BitmapStruct

BITMAP_SPMV_MAX_TOKENS = {torch.bfloat16: 6, torch.float16: 32, torch.float32: 16}
"""Up to this many tokens of a dtype SpMV is faster than a dense product of unpacked rows (measured, docs/design.md)."""

_DENSE_ELEMENTS = 2**22
"""Of the rows that are dense at a time while many tokens are multiplied: they stay in a CPU's last cache."""

_COLUMNS = 32  # that a word of bits is for
_PADDING = 32  # values behind the last, which vectors may read
_ALIGNMENT = 64  # bytes, of each array


@dataclass(frozen=True)
class BitmapMatrix(Layout):
    """A matrix on the CPU.

    Attributes:
        data: uint8: the values and their padding, the bits, where each row's values begin; each at a multiple of 64 bytes.
        rows, cols: of the dense matrix.
        dtype: see Layout.
        count: of the values, none of which is zero.
        smallest: the bits of their smallest magnitude.
    """

    data: Tensor
    rows: int
    cols: int
    dtype: torch.dtype
    count: int
    smallest: int

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

    @property
    def numbers(self) -> list[int]:
        """All but the data and its dtype in whole numbers, which the schema of a torch op can carry."""
        return [self.rows, self.cols, self.count, self.smallest]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "BitmapMatrix":
        """The matrix that has these `numbers`."""
        rows, cols, count, smallest = numbers
        return cls(data, rows, cols, dtype, count, smallest)

    @cached_property
    def struct(self) -> BitmapStruct:
        """What the library is given; lives as long as the matrix."""
        return _struct(self.data, self.shape, self.dtype, self.count, self.smallest)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct, whose addresses are this matrix's."""
        names = ("data", "rows", "cols", "dtype", "count", "smallest")
        return {name: getattr(self, name) for name in names}

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See Layout."""
        if self._is_plain(x, bias):
            return native.cpu_bitmap_spmv(self.struct, x, bias)
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
        return pack_finite(_unpack_cpu(self.data, self.dtype, self.numbers))

    def dense(self) -> Tensor:
        """See Layout."""
        weight: Tensor = torch.ops.macko.bitmap_unpack(self.data, self.dtype, self.numbers)
        return weight

    def few_tokens(self, dtype: torch.dtype) -> int:
        """See Layout."""
        return BITMAP_SPMV_MAX_TOKENS[dtype] if dtype in (self.dtype, torch.float32) else 0

    def row_parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The dense matrix a few rows at a time, in the same memory: which, and [those, cols] of `dtype`."""
        step = min(max(1, _DENSE_ELEMENTS // self.cols), self.rows)
        memory = torch.empty(step, self.cols, dtype=self.dtype)
        for first in range(0, self.rows, step):
            part = memory[: self.rows - first]
            struct = _struct(self.data, self.shape, self.dtype, self.count, self.smallest)
            struct.masks += first * _words(self.cols) * 4
            struct.row_starts += first * 4
            struct.rows = len(part)
            native.cpu_bitmap_unpack(struct, part)
            yield slice(first, first + len(part)), part

    def _dense_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, self.cols)
        y: Tensor = torch.ops.macko.bitmap_dense_product(flat, self.data, bias, self.dtype, self.numbers)
        return y.view(*x.shape[:-1], self.rows)

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.bitmap_spmv(x, self.data, bias, self.dtype, self.numbers)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.bitmap_linear(x, self.data, bias, self.dtype, self.numbers)
        return y


def arrange(matrix: MackoMatrix) -> BitmapMatrix:
    """The bitmap of a valid matrix on the CPU."""
    starts = native.cpu_bitmap_starts(matrix)
    count = int(starts[-1])
    at = _offsets(matrix.shape, count)
    data = torch.zeros(at[-1], dtype=torch.uint8)  # so that what lies between the arrays is the same each time
    data[at[2] : at[2] + starts.nbytes] = starts.view(torch.uint8)
    struct = _struct(data, matrix.shape, matrix.values.dtype, count, 0)
    native.cpu_bitmap_fill(matrix, struct)
    return BitmapMatrix(data, *matrix.shape, matrix.values.dtype, count, struct.smallest)


def _offsets(shape: tuple[int, int], count: int) -> list[int]:
    """Bytes at which values, bits and row starts begin, and at which all ends."""
    rows, cols = shape
    offsets = [0]
    for nbytes in ((count + _PADDING) * 2, rows * _words(cols) * 4, (rows + 1) * 4):
        offsets.append(offsets[-1] + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _words(cols: int) -> int:
    return -(-cols // _COLUMNS)


def _struct(data: Tensor, shape: tuple[int, int], dtype: torch.dtype, count: int, smallest: int) -> BitmapStruct:
    arrays = (data.data_ptr() + offset for offset in _offsets(shape, count)[:-1])
    return BitmapStruct(*arrays, *shape, CODES[dtype], smallest)


_python_modes = modes_counter()

_library = torch.library.Library("macko", "FRAGMENT")
# `numbers` are BitmapMatrix.numbers.
_library.define("bitmap_unpack(Tensor data, ScalarType dtype, int[] numbers) -> Tensor")
_library.define("bitmap_spmv(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")
_library.define("bitmap_dense_product(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")
# The dense product whose gradient unpacks again.
_library.define("bitmap_linear(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")


@torch.library.impl(_library, "bitmap_unpack", "CPU")
def _unpack_cpu(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = BitmapMatrix.from_numbers(data, dtype, numbers)
    weight = torch.empty(matrix.shape, dtype=dtype)
    native.cpu_bitmap_unpack(matrix.struct, weight)
    return weight


@torch.library.impl(_library, "bitmap_spmv", "CPU")
def _spmv_cpu(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = BitmapMatrix.from_numbers(data, dtype, numbers)
    return native.cpu_bitmap_spmv(matrix.struct, x.contiguous(), None if bias is None else bias.contiguous())


@torch.library.impl(_library, "bitmap_dense_product", "CPU")
def _dense_product_cpu(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = BitmapMatrix.from_numbers(data, dtype, numbers)
    y = x.new_empty(x.shape[0], matrix.rows)
    for rows, part in matrix.row_parts():
        y[:, rows] = F.linear(x, part.to(x.dtype), None if bias is None else bias[rows])
    return y


@torch.library.impl(_library, "bitmap_linear", "CompositeExplicitAutograd")
def _linear_any(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return F.linear(x, torch.ops.macko.bitmap_unpack(data, dtype, numbers).to(x.dtype), bias)


@torch.library.register_fake("macko::bitmap_unpack")
def _unpack_fake(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return data.new_empty(numbers[:2], dtype=dtype)


@torch.library.register_fake("macko::bitmap_spmv")
def _spmv_fake(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    del data, bias, dtype
    return x.new_empty(*x.shape[:-1], numbers[0])


torch.library.register_fake("macko::bitmap_dense_product")(_spmv_fake)
torch.library.register_fake("macko::bitmap_linear")(_spmv_fake)


def _keep_packed(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, torch.dtype, list[int]], output: Tensor
) -> None:
    del output
    _, data, _, ctx.dtype, ctx.numbers = inputs
    ctx.save_for_backward(data)


def _linear_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    wants_x, _, wants_bias, *_ = ctx.needs_input_grad
    (data,) = ctx.saved_tensors
    x = None
    if wants_x:
        x = upstream @ torch.ops.macko.bitmap_unpack(data, ctx.dtype, ctx.numbers).to(upstream.dtype)
    return x, None, upstream.reshape(-1, upstream.shape[-1]).sum(0) if wants_bias else None, None, None


torch.library.register_autograd("macko::bitmap_linear", _linear_backward, setup_context=_keep_packed, lib=_library)
