"""The layout in which a GPU multiplies: rows sorted by length, cut into slices, interleaved (csrc/cuda/sliced.cuh).

Only plans and arithmetic; `native.py` fills the arrays and `ops.py` multiplies. The canonical format stays what is
stored: a sliced matrix unpacks to the same dense matrix, and that packs to the same canonical bytes.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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


def choose_shapes(rows: int, multiprocessors: int) -> list[Shape]:
    """Shapes for a matrix on a GPU, the one expected to be fastest first.

    The best shapes fill every multiprocessor with blocks of equal work, in one round or in few whole ones.
    """

    def cost(shape: Shape) -> tuple[float, int]:
        resident = RESIDENT_BLOCKS[shape.warps]
        slices, places = _slices(rows, shape.height), multiprocessors * resident
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
    """All that is known of a sliced matrix without its arrays.

    Attributes:
        rows: of the dense matrix.
        cols: of the dense matrix.
        dtype: of the values, float16 or bfloat16.
        delta_bits: 2 or 4.
        shape: height of the slices and warps of a block.
        units: of all slices; a unit is 32 / delta_bits entries of each of a slice's rows.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    delta_bits: int
    shape: Shape
    units: int

    @property
    def slices(self) -> int:
        """Slices of the matrix."""
        return _slices(self.rows, self.shape.height)

    @property
    def array_nbytes(self) -> tuple[int, int, int, int, int]:
        """Bytes of values, deltas, starts, unit offsets and row order."""
        words = self.units * self.shape.height
        starts = self.slices * self.shape.warps * self.shape.height
        return words * (32 // self.delta_bits) * 2, words * 4, starts * 2, (self.slices + 1) * 4, self.rows * 4

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
            for name in ("rows", "cols", "slices", "value_dtype", "delta_bits", "height", "warps")
        ),
    )


@dataclass(frozen=True)
class SlicedMatrix:
    """A sliced matrix: `data` [nbytes] uint8 on a GPU, and what it means."""

    data: Tensor
    plan: SlicedPlan

    @cached_property
    def struct(self) -> SlicedStruct:
        """What the library is given; lives as long as the matrix."""
        plan, base = self.plan, self.data.data_ptr()
        dtype = 0 if plan.dtype == torch.float16 else 1
        return SlicedStruct(
            *(base + offset for offset in plan.array_offsets),
            *(plan.rows, plan.cols, plan.slices, dtype, plan.delta_bits, plan.shape.height, plan.shape.warps),
        )

    @cached_property
    def address(self) -> int:
        """Of the struct."""
        return ctypes.addressof(self.struct)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct, whose addresses are this matrix's."""
        return {"data": self.data, "plan": self.plan}


@dataclass(frozen=True)
class SlicedRows:
    """A plan, and the two arrays that follow from the lengths of the rows.

    Attributes:
        plan: the plan.
        unit_offsets: [slices + 1] int32.
        row_order: [rows] int32, longest row first.
    """

    plan: SlicedPlan
    unit_offsets: Tensor
    row_order: Tensor


def plan_rows(
    counts: dict[int, Tensor], rows: int, cols: int, dtype: torch.dtype, shapes: list[Shape], canonical_nbytes: int
) -> SlicedRows | None:
    """Lay out rows of these lengths in the first shape that does not waste memory, with the deltas that take fewer bytes.

    Args:
        counts: [rows] int32 entries of each row, by the width of the deltas.
        rows: of the matrix, at least 1.
        cols: of the matrix.
        dtype: of the values.
        shapes: how to cut, the best first.
        canonical_nbytes: bytes of the canonical arrays.

    Returns:
        None where rows are so uneven that slices would waste memory, see MAX_OVERHEAD and MAX_PADDING.
    """
    ordered = {bits: count.sort(descending=True, stable=True) for bits, count in counts.items()}
    for shape in shapes[:_MAX_TRIES]:
        fitting = []
        for bits, (lengths, order) in ordered.items():
            entries = 32 // bits
            units = (lengths[:: shape.height] + entries - 1) // entries
            last = torch.arange(shape.height - 1, rows + shape.height - 1, shape.height, device=lengths.device)
            padding = (units * entries - lengths[last.clamp(max=rows - 1)]).max()
            total, worst = torch.stack([units.sum(), padding.to(torch.int64)]).tolist()
            plan = SlicedPlan(rows, cols, dtype, bits, shape, total)
            if worst <= MAX_PADDING and plan.nbytes <= MAX_OVERHEAD * canonical_nbytes:
                fitting.append((plan, units, order))
        if fitting:
            plan, units, order = min(fitting, key=lambda candidate: candidate[0].nbytes)
            offsets = torch.zeros(plan.slices + 1, dtype=torch.int32, device=units.device)
            offsets[1:] = units.cumsum(0)
            return SlicedRows(plan, offsets, order.to(torch.int32))
    return None


def _slices(rows: int, height: int) -> int:
    return -(-rows // height)
