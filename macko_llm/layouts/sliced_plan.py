"""How a GPU's layout is cut: rows sorted by length, cut into slices, interleaved (csrc/cuda/sliced.cuh): plans and arithmetic.

In the literature such layouts are called SELL-C-sigma (Kreutzer et al. 2014, arXiv 1307.6209): C is the height of the slices,
and rows are sorted over the whole matrix (sigma is all rows).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DELTA_BITS = (2, 4)
"""Widths that deltas may have in memory. 2 bits are fewer bytes up to about 57 % sparsity, 4 bits beyond."""
MAX_OVERHEAD = 1.05
"""A matrix whose rows are too uneven to be sliced within this factor of its canonical bytes stays canonical."""
MAX_PADDING = 256
"""Zeros at the end of a row that is shorter than its slice; MACKO_SLICED_PADDING in csrc/macko.h."""
_ALIGNMENT = 256
_MAX_TRIES = 12


@dataclass(frozen=True)
class Shape:
    """How a matrix is cut: rows of a slice, and warps of the block that multiplies it."""

    height: int
    warps: int


RESIDENT_BLOCKS = {32: 1, 20: 1, 24: 2, 16: 3, 12: 4, 8: 6}
"""Blocks that a multiprocessor holds at a time, by their warps, as far as registers matter (SpmvConfig in
csrc/cuda/sliced_spmv.cuh)."""
HEIGHTS = range(8, 33, 4)
"""Multiples of 4, so that the lanes of a warp read whole 64-byte pieces."""
# What a shape costs besides its busiest multiprocessor, fitted to an H200 (docs/design.md).
_IDLE_LANES_COST = 0.4  # of all lanes
_LONE_BLOCKS_COST = 0.15  # of one block at a time, one after the other
_CROWDING_COST = 0.1  # of places that stay free in the only round: the next kernel's blocks take them unevenly
_FULL = 0.95
_RESERVED_BYTES = 1024 + 256  # by CUDA, and for the slice's rows


def resident_blocks(cols: int, capability: tuple[int, int], shared_bytes: int) -> dict[int, int]:
    """Blocks that a multiprocessor holds at a time, by their warps (SpmvConfig in csrc/cuda/sliced_spmv.cuh).

    Args:
        cols: of the matrix, whose x every block keeps in shared memory.
        capability: of the GPU; a multiprocessor of 7.5 holds 32 warps, others at least 48.
        shared_bytes: of a multiprocessor's shared memory.
    """
    blocks = {}
    for warps, most in RESIDENT_BLOCKS.items():
        block_bytes = (cols + MAX_PADDING) * 2 + warps * 33 * 4 + _RESERVED_BYTES
        of_warps = 32 // warps if capability == (7, 5) else most
        blocks[warps] = max(1, min(most, of_warps, shared_bytes // block_bytes))
    return blocks


def choose_shapes(member_rows: Sequence[int], multiprocessors: int, resident: Mapping[int, int]) -> list[Shape]:
    """Shapes for a group of matrices with these rows (or for a lone one) on a GPU, the one expected to be fastest first.

    The best shapes fill every multiprocessor with blocks of equal work, in one round or in few whole ones.

    Args:
        member_rows: rows of each matrix.
        multiprocessors: of the GPU.
        resident: blocks that each of them holds, by their warps.
    """

    def cost(shape: Shape) -> tuple[float, int]:
        blocks = resident[shape.warps]
        slices, places = count_slices(member_rows, shape.height), multiprocessors * blocks
        rounds = -(-slices // places)
        busiest = rounds * blocks * shape.height  # rows of a multiprocessor
        extra = _IDLE_LANES_COST * (1 - shape.height / max(HEIGHTS))
        if blocks == 1 and rounds > 1:
            extra += _LONE_BLOCKS_COST
        if blocks > 1 and rounds == 1 and slices < _FULL * places:
            extra += _CROWDING_COST
        return busiest * (1 + extra), rounds

    return sorted((Shape(height, warps) for warps in RESIDENT_BLOCKS for height in reversed(HEIGHTS)), key=cost)


@dataclass(frozen=True)
class SlicedPlan:
    """All that is known of a group of sliced matrices without its arrays.

    Attributes:
        member_rows: rows of each member's dense matrix, in order; a lone matrix is a group of one.
        cols: of the dense matrices.
        dtype: of the values, float16 or bfloat16.
        delta_bits: 2 or 4.
        shape: height of the slices and warps of a block.
        units: of all slices; a unit is 32 / delta_bits entries of each of a slice's rows.
    """

    member_rows: tuple[int, ...]
    cols: int
    dtype: torch.dtype
    delta_bits: int
    shape: Shape
    units: int

    @property
    def rows(self) -> int:
        """Rows of all members."""
        return sum(self.member_rows)

    @property
    def slices(self) -> int:
        """Slices of all members; none has rows of two."""
        return count_slices(self.member_rows, self.shape.height)

    @property
    def array_nbytes(self) -> tuple[int, int, int, int, int]:
        """Bytes of values, deltas, starts, unit offsets and row order."""
        words = self.units * self.shape.height
        places = self.slices * self.shape.height
        starts = places * self.shape.warps
        return words * (32 // self.delta_bits) * 2, words * 4, starts * 2, (self.slices + 1) * 4, places * 4

    @property
    def array_offsets(self) -> tuple[int, int, int, int, int]:
        """Where each array begins in the buffer that holds them all."""
        offsets, end = [], 0
        for nbytes in self.array_nbytes:
            offsets.append(end)
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return tuple(offsets)  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.array_offsets[-1] + self.array_nbytes[-1]


@dataclass(frozen=True)
class SlicedRows:
    """A plan, and the two arrays that follow from the lengths of the rows.

    Attributes:
        plan: the plan.
        unit_offsets: [slices + 1] int32.
        row_order: [slices * height] int32, each member's longest row first; -1 where its last slice has no row.
    """

    plan: SlicedPlan
    unit_offsets: Tensor
    row_order: Tensor


def plan_rows(
    counts: dict[int, Tensor],
    member_rows: Sequence[int],
    cols: int,
    dtype: torch.dtype,
    shapes: list[Shape],
    canonical_nbytes: int,
) -> SlicedRows | None:
    """Lay out rows of these lengths in the first shape that does not waste memory, with the deltas that take fewer bytes.

    Args:
        counts: [rows] int32 entries of each row of all members, by the width of the deltas.
        member_rows: rows of each member, together at least 1.
        cols: of the matrices.
        dtype: of the values.
        shapes: how to cut, the best first.
        canonical_nbytes: bytes of all members' canonical arrays.

    Returns:
        None where rows are so uneven that slices would waste memory, see MAX_OVERHEAD and MAX_PADDING.
    """
    ordered = {bits: _sort_members(count, member_rows) for bits, count in counts.items()}
    for shape in shapes[:_MAX_TRIES]:
        fitting = []
        for bits, (lengths, order) in ordered.items():
            entries = 32 // bits
            sliced = _cut(lengths, member_rows, shape.height)
            units = (sliced[:, 0] + entries - 1) // entries
            padding = (units[:, None] * entries - sliced).masked_fill(sliced < 0, 0).max()
            total, worst = torch.stack([units.sum(), padding.to(torch.int64)]).tolist()
            plan = SlicedPlan(tuple(member_rows), cols, dtype, bits, shape, total)
            if worst <= MAX_PADDING and plan.nbytes <= MAX_OVERHEAD * canonical_nbytes:
                fitting.append((plan, units, order))
        if fitting:
            plan, units, order = min(fitting, key=lambda candidate: candidate[0].nbytes)
            offsets = torch.zeros(plan.slices + 1, dtype=torch.int32, device=units.device)
            offsets[1:] = units.cumsum(0)
            return SlicedRows(plan, offsets, _cut(order, member_rows, shape.height).flatten().to(torch.int32))
    return None


def _sort_members(count: Tensor, member_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[rows] lengths of each member's rows, longest first, and [rows] which rows of the group they are."""
    parts = [part.sort(descending=True, stable=True) for part in count.split(list(member_rows))]
    firsts = [sum(member_rows[:member]) for member in range(len(member_rows))]
    lengths = torch.cat([part.values for part in parts])
    return lengths, torch.cat([part.indices + first for part, first in zip(parts, firsts, strict=True)])


def _cut(of_rows: Tensor, member_rows: Sequence[int], height: int) -> Tensor:
    """[rows] -> [slices, height], -1 at the end of a member's last slice."""
    parts = of_rows.split(list(member_rows))
    return torch.cat([F.pad(part, (0, -len(part) % height), value=-1) for part in parts]).view(-1, height)


def count_slices(member_rows: Sequence[int], height: int) -> int:
    """Slices of a group whose members have these rows; none has rows of two."""
    return sum(-(-rows // height) for rows in member_rows)
