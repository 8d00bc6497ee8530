"""How a matrix is cut for tensor cores, into strips of tiles (csrc/cuda/tiled.cuh): plans and arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE_ROWS, TILE_COLUMNS = 8, 64
MAX_TILES = 8
"""Of a strip."""
MAX_COLS = 131072
"""MACKO_TILED_MAX_COLS in csrc/macko.h."""
UNIT_BYTES = 16
"""Records are whole units of these bytes."""
_SLOT_ALIGNMENT = 128
_ALIGNMENT = 256

_ALONE_TILES = 5  # of a strip, at most, where each multiprocessor has one
_STRIP_TILES = 4  # where it has more


def _divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def choose_strips(member_rows: Sequence[int], multiprocessors: int) -> list[int]:
    """Into how many strips to cut each of the matrices that one kernel multiplies on a GPU.

    All together have as many for each multiprocessor, as measured on an H200 (docs/design.md). Few strips read x less
    often and have less to begin and to end; but more than a few tiles leave no registers for as many warps. The matrices
    get theirs so that the highest of all is as low as it can be, and then so that the strips of the one are as high as
    those of the others.

    Args:
        member_rows: of each matrix, at least 1.
        multiprocessors: of the GPU.
    """
    tiles = [_divide_up(rows, TILE_ROWS) for rows in member_rows]
    each = 1
    if _count_strips(tiles, _ALONE_TILES) > multiprocessors:
        each = _divide_up(_count_strips(tiles, _STRIP_TILES), multiprocessors)
    total = min(each * multiprocessors, sum(tiles))
    highest = next(height for height in range(1, MAX_TILES + 1) if _count_strips(tiles, height) <= total)
    strips = [_divide_up(of_member, highest) for of_member in tiles]
    for _ in range(total - sum(strips)):
        index = max(range(len(tiles)), key=lambda member: tiles[member] / strips[member])
        strips[index] += 1
    return strips


def _count_strips(tiles: Sequence[int], height: int) -> int:
    return sum(_divide_up(of_member, height) for of_member in tiles)


def count_records(cols: int, strips: int) -> int:
    """Records of a matrix: each strip has one for every panel of TILE_COLUMNS columns, one behind the other."""
    return strips * _divide_up(cols, TILE_COLUMNS)


@dataclass(frozen=True)
class TiledPlan:
    """All that is known of a tiled matrix without its arrays.

    Attributes:
        rows, cols: of the dense matrix.
        dtype: of the values, float16 or bfloat16.
        strips: of 1 to MAX_TILES tiles, the first ones one higher than the others where tiles do not divide evenly.
        units: of all records.
        record_bytes: of the longest record, rounded up as the kernels lay records in shared memory.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    strips: int
    units: int
    record_bytes: int

    @classmethod
    def of(cls, shape: tuple[int, int], dtype: torch.dtype, strips: int, units: int, most_units: int) -> "TiledPlan":
        """The plan of a matrix whose records have these many units, and the longest of them `most_units`."""
        record_bytes = _divide_up(most_units * UNIT_BYTES, _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        return cls(*shape, dtype, strips, units, record_bytes)

    @property
    def records(self) -> int:
        """Of all strips, see `count_records`."""
        return count_records(self.cols, self.strips)

    @property
    def starts_offset(self) -> int:
        """Where [records + 1] int32 starts begin in the buffer, at whose front the records lie."""
        return _divide_up(self.units * UNIT_BYTES, _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.starts_offset + (self.records + 1) * 4
