"""A naive second opinion on the sliced layout: an encoder and decoders, against which library and kernels are held."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import MAX_PADDING, Shape, SlicedPlan
from macko_llm.native import SlicedStruct

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [Shape(32, 32), Shape(8, 32), Shape(32, 20), Shape(20, 24), Shape(28, 16), Shape(12, 12), Shape(5, 8)]
"""Each number of warps that SpMV is compiled for, with some height."""
LOW = Shape(8, 32)
GROUPS = [(37,), (1,), (1, 1, 1), (32, 32, 32), (33, 7, 65), (64, 16, 16), (3, 0, 5), (0, 9), (100, 100)]


def divided_up(dividend: int, divisor: int) -> int:
    return (dividend + divisor - 1) // divisor


def array_sizes(member_rows: Sequence[int], shape: Shape, bits: int, units: int) -> list[int]:
    """Bytes of values, deltas, starts, unit offsets and row order: csrc/macko.h in numbers."""
    slices = sum(divided_up(rows, shape.height) for rows in member_rows)
    places = slices * shape.height
    values = units * (32 // bits // 8) * shape.height * 8 * 2
    return [values, units * shape.height * 4, places * shape.warps * 2, (slices + 1) * 4, places * 4]


def buffer_size(sizes: list[int]) -> int:
    return sum(divided_up(size, 256) * 256 for size in sizes[:-1]) + sizes[-1]


def naive_slices(lengths: list[int], height: int, member_rows: Sequence[int] | None = None) -> list[list[int]]:
    """The rows of each slice, -1 where it has none: each member's rows by length, and cut by themselves."""
    slices, first = [], 0
    for rows in member_rows or [len(lengths)]:
        order = sorted(range(first, first + rows), key=lambda row: (-lengths[row], row))
        slices += [order[at : at + height] for at in range(0, rows, height)]
        first += rows
    assert first == len(lengths)
    return [rows + [-1] * (height - len(rows)) for rows in slices]


