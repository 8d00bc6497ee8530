"""How a matrix is cut for tensor cores: tiles of 8 x 64, strips of tiles, records (csrc/cuda/tiled.cuh): plans and arithmetic."""

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

_LOW_TILES = 4
_PLACES = 6
# What a cut costs besides the tiles of a multiprocessor. To be measured.
_TALL_COST = 0.1  # of those tiles, where strips have more than _LOW_TILES
_STRIP_COST = 0.25  # tiles a strip
_CROWDING_COST = 2.5  # tiles a strip beyond the _PLACES of a multiprocessor


def divide_up(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def choose_strips(rows: int, multiprocessors: int) -> int:
    """Into how many strips to cut a matrix on a GPU.

    Each multiprocessor gets as many strips as any other, so that the busiest has no more tiles than it must; or each
    tile is a strip, if they are fewer. Of those cuts, low strips are better, unless they are too many.

    Args:
        rows: of the matrix, at least 1.
        multiprocessors: of the GPU.
    """
    tiles = divide_up(rows, TILE_ROWS)
    busiest = divide_up(tiles, multiprocessors)

    def cost(each: int) -> float:  # strips of a multiprocessor
        extra = _TALL_COST * busiest if divide_up(tiles, each * multiprocessors) > _LOW_TILES else 0.0
        return extra + _STRIP_COST * each + _CROWDING_COST * max(0, each - _PLACES)

    fewest = divide_up(tiles, MAX_TILES * multiprocessors)
    return min(min(range(fewest, busiest + 1), key=cost) * multiprocessors, tiles)


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
        record_bytes = divide_up(most_units * UNIT_BYTES, _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        return cls(*shape, dtype, strips, units, record_bytes)

    @property
    def panels(self) -> int:
        """Of TILE_COLUMNS columns, the last perhaps of fewer; each strip has a record in each."""
        return divide_up(self.cols, TILE_COLUMNS)

    @property
    def tiles(self) -> int:
        """Of TILE_ROWS rows, the last perhaps of fewer."""
        return divide_up(self.rows, TILE_ROWS)

    @property
    def strip_tiles(self) -> list[int]:
        """Tiles of each strip."""
        each, longer = divmod(self.tiles, self.strips)
        return [each + (strip < longer) for strip in range(self.strips)]

    @property
    def records(self) -> int:
        """Of all strips, a strip's panels in order."""
        return self.strips * self.panels

    @property
    def starts_offset(self) -> int:
        """Where [records + 1] int32 starts begin in the buffer, at whose front the records lie."""
        return divide_up(self.units * UNIT_BYTES, _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.starts_offset + (self.records + 1) * 4
