"""The sliced layout's plans and arithmetic, and the layout itself as a naive encoder writes it and a naive decoder reads it."""

import copy
import ctypes
import pickle
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from macko_llm import format as spec
from macko_llm.sliced import (
    DELTA_BITS,
    HEIGHTS,
    MAX_OVERHEAD,
    MAX_PADDING,
    RESIDENT_BLOCKS,
    Shape,
    SlicedMatrix,
    SlicedPlan,
    SlicedStruct,
    choose_shapes,
    plan_rows,
)

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [Shape(32, 32), Shape(8, 32), Shape(32, 20), Shape(20, 24), Shape(28, 16), Shape(12, 12), Shape(5, 8)]
"""Each number of warps that SpMV is compiled for, with some height."""
LOW = Shape(8, 32)
HEADER = Path(__file__).resolve().parents[1] / "csrc" / "macko.h"
H200 = 132


# A naive second opinion, which tests/gpu/test_gpu_sliced.py holds against the kernels.


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


# The tests.


def test_a_matrix_by_hand() -> None:
    """One unit: the first warp has all of it, and the gaps of 5 and 7 columns take a bridging zero each."""
    weight = torch.zeros(3, 40, dtype=torch.float16)
    weight[0, 7] = 1.0  # 0x3c00
    weight[2, 0], weight[2, 6] = 2.0, -1.0  # 0x4000, 0xbc00
    two_bits = encode(weight, Shape(8, 32), 2)
    values, words = two_bits[:256].view(np.uint16), two_bits[256 : 256 + 32].view(np.uint32)
    # Row 2 has entries (2.0, 0), (0, 3), (-1.0, 1); row 0 has (0, 3), (1.0, 3); row 1 none.
    assert values.reshape(2, 8, 8)[0, :3, :3].tolist() == [[0x4000, 0, 0xBC00], [0, 0x3C00, 0], [0, 0, 0]]
    assert words[:3].tolist() == [0b01_11_00, 0b11_11, 0]
    starts = two_bits[512 : 512 + 32 * 8 * 2].view(np.uint16).reshape(32, 8)
    # The other warps begin behind 16 entries: 3 and 2 of the rows' own, then zeros that go one column on.
    assert starts[0, :3].tolist() == [0, 0, 0]
    assert (starts[1:, :3] == [7 + 13, 8 + 14, 16]).all()
    assert two_bits[1024 : 1024 + 8].view(np.int32).tolist() == [0, 1]
    assert two_bits[1280:].view(np.int32).tolist() == [2, 0, 1, *[-1] * 5]
    assert np.array_equal(decode(two_bits, [3], 40, Shape(8, 32), 2, 1), patterns(weight))