def naive_units(lengths: list[int], height: int, bits: int, member_rows: Sequence[int] | None = None) -> list[int]:
    """Units of each slice: as many as its longest row needs."""
    slices = naive_slices(lengths, height, member_rows)
    return [divided_up(max(lengths[row] for row in rows if row >= 0), 32 // bits) for rows in slices]


def naive_padding(lengths: list[int], height: int, bits: int, member_rows: Sequence[int] | None = None) -> int:
    """Most zeros at the end of a row."""
    slices, units = naive_slices(lengths, height, member_rows), naive_units(lengths, height, bits, member_rows)
    return max(
        count * (32 // bits) - lengths[row]
        for rows, count in zip(slices, units, strict=True)
        for row in rows
        if row >= 0
    )


def naive_choice(
    lengths: dict[int, list[int]],
    shapes: list[Shape],
    canonical_nbytes: int,
    member_rows: Sequence[int] | None = None,
) -> tuple | None:
    """Shape, bytes, width, units and rows of the slices: of the first shape that is good enough, the fewer bytes."""
    for shape in shapes:
        choices = []
        for bits, of_rows in sorted(lengths.items()):
            units = naive_units(of_rows, shape.height, bits, member_rows)
            nbytes = buffer_size(array_sizes(member_rows or [len(of_rows)], shape, bits, sum(units)))
            padding = naive_padding(of_rows, shape.height, bits, member_rows)
            if padding <= 256 and nbytes <= 1.05 * canonical_nbytes:
                choices.append((nbytes, bits, units, naive_slices(of_rows, shape.height, member_rows)))
        if choices:
            return shape, *min(choices)
    return None


def row_entries(row: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [entries] uint16 and deltas [entries] of a row of 16-bit patterns, as docs/format.md with deltas of any width."""
    most = 2**bits - 1
    columns = np.flatnonzero(row & 0x7FFF)
    gaps = np.diff(columns, prepend=-1) - 1
    places = np.cumsum(gaps // (most + 1) + 1) - 1  # each entry comes behind the zeros that bridge its gap
    entries = int(places[-1]) + 1 if len(places) else 0
    values, deltas = np.zeros(entries, np.uint16), np.full(entries, most)
    values[places], deltas[places] = row[columns], gaps % (most + 1)
    return values, deltas


def row_lengths(weight: Tensor, bits: int) -> list[int]:
    return [len(row_entries(row, bits)[0]) for row in patterns(weight)]


def patterns(weight: Tensor) -> np.ndarray:
    """The bits of 16-bit floats."""
    return weight.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


@lru_cache
def share_begins(units: int, warps: int) -> np.ndarray:
    """First unit of each warp's share of a slice: shares are as equal as they can be, the longer ones first."""
    return np.cumsum([0, *(len(part) for part in np.array_split(np.arange(units), warps))])[:-1]


def encode(weight: Tensor, shape: Shape, bits: int, member_rows: Sequence[int] | None = None) -> np.ndarray:
    """The buffer [nbytes] uint8 of a matrix with at least one row, or of a group of matrices one below the other."""
    (rows, cols), (height, warps), entries = weight.shape, (shape.height, shape.warps), 32 // bits
    encoded = [row_entries(row, bits) for row in patterns(weight)]
    lengths = [len(values) for values, _ in encoded]
    slices, units = naive_slices(lengths, height, member_rows), naive_units(lengths, height, bits, member_rows)
    offsets = np.cumsum([0, *units])
    values = np.zeros((offsets[-1], entries // 8, height, 8), np.uint16)
    words = np.zeros((offsets[-1], height), np.uint32)
    starts = np.zeros((len(units), warps, height), np.uint16)
    for slice_, place in np.argwhere(np.array(slices) >= 0):
        row = slices[slice_][place]
        count = units[slice_] * entries
        row_values, row_deltas = (np.zeros(count, kind) for kind in (np.uint16, np.int64))
        row_values[: len(encoded[row][0])], row_deltas[: len(encoded[row][1])] = encoded[row]
        span = slice(offsets[slice_], offsets[slice_ + 1])
        values[span, :, place] = row_values.reshape(-1, entries // 8, 8)
        words[span, place] = (row_deltas.reshape(-1, entries) << (bits * np.arange(entries))).sum(axis=1)
        reached = np.cumsum([0, *(row_deltas + 1)])
        starts[slice_, :, place] = np.minimum(reached[share_begins(units[slice_], warps) * entries], cols)
    arrays = [values, words, starts, offsets.astype(np.int32), np.array(slices, np.int32)]
    sizes = array_sizes(member_rows or [rows], shape, bits, int(offsets[-1]))
    assert [array.nbytes for array in arrays] == sizes
    buffer = np.zeros(buffer_size(sizes), np.uint8)
    at = 0
    for array in arrays:
        buffer[at : at + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        at += divided_up(array.nbytes, 256) * 256
    return buffer


def decode(
    buffer: np.ndarray, member_rows: Sequence[int], cols: int, shape: Shape, bits: int, units: int
) -> np.ndarray:
    """The [rows, cols] bit patterns of a group's buffer; a lone matrix has one member."""
    arrays, at = [], 0
    sizes = array_sizes(member_rows, shape, bits, units)
    for size, kind in zip(sizes, ("u2", "u4", "u2", "i4", "i4"), strict=True):
        arrays.append(buffer[at : at + size].view(kind))
        at += divided_up(size, 256) * 256
    assert buffer_size(sizes) == len(buffer)
    assert arrays[3][0] == 0
    assert arrays[3][-1] == units
    return decode_arrays(arrays, sum(member_rows), cols, shape, bits)


def decode_arrays(
    arrays: Sequence[np.ndarray], rows: int, cols: int, shape: Shape, bits: int, first_row: int = 0
) -> np.ndarray:
    """The [rows, cols] bit patterns of arrays, read as SpMV reads them: each warp its share, from the column in `starts`.

    `arrays` are values and deltas of the whole group; starts, unit offsets and row order of the matrix that is read.
    """
    height, entries, offsets = shape.height, 32 // bits, arrays[3]
    values = arrays[0].reshape(-1, entries // 8, height, 8).transpose(0, 2, 1, 3).reshape(-1, height, entries)
    words, starts = arrays[1].reshape(-1, height), arrays[2].reshape(-1, shape.warps, height)
    order = arrays[4].reshape(-1, height)
    assert sorted(order[order >= 0] - first_row) == list(range(rows))
    weight = np.zeros((rows, cols), np.uint16)
    seen = np.zeros((rows, cols), bool)
    for slice_ in range(len(offsets) - 1):
        here = slice(offsets[slice_], offsets[slice_ + 1])
        begins = share_begins(int(offsets[slice_ + 1] - offsets[slice_]), shape.warps) * entries
        deltas = words[here, :, None] >> (bits * np.arange(entries, dtype=np.uint32)) & (2**bits - 1)
        steps = deltas.transpose(1, 0, 2).reshape(height, -1).astype(np.int64) + 1
        reached = np.concatenate([np.zeros((height, 1), np.int64), np.cumsum(steps, axis=1)], axis=1)
        warp = np.searchsorted(begins, np.arange(steps.shape[1]), side="right") - 1  # that reads each entry
        columns = (starts[slice_].T - reached[:, begins])[:, warp] + reached[:, 1:] - 1
        own = values[here].transpose(1, 0, 2).reshape(height, -1)
        assert columns.max(initial=0) < cols + MAX_PADDING  # x goes on with that many zeros
        inside = columns < cols
        assert not own[~inside].any()
        place, entry = inside.nonzero()
        real = order[slice_, place] >= 0
        assert not own[place[~real], entry[~real]].any()  # places without a row hold nothing
        row, column = order[slice_, place[real]] - first_row, columns[place[real], entry[real]]
        assert not seen[row, column].any()
        seen[row, column] = True
        weight[row, column] = own[place[real], entry[real]]
    return weight


def decode_struct(matrix: SlicedMatrix) -> np.ndarray:
    """The bit patterns of a matrix in the CPU's memory, of which only the struct is known."""
    struct = SlicedStruct.from_address(matrix.address)

    def array(pointer: int, kind: type, count: int) -> np.ndarray:
        return np.array((kind * count).from_address(pointer))

    places, entries = struct.slices * struct.height, 32 // struct.delta_bits
    offsets = array(struct.unit_offsets, ctypes.c_int32, struct.slices + 1)
    words = int(offsets[-1]) * struct.height
    arrays = [
        array(struct.values, ctypes.c_uint16, words * entries),
        array(struct.deltas, ctypes.c_uint32, words),
        array(struct.starts, ctypes.c_uint16, places * struct.warps),
        offsets,
        array(struct.row_order, ctypes.c_int32, places),
    ]
    shape = Shape(struct.height, struct.warps)
    return decode_arrays(arrays, struct.rows, struct.cols, shape, struct.delta_bits, struct.first_row)


def random_matrix(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of about the same length, as a pruned layer has."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight.mul_(torch.rand(rows, cols, generator=generator) >= sparsity).to(dtype)


def make(
    dtype: torch.dtype = torch.bfloat16,
    member_rows: tuple[int, ...] = (37,),
    shape: Shape = Shape(28, 16),  # noqa: B008
    bits: int = 2,
    *,
    weight: Tensor | None = None,
) -> SlicedMatrix:
    """A group in memory of the CPU, which nothing multiplies."""
    if weight is None:
        weight = random_matrix(sum(member_rows), 172, 0.5, dtype)
    units = sum(naive_units(row_lengths(weight, bits), shape.height, bits, member_rows))
    plan = SlicedPlan(member_rows, weight.shape[1], dtype, bits, shape, units)
    return SlicedMatrix(torch.from_numpy(encode(weight, shape, bits, member_rows)), plan)


def fields(matrix: SlicedMatrix) -> dict[str, int]:
    struct = SlicedStruct.from_address(matrix.address)
    return {name: getattr(struct, name) for name, _ in SlicedStruct._fields_}
