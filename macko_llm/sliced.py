"""The layout in which a GPU multiplies: rows sorted by length, cut into slices, interleaved (csrc/cuda/sliced.cuh).

Only plans and arithmetic; `native.py` fills the arrays and `ops.py` multiplies. The canonical format stays what is
stored: a sliced matrix unpacks to the same dense matrix, and that packs to the same canonical bytes.

Matrices that multiply the same input (q, k and v of a layer) share one layout, a group: its members' rows follow each
other, each member has slices of its own, and group and members all multiply and unpack by themselves.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
"""Blocks that a multiprocessor holds at a time, by their warps (SpmvConfig in csrc/cuda/sliced_spmv.cuh)."""
HEIGHTS = range(8, 33, 4)
"""Multiples of 4, so that the lanes of a warp read whole 64-byte pieces."""
# What a shape costs besides its busiest multiprocessor, fitted to an H200 (docs/design.md).
_IDLE_LANES_COST = 0.4  # of all lanes
_LONE_BLOCKS_COST = 0.15  # of one block at a time, one after the other
_CROWDING_COST = 0.1  # of places that stay free in the only round: the next kernel's blocks take them unevenly
_FULL = 0.95


def choose_shapes(member_rows: Sequence[int], multiprocessors: int) -> list[Shape]:
    """Shapes for a group of matrices with these rows (or for a lone one) on a GPU, the one expected to be fastest first.

    The best shapes fill every multiprocessor with blocks of equal work, in one round or in few whole ones.
    """

    def cost(shape: Shape) -> tuple[float, int]:
        resident = RESIDENT_BLOCKS[shape.warps]
        slices, places = _slices(member_rows, shape.height), multiprocessors * resident
        rounds = -(-slices // places)
        busiest = rounds * resident * shape.height  # rows of a multiprocessor
        extra = _IDLE_LANES_COST * (1 - shape.height / max(HEIGHTS))
        if resident == 1 and rounds > 1:
            extra += _LONE_BLOCKS_COST
        if resident > 1 and rounds == 1 and slices < _FULL * places:
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
        return _slices(self.member_rows, self.shape.height)

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


class SlicedStruct(ctypes.Structure):
    """`macko_sliced` of csrc/macko.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "deltas", "starts", "unit_offsets", "row_order")),
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "cols", "slices", "first_row", "value_dtype", "delta_bits", "height", "warps")
        ),
    )


@dataclass(frozen=True)
class SlicedMatrix:
    """A group of sliced matrices as one matrix, whose rows are those of all members, or a view of one member.

    Attributes:
        data: [plan.nbytes] uint8 on a GPU, which a group and its members share.
        plan: what the group's bytes mean.
        member: which of the members this is, None for the group.
    """

    data: Tensor
    plan: SlicedPlan
    member: int | None = None

    @property
    def rows(self) -> int:
        """Of the dense matrix."""
        return self.plan.rows if self.member is None else self.plan.member_rows[self.member]

    @property
    def members(self) -> "list[SlicedMatrix]":
        """Views of the group's members."""
        return [SlicedMatrix(self.data, self.plan, member) for member in range(len(self.plan.member_rows))]

    @property
    def numbers(self) -> list[int]:
        """All but the data and its dtype in whole numbers, which the schema of a torch op can carry."""
        plan = self.plan
        shape = plan.delta_bits, plan.shape.height, plan.shape.warps
        return [-1 if self.member is None else self.member, plan.cols, *shape, plan.units, *plan.member_rows]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "SlicedMatrix":
        """The matrix that has these `numbers`."""
        member, cols, delta_bits, height, warps, units, *member_rows = numbers
        plan = SlicedPlan(tuple(member_rows), cols, dtype, delta_bits, Shape(height, warps), units)
        return cls(data, plan, None if member < 0 else member)

    @cached_property
    def struct(self) -> SlicedStruct:
        """What the library is given; lives as long as the matrix."""
        plan, (height, warps) = self.plan, (self.plan.shape.height, self.plan.shape.warps)
        before = plan.member_rows[: self.member] if self.member is not None else ()
        own = plan.member_rows if self.member is None else (self.rows,)
        values, deltas, starts, unit_offsets, row_order = (self.data.data_ptr() + at for at in plan.array_offsets)
        first = _slices(before, height)  # slice of a member; units are counted in the whole group
        return SlicedStruct(
            *(values, deltas, starts + first * warps * height * 2),
            *(unit_offsets + first * 4, row_order + first * height * 4),
            *(self.rows, plan.cols, _slices(own, height), sum(before)),
            *(0 if plan.dtype == torch.float16 else 1, plan.delta_bits, height, warps),
        )

    @cached_property
    def address(self) -> int:
        """Of the struct."""
        return ctypes.addressof(self.struct)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct, whose addresses are this matrix's."""
        return {"data": self.data, "plan": self.plan, "member": self.member}


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


def _slices(member_rows: Sequence[int], height: int) -> int:
    return sum(-(-rows // height) for rows in member_rows)