@given(
    rows=st.integers(1, 70),
    cols=st.sampled_from([1, 16, 17, 172]) | st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from(DELTA_BITS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_the_decoder_reads_what_the_encoder_writes(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, shape: Shape, bits: int, seed: int
) -> None:
    weight = random_matrix(rows, cols, sparsity, dtype, seed) + 0.0  # no negative zeros
    units = sum(naive_units(row_lengths(weight, bits), shape.height, bits))
    assert np.array_equal(decode(encode(weight, shape, bits), [rows], cols, shape, bits, units), patterns(weight))


def test_deltas_of_four_bits_are_the_formats() -> None:
    weight = random_matrix(20, 900, 0.95, torch.bfloat16)
    matrix = spec.pack(weight)
    encoded = [row_entries(row, spec.DELTA_BITS) for row in patterns(weight)]
    values, deltas = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
    entries = int(matrix.row_offsets[-1])
    assert np.array_equal(patterns(matrix.values)[:entries], values)
    assert np.array_equal(matrix.deltas[: entries // 2].numpy(), (deltas[0::2][: entries // 2] | deltas[1::2] << 4))
    assert matrix.row_offsets.diff().tolist() == [len(values) for values, _ in encoded]


@pytest.mark.parametrize(("rows", "height", "warps"), [(4096, 32, 32), (11008, 28, 16), (12288, 32, 16)])
def test_shapes_on_an_h200(rows: int, height: int, warps: int) -> None:
    assert choose_shapes([rows], H200)[0] == Shape(height, warps)


def test_shapes_are_those_of_the_library_and_the_first_gives_multiprocessors_equal_work() -> None:
    shapes = {Shape(height, warps) for height in HEIGHTS for warps in RESIDENT_BLOCKS}
    best = set()

    def busiest(rows: int, multiprocessors: int, shape: Shape) -> int:
        """Rows that the multiprocessor with the most has room for, in full rounds of blocks."""
        at_a_time = multiprocessors * RESIDENT_BLOCKS[shape.warps]
        rounds = divided_up(divided_up(rows, shape.height), at_a_time)
        return rounds * RESIDENT_BLOCKS[shape.warps] * shape.height

    for multiprocessors in (1, 2, 14, 40, 58, 68, 84, 108, 114, 128, 132, 144, 148, 188, 256):
        for rows in (1, 8, 9, 31, 64, 256, *range(512, 30000, 1579), 1024, 4096, 11008, 12288, 22016, 128256):
            chosen = choose_shapes([rows], multiprocessors)
            assert len(chosen) == len(shapes)
            assert set(chosen) == shapes
            best.add(chosen[0])
            loads = {shape: busiest(rows, multiprocessors, shape) for shape in chosen}
            assert loads[chosen[0]] <= min(
                loads[Shape(32, warps)] for warps, places in RESIDENT_BLOCKS.items() if places > 1
            )
            assert loads[chosen[0]] <= 1.3 * min(loads.values())
    assert len(best) > 5


def test_numbers_and_struct_are_those_of_the_header() -> None:
    text = HEADER.read_text()
    assert f"#define MACKO_SLICED_PADDING {MAX_PADDING}\n" in text
    heights = re.search(r"int32_t height; +// rows of a slice, at most (\d+)", text).group(1)
    warps = re.search(r"int32_t warps; +// of the block that multiplies a slice: ([\d, or]+)", text).group(1)
    assert max(HEIGHTS) <= int(heights)
    assert {int(number) for number in re.findall(r"\d+", warps)} == set(RESIDENT_BLOCKS)
    assert {shape.warps for shape in SHAPES} == set(RESIDENT_BLOCKS)
    assert all(blocks * warps <= 48 for warps, blocks in RESIDENT_BLOCKS.items())  # warps that registers last for
    body = re.search(r"typedef struct macko_sliced \{(.*?)\} macko_sliced;", text, re.DOTALL).group(1)
    fields = re.findall(r"^ +(\w+\*?) (\w+);", body, re.MULTILINE)
    assert all(kind == "int32_t" or kind.endswith("*") for kind, _ in fields)
    types = {"int32_t": ctypes.c_int32}
    assert [(name, types.get(kind, ctypes.c_void_p)) for kind, name in fields] == list(SlicedStruct._fields_)
    assert ctypes.sizeof(SlicedStruct) == 5 * ctypes.sizeof(ctypes.c_void_p) + 8 * 4


@st.composite
def uneven_lengths(draw: st.DrawFn) -> tuple[dict[int, list[int]], list[int]]:
    """Entries of some rows at both widths, about alike or so far apart that the padding is just too long; whose they are."""
    member_rows = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = {}
    for bits in DELTA_BITS:
        middle, spread = draw(st.integers(0, 4000)), draw(st.sampled_from([0, 1, 17, 200, 241, 257, 300]))
        lengths[bits] = [int(length) for length in middle + generator.integers(0, spread + 1, sum(member_rows))]
        if draw(st.booleans()):  # members that differ need no padding for it
            firsts = np.repeat(generator.integers(0, 3000, len(member_rows)), member_rows)
            lengths[bits] = [int(length) for length in firsts + lengths[bits]]
    return lengths, member_rows


def alone(*lengths: int) -> tuple[dict[int, list[int]], list[int]]:
    return {bits: list(lengths) for bits in DELTA_BITS}, [len(lengths)]


@given(
    rows=uneven_lengths(),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    dtype=st.sampled_from(HALVES),
    reference=st.sampled_from(DELTA_BITS),
    overhead=st.sampled_from([0.5, 1.0, 1.0499, 1.05, 1.0501, 2.0]),
)
@example(alone(*[256] * 7, 0), [LOW], torch.float16, 2, 1.0)  # padded just as far as allowed
@example(alone(*[257] * 7, 1), [LOW], torch.float16, 2, 1.0)  # 4 bits pad less than 2
@example(alone(*[257] * 7, 0), [LOW], torch.float16, 2, 1.0)  # too far
@example(alone(*[0] * 9), [LOW], torch.bfloat16, 4, 1.0)
@example(alone(*[600] * 8, *[0] * 8), [Shape(32, 32), LOW], torch.float16, 2, 0.5)  # the second fits
@example((alone(*[600] * 8, *[0] * 8)[0], [8, 8]), [Shape(32, 32)], torch.float16, 2, 1.0)  # each by itself fits
@settings(max_examples=300, deadline=None)
def test_plans_are_those_of_a_naive_planner(
    rows: tuple[dict[int, list[int]], list[int]],
    shapes: list[Shape],
    dtype: torch.dtype,
    reference: int,
    overhead: float,
) -> None:
    lengths, member_rows = rows
    units = naive_units(lengths[reference], shapes[-1].height, reference, member_rows)
    canonical = round(buffer_size(array_sizes(member_rows, shapes[-1], reference, sum(units))) / overhead)
    counts = {bits: torch.tensor(lengths[bits], dtype=torch.int32) for bits in DELTA_BITS}
    planned = plan_rows(counts, member_rows, 9999, dtype, shapes, canonical)
    naive = naive_choice(lengths, shapes, canonical, member_rows)
    assert (planned is None) == (naive is None)
    if planned is None or naive is None:
        return
    shape, nbytes, bits, units, slices = naive
    assert planned.plan == SlicedPlan(tuple(member_rows), 9999, dtype, bits, shape, sum(units))
    assert (planned.plan.nbytes, planned.plan.slices) == (nbytes, len(units))
    assert planned.plan.nbytes <= MAX_OVERHEAD * canonical
    assert planned.unit_offsets.dtype == planned.row_order.dtype == torch.int32
    assert planned.unit_offsets.tolist() == [sum(units[:slice_]) for slice_ in range(len(units) + 1)]
    assert planned.row_order.tolist() == [row for rows_of_slice in slices for row in rows_of_slice]


def test_the_overhead_is_counted_to_the_byte() -> None:
    lengths = {2: [2000] * 64, 4: [1500] * 64}
    counts = {bits: torch.tensor(row_counts, dtype=torch.int32) for bits, row_counts in lengths.items()}
    nbytes = min(
        buffer_size(array_sizes([64], LOW, bits, 8 * naive_units(lengths[bits], 8, bits)[0])) for bits in counts
    )
    least = divided_up(nbytes * 100, 105)  # canonical bytes with which the layout is just good enough
    assert plan_rows(counts, [64], 4096, torch.float16, [LOW], least).plan.nbytes == nbytes
    assert plan_rows(counts, [64], 4096, torch.float16, [LOW], least - 1) is None


@pytest.mark.parametrize(("sparsity", "bits"), [(0.1, 2), (0.5, 2), (0.7, 4), (0.95, 4)])
def test_the_width_suits_the_sparsity(sparsity: float, bits: int) -> None:
    weight = random_matrix(64, 8000, sparsity, torch.float16)
    counts = {width: torch.tensor(row_lengths(weight, width), dtype=torch.int32) for width in DELTA_BITS}
    planned = plan_rows(counts, [64], 8000, torch.float16, [LOW], 10**9)
    assert planned.plan.delta_bits == bits


@given(
    member_rows=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    units=st.integers(0, 10**6),
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from(DELTA_BITS),
    dtype=st.sampled_from(HALVES),
)
@settings(deadline=None)
def test_arrays_lie_one_behind_the_other_and_aligned(
    member_rows: list[int], units: int, shape: Shape, bits: int, dtype: torch.dtype
) -> None:
    plan = SlicedPlan(tuple(member_rows), 100, dtype, bits, shape, units)
    assert plan.rows == sum(member_rows)
    assert list(plan.array_nbytes) == array_sizes(member_rows, shape, bits, units)
    end = 0
    for offset, nbytes in zip(plan.array_offsets, plan.array_nbytes, strict=True):
        assert offset % 256 == 0
        assert end <= offset < end + 256
        end = offset + nbytes
    assert plan.nbytes == end


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


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_the_struct_says_what_the_matrix_is(dtype: torch.dtype, code: int) -> None:
    matrix = make(dtype)
    assert len(matrix.data) == matrix.plan.nbytes
    pointers = dict(zip(list(fields(matrix))[:5], matrix.plan.array_offsets, strict=True))
    numbers = {"rows": 37, "cols": 172, "slices": 2, "first_row": 0}
    numbers |= {"value_dtype": code, "delta_bits": 2, "height": 28, "warps": 16}
    assert fields(matrix) == {**{name: matrix.data.data_ptr() + at for name, at in pointers.items()}, **numbers}
    assert matrix.address == matrix.address == ctypes.addressof(matrix.struct)
    assert fields(matrix.members[0]) == fields(matrix)  # a lone matrix is a group of one


def test_members_have_the_slices_behind_those_of_the_ones_before() -> None:
    group = make(member_rows=(57, 1, 28))
    whole, last = fields(group), fields(group.members[2])
    assert (whole["rows"], whole["slices"], whole["first_row"]) == (86, 5, 0)
    assert (last["rows"], last["slices"], last["first_row"]) == (28, 1, 58)
    apart = {"starts": 4 * 28 * 16 * 2, "unit_offsets": 4 * 4, "row_order": 4 * 28 * 4}
    assert {name: last[name] - whole[name] for name in apart} == apart
    same = ("values", "deltas", "cols", "value_dtype", "delta_bits", "height", "warps")
    assert all(last[name] == whole[name] for name in same)
    assert [member.rows for member in group.members] == [57, 1, 28]
    assert group.rows == 86


GROUPS = [(37,), (1,), (1, 1, 1), (32, 32, 32), (33, 7, 65), (64, 16, 16), (3, 0, 5), (0, 9), (100, 100)]


@given(
    member_rows=st.sampled_from(GROUPS) | st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any).map(tuple),
    cols=st.sampled_from([1, 16, 17, 172]) | st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from(DELTA_BITS),
    empty=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example((4096, 1024, 1024), 24, 0.5, torch.float16, Shape(20, 12), 2, True, 0)  # grouped query attention
@settings(max_examples=100, deadline=None)
def test_a_group_and_its_members_are_the_dense_matrices(
    member_rows: tuple[int, ...],
    cols: int,
    sparsity: float,
    dtype: torch.dtype,
    shape: Shape,
    bits: int,
    empty: bool,
    seed: int,
) -> None:
    weight = random_matrix(sum(member_rows), cols, sparsity, dtype, seed) + 0.0  # no negative zeros
    if empty:
        weight[:: max(member_rows) // 2 + 1] = 0
    group = make(dtype, member_rows, shape, bits, weight=weight)
    expected = patterns(weight)
    assert np.array_equal(
        decode(group.data.numpy(), member_rows, cols, shape, bits, group.plan.units),
        expected,
    )
    assert np.array_equal(decode_struct(group), expected)
    ends = np.cumsum(member_rows)
    for member, own in zip(group.members, np.split(expected, ends[:-1]), strict=True):
        assert member.data is group.data
        assert np.array_equal(decode_struct(member), own)


def test_the_planners_order_is_the_encoders() -> None:
    """From the lengths of the rows alone, the two small arrays of a group are those that the naive encoder writes."""
    member_rows, shape = (33, 7, 65), Shape(20, 24)
    group = make(torch.float16, member_rows, shape)
    counts = torch.tensor(row_lengths(random_matrix(105, 172, 0.5, torch.float16), 2), dtype=torch.int32)
    planned = plan_rows({2: counts}, member_rows, 172, torch.float16, [shape], 10**9)
    assert planned.plan == group.plan
    for offset, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order), strict=True):
        assert torch.equal(group.data[offset : offset + array.nbytes], array.view(torch.uint8))


@pytest.mark.parametrize("multiprocessors", [14, 132])
def test_shapes_count_the_slices_of_each_member(multiprocessors: int) -> None:
    """A member's last slice may be nearly empty: many small members need more places than their rows in one matrix."""
    assert choose_shapes([4096, 0], multiprocessors) == choose_shapes([4096], multiprocessors)
    assert choose_shapes([32] * 128, multiprocessors) != choose_shapes([4096], multiprocessors)
    for members in ([33] * 132, [9] * 264, [4096, 1024, 1024]):
        best = choose_shapes(members, multiprocessors)[0]
        slices = sum(divided_up(rows, best.height) for rows in members)
        places = multiprocessors * RESIDENT_BLOCKS[best.warps]
        least = min(
            divided_up(sum(divided_up(rows, height) for rows in members), multiprocessors * resident)
            * resident
            * height
            for height in HEIGHTS
            for resident in RESIDENT_BLOCKS.values()
        )
        busiest = divided_up(slices, places) * RESIDENT_BLOCKS[best.warps] * best.height
        assert busiest <= 1.3 * least


@pytest.mark.parametrize("member", [None, 0, 2])
def test_the_numbers_of_an_op_are_the_matrix(member: int | None) -> None:
    group = make(member_rows=(5, 1, 9))
    matrix = group if member is None else group.members[member]
    assert all(type(number) is int for number in matrix.numbers)
    twin = SlicedMatrix.from_numbers(group.data, torch.bfloat16, matrix.numbers)
    assert (twin.plan, twin.member) == (matrix.plan, matrix.member)
    assert fields(twin) == fields(matrix)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_copies_have_a_struct_of_their_own(remake: Callable[[SlicedMatrix], SlicedMatrix]) -> None:
    for matrix in (make(), make(member_rows=(5, 9, 1)).members[1]):
        before = fields(matrix)  # fills the cached struct
        assert "struct" not in matrix.__getstate__()
        twin = remake(matrix)
        assert not {"struct", "address"} & set(vars(twin))
        assert (twin.plan, twin.member) == (matrix.plan, matrix.member)
        assert torch.equal(twin.data, matrix.data)
        assert twin.data.data_ptr() != matrix.data.data_ptr()
        assert fields(twin)["values"] == twin.data.data_ptr()
        assert np.array_equal(decode_struct(twin), decode_struct(matrix))
        assert fields(matrix) == before


def test_a_copy_of_a_layers_parts_shares_memory_as_the_parts_do() -> None:
    group = make(member_rows=(5, 9))
    *twins, data = copy.deepcopy((*group.members, group.data))
    assert all(twin.data is data for twin in twins)
