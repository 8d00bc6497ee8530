"""The layout in which a CPU with AVX-512 multiplies at high sparsity: tiles of rows, in strips of columns (csrc/cpu/strips.h).

Like the bitmap, of which it is made, it lacks the zeros that bridge long gaps, which the format's rule determines; so packing
what it unpacks to gives the same canonical bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from macko_llm import native
from macko_llm.dtypes import CODES
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.layouts.cpu_layout import ALIGNMENT, CpuLayout, define_ops, offsets_of
from macko_llm.native import StripsStruct

MAX_OVERHEAD = 1.05
"""Of the bitmap's bytes. So little more is needed from about 90 % sparsity on; docs/design.md has the speeds there."""

_CHUNK, _STRIP, _TILE = 256, 128, 16  # rows, columns, rows
_GROUP_BYTES, _ENTRY_BYTES = 96, 3


@dataclass(frozen=True)
class StripsMatrix(CpuLayout):
    """A matrix on the CPU.

    Attributes:
        data: uint8: the groups, how many each tile has, which rows are in it, where each chunk begins; each at a multiple
            of 64 bytes.
        rows, cols: of the dense matrix.
        dtype: see Layout.
        groups: in all.
        count: see CpuLayout.
        smallest: the bits of the values' smallest magnitude.
    """

    name = "strips"
    max_tokens: ClassVar[dict[torch.dtype, int]] = {torch.bfloat16: 32, torch.float16: 64, torch.float32: 64}
    row_step = _CHUNK

    data: Tensor
    rows: int
    cols: int
    dtype: torch.dtype
    groups: int
    count: int
    smallest: int

    @property
    def numbers(self) -> list[int]:
        """See CpuLayout."""
        return [self.rows, self.cols, self.groups, self.count, self.smallest]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "StripsMatrix":
        """See CpuLayout."""
        rows, cols, groups, count, smallest = numbers
        return cls(data, rows, cols, dtype, groups, count, smallest)

    @cached_property
    def struct(self) -> StripsStruct:
        """What the library is given; lives as long as the matrix."""
        return _struct(self.data, self.shape, self.dtype, self.groups, self.smallest)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See CpuLayout."""
        return native.cpu_strips_spmv(self.struct, x, bias)

    def unpack_rows(self, first_row: int, weight: Tensor) -> None:
        """See CpuLayout."""
        native.cpu_strips_unpack(self.struct, first_row, weight)


def arrange(bitmap: BitmapMatrix) -> StripsMatrix | None:
    """The strips of a bitmap.

    Returns:
        None where they do not suit: without AVX-512, with fewer chunks of rows than threads, some of which would idle, and
        where they take more than `MAX_OVERHEAD` of the bitmap's memory.
    """
    has_avx512 = native.INSTRUCTIONS[native.cpu_instructions()] == "avx512"
    most = MAX_OVERHEAD * bitmap.data.nbytes
    if not has_avx512 or _chunks(bitmap.rows) < torch.get_num_threads() or bitmap.count * _ENTRY_BYTES > most:
        return None
    plan, groups = _plan(bitmap)
    return _filled(bitmap, plan, groups) if _offsets(bitmap.shape, groups)[-1] <= most else None


def make(bitmap: BitmapMatrix) -> StripsMatrix:
    """The strips of a bitmap, whether they suit or not."""
    return _filled(bitmap, *_plan(bitmap))


def _plan(bitmap: BitmapMatrix) -> tuple[Tensor, int]:
    """All arrays but the groups, as they lie behind them, and how many groups there are."""
    plan = torch.zeros(_offsets(bitmap.shape, 0)[-1], dtype=torch.uint8)
    native.cpu_strips_plan(bitmap.struct, _struct(plan, bitmap.shape, bitmap.dtype, 0, bitmap.smallest))
    starts = plan[_offsets(bitmap.shape, 0)[3] :].view(torch.int64)
    return plan, int(starts[_chunks(bitmap.rows)])


def _filled(bitmap: BitmapMatrix, plan: Tensor, groups: int) -> StripsMatrix:
    first = _offsets(bitmap.shape, groups)[1]
    data = torch.empty(first + len(plan), dtype=torch.uint8)
    data[max(first - ALIGNMENT, 0) : first] = 0  # so that what lies between the arrays is the same each time
    data[first:] = plan
    matrix = StripsMatrix(data, *bitmap.shape, bitmap.dtype, groups, bitmap.count, bitmap.smallest)
    native.cpu_strips_fill(bitmap.struct, matrix.struct)
    return matrix


def _offsets(shape: tuple[int, int], groups: int) -> list[int]:
    """Bytes at which groups, lengths, row numbers and chunks' starts begin, and at which all ends."""
    chunks, strips = _chunks(shape[0]), -(-shape[1] // _STRIP)
    sizes = groups * _GROUP_BYTES, chunks * strips * _CHUNK // _TILE, chunks * strips * _CHUNK, (chunks + 1) * 8
    return offsets_of(sizes)


def _chunks(rows: int) -> int:
    return -(-rows // _CHUNK)


def _struct(data: Tensor, shape: tuple[int, int], dtype: torch.dtype, groups: int, smallest: int) -> StripsStruct:
    arrays = (data.data_ptr() + offset for offset in _offsets(shape, groups)[:-1])
    return StripsStruct(*arrays, *shape, CODES[dtype], smallest)


define_ops(StripsMatrix)
