"""The layout in which a CPU multiplies: a bit a column, and the values of the columns whose bits are set (csrc/cpu/bitmap.h).

Vector instructions expand values to the columns that 32 bits name. Of the canonical arrays it lacks the zeros that bridge
long gaps, which the format's rule determines; so packing what it unpacks to gives the same canonical bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from macko_llm import native
from macko_llm.dtypes import CODES
from macko_llm.format import MackoMatrix
from macko_llm.layouts.cpu_layout import ALIGNMENT, CpuLayout, define_ops, offsets_of
from macko_llm.native import BitmapStruct

_COLUMNS = 32  # that a word of bits is for
_PADDING = 32  # values behind the last, which vectors may read


@dataclass(frozen=True)
class BitmapMatrix(CpuLayout):
    """A matrix on the CPU.

    Attributes:
        data: uint8: the values and their padding, the bits, where each row's values begin; each at a multiple of 64 bytes.
        rows, cols: of the dense matrix.
        dtype: see Layout.
        count: see CpuLayout.
        smallest: the bits of the values' smallest magnitude.
    """

    name = "bitmap"
    max_tokens: ClassVar[dict[torch.dtype, int]] = {torch.bfloat16: 6, torch.float16: 32, torch.float32: 16}

    data: Tensor
    rows: int
    cols: int
    dtype: torch.dtype
    count: int
    smallest: int

    @property
    def numbers(self) -> list[int]:
        """See CpuLayout."""
        return [self.rows, self.cols, self.count, self.smallest]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "BitmapMatrix":
        """See CpuLayout."""
        rows, cols, count, smallest = numbers
        return cls(data, rows, cols, dtype, count, smallest)

    @cached_property
    def struct(self) -> BitmapStruct:
        """What the library is given; lives as long as the matrix."""
        return _struct(self.data, self.shape, self.dtype, self.count, self.smallest)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See CpuLayout."""
        return native.cpu_bitmap_spmv(self.struct, x, bias)

    def unpack_rows(self, first_row: int, weight: Tensor) -> None:
        """See CpuLayout."""
        struct = _struct(self.data, self.shape, self.dtype, self.count, self.smallest)
        struct.masks += first_row * _words(self.cols) * 4
        struct.row_starts += first_row * 4
        struct.rows = len(weight)
        native.cpu_bitmap_unpack(struct, weight)


def arrange(matrix: MackoMatrix) -> BitmapMatrix:
    """The bitmap of a valid matrix on the CPU."""
    starts = native.cpu_bitmap_starts(matrix)
    count = int(starts[-1])
    at = _offsets(matrix.shape, count)
    data = torch.empty(at[-1], dtype=torch.uint8)
    for end in at[1:]:
        data[end - ALIGNMENT : end] = 0  # so that what lies between the arrays is the same each time
    data[at[2] : at[2] + starts.nbytes] = starts.view(torch.uint8)
    struct = _struct(data, matrix.shape, matrix.values.dtype, count, 0)
    native.cpu_bitmap_fill(matrix, struct)
    return BitmapMatrix(data, *matrix.shape, matrix.values.dtype, count, struct.smallest)


def _offsets(shape: tuple[int, int], count: int) -> list[int]:
    """Bytes at which values, bits and row starts begin, and at which all ends."""
    rows, cols = shape
    sizes = (count + _PADDING) * 2, rows * _words(cols) * 4, (rows + 1) * 4
    return offsets_of(sizes)


def _words(cols: int) -> int:
    return -(-cols // _COLUMNS)


def _struct(data: Tensor, shape: tuple[int, int], dtype: torch.dtype, count: int, smallest: int) -> BitmapStruct:
    arrays = (data.data_ptr() + offset for offset in _offsets(shape, count)[:-1])
    return BitmapStruct(*arrays, *shape, CODES[dtype], smallest)


define_ops(BitmapMatrix)
