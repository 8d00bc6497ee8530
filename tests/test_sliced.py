"""The sliced layout's plans and arithmetic, and the layout itself as a naive encoder writes it and a naive decoder reads it."""

import copy
import ctypes
import re
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


def array_sizes(rows: int, shape: Shape, bits: int, units: int) -> list[int]:
    """Bytes of values, deltas, starts, unit offsets and row order: csrc/macko.h in numbers."""
    slices = divided_up(rows, shape.height)
    values = units * (32 // bits // 8) * shape.height * 8 * 2
    return [values, units * shape.height * 4, slices * shape.warps * shape.height * 2, (slices + 1) * 4, rows * 4]


def buffer_size(sizes: list[int]) -> int:
    return sum(divided_up(size, 256) * 256 for size in sizes[:-1]) + sizes[-1]


def naive_order(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def naive_units(lengths: list[int], height: int, bits: int) -> list[int]:
    """Units of each slice: as many as its longest row needs."""
    ordered = [lengths[row] for row in naive_order(lengths)]
    return [divided_up(max(ordered[at : at + height]), 32 // bits) for at in range(0, len(ordered), height)]


def naive_padding(lengths: list[int], height: int, bits: int) -> int:
    """Most zeros at the end of a row."""
    units = naive_units(lengths, height, bits)
    return max(units[i // height] * (32 // bits) - lengths[row] for i, row in enumerate(naive_order(lengths)))


def naive_choice(lengths: dict[int, list[int]], shapes: list[Shape], canonical_nbytes: int) -> tuple | None:
    """Shape, bytes, width, units of the slices and row order: of the first shape that is good enough, the fewer bytes."""
    for shape in shapes:
        choices = []
        for bits, of_rows in sorted(lengths.items()):
            units = naive_units(of_rows, shape.height, bits)
            nbytes = buffer_size(array_sizes(len(of_rows), shape, bits, sum(units)))
            if naive_padding(of_rows, shape.height, bits) <= 256 and nbytes <= 1.05 * canonical_nbytes:
                choices.append((nbytes, bits, units, naive_order(of_rows)))
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


def encode(weight: Tensor, shape: Shape, bits: int) -> np.ndarray:
    """The buffer [nbytes] uint8 of a matrix with at least one row."""
    (rows, cols), (height, warps), entries = weight.shape, (shape.height, shape.warps), 32 // bits
    encoded = [row_entries(row, bits) for row in patterns(weight)]
    order = naive_order([len(values) for values, _ in encoded])
    units = naive_units([len(values) for values, _ in encoded], height, bits)
    offsets = np.cumsum([0, *units])
    values = np.zeros((offsets[-1], entries // 8, height, 8), np.uint16)
    words = np.zeros((offsets[-1], height), np.uint32)
    starts = np.zeros((len(units), warps, height), np.uint16)
    for position, row in enumerate(order):
        slice_, place = divmod(position, height)
        count = units[slice_] * entries
        row_values, row_deltas = (np.zeros(count, kind) for kind in (np.uint16, np.int64))
        row_values[: len(encoded[row][0])], row_deltas[: len(encoded[row][1])] = encoded[row]
        span = slice(offsets[slice_], offsets[slice_ + 1])
        values[span, :, place] = row_values.reshape(-1, entries // 8, 8)
        words[span, place] = (row_deltas.reshape(-1, entries) << (bits * np.arange(entries))).sum(axis=1)
        reached = np.cumsum([0, *(row_deltas + 1)])
        starts[slice_, :, place] = np.minimum(reached[share_begins(units[slice_], warps) * entries], cols)
    arrays = [values, words, starts, offsets.astype(np.int32), np.array(order, np.int32)]
    sizes = array_sizes(rows, shape, bits, int(offsets[-1]))
    assert [array.nbytes for array in arrays] == sizes
    buffer = np.zeros(buffer_size(sizes), np.uint8)
    at = 0
    for array in arrays:
        buffer[at : at + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        at += divided_up(array.nbytes, 256) * 256
    return buffer


def decode(buffer: np.ndarray, rows: int, cols: int, shape: Shape, bits: int, units: int) -> np.ndarray:
    """The [rows, cols] bit patterns of a buffer, read as SpMV reads it: each warp its share, from the column in `starts`."""
    height, entries, slices = shape.height, 32 // bits, divided_up(rows, shape.height)
    arrays, at = [], 0
    for size, kind in zip(array_sizes(rows, shape, bits, units), ("u2", "u4", "u2", "i4", "i4"), strict=True):
        arrays.append(buffer[at : at + size].view(kind))
        at += divided_up(size, 256) * 256
    values = arrays[0].reshape(units, entries // 8, height, 8).transpose(0, 2, 1, 3).reshape(units, height, entries)
    words, starts = arrays[1].reshape(units, height), arrays[2].reshape(slices, shape.warps, height)
    offsets, order = arrays[3], arrays[4]
    assert offsets[0] == 0
    assert offsets[-1] == units
    assert sorted(order) == list(range(rows))
    weight = np.zeros((rows, cols), np.uint16)
    seen = np.zeros((rows, cols), bool)
    for slice_ in range(slices):
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
        position = slice_ * height + place
        real = position < rows
        assert not own[place[~real], entry[~real]].any()  # places without a row hold nothing
        row, column = order[position[real]], columns[place[real], entry[real]]
        assert not seen[row, column].any()
        seen[row, column] = True
        weight[row, column] = own[place[real], entry[real]]
    return weight


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
    assert two_bits[1280:].view(np.int32).tolist() == [2, 0, 1]
    assert np.array_equal(decode(two_bits, 3, 40, Shape(8, 32), 2, 1), patterns(weight))


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
    assert np.array_equal(decode(encode(weight, shape, bits), rows, cols, shape, bits, units), patterns(weight))


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
    assert choose_shapes(rows, H200)[0] == Shape(height, warps)


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
            chosen = choose_shapes(rows, multiprocessors)
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
    assert ctypes.sizeof(SlicedStruct) == 5 * ctypes.sizeof(ctypes.c_void_p) + 7 * 4 + 4  # padded to a pointer's size


@st.composite
def uneven_lengths(draw: st.DrawFn) -> dict[int, list[int]]:
    """Entries of some rows at both widths: about alike, or so far apart that the padding is just too long."""
    rows = draw(st.integers(1, 100))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = {}
    for bits in DELTA_BITS:
        middle, spread = draw(st.integers(0, 4000)), draw(st.sampled_from([0, 1, 17, 200, 241, 257, 300]))
        lengths[bits] = [int(length) for length in middle + generator.integers(0, spread + 1, rows)]
    return lengths


@given(
    lengths=uneven_lengths(),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    dtype=st.sampled_from(HALVES),
    reference=st.sampled_from(DELTA_BITS),
    overhead=st.sampled_from([0.5, 1.0, 1.0499, 1.05, 1.0501, 2.0]),
)
@example({2: [256] * 7 + [0], 4: [256] * 7 + [0]}, [LOW], torch.float16, 2, 1.0)  # padded just as far as allowed
@example({2: [257] * 7 + [1], 4: [257] * 7 + [1]}, [LOW], torch.float16, 2, 1.0)  # 4 bits pad less than 2
@example({2: [257] * 7 + [0], 4: [257] * 7 + [0]}, [LOW], torch.float16, 2, 1.0)  # too far
@example({2: [0] * 9, 4: [0] * 9}, [LOW], torch.bfloat16, 4, 1.0)
@example(
    {2: [600] * 8 + [0] * 8, 4: [600] * 8 + [0] * 8}, [Shape(32, 32), LOW], torch.float16, 2, 0.5
)  # the second fits
@settings(max_examples=300, deadline=None)
def test_plans_are_those_of_a_naive_planner(
    lengths: dict[int, list[int]], shapes: list[Shape], dtype: torch.dtype, reference: int, overhead: float
) -> None:
    rows = len(lengths[2])
    units = naive_units(lengths[reference], shapes[-1].height, reference)
    canonical = round(buffer_size(array_sizes(rows, shapes[-1], reference, sum(units))) / overhead)
    counts = {bits: torch.tensor(lengths[bits], dtype=torch.int32) for bits in DELTA_BITS}
    planned = plan_rows(counts, rows, 9999, dtype, shapes, canonical)
    naive = naive_choice(lengths, shapes, canonical)
    assert (planned is None) == (naive is None)
    if planned is None or naive is None:
        return
    shape, nbytes, bits, units, order = naive
    assert planned.plan == SlicedPlan(rows, 9999, dtype, bits, shape, sum(units))
    assert (planned.plan.nbytes, planned.plan.slices) == (nbytes, len(units))
    assert planned.plan.nbytes <= MAX_OVERHEAD * canonical
    assert planned.unit_offsets.dtype == planned.row_order.dtype == torch.int32
    assert planned.unit_offsets.tolist() == [sum(units[:slice_]) for slice_ in range(len(units) + 1)]
    assert planned.row_order.tolist() == order


def test_the_overhead_is_counted_to_the_byte() -> None:
    lengths = {2: [2000] * 64, 4: [1500] * 64}
    counts = {bits: torch.tensor(row_counts, dtype=torch.int32) for bits, row_counts in lengths.items()}
    nbytes = min(buffer_size(array_sizes(64, LOW, bits, 8 * naive_units(lengths[bits], 8, bits)[0])) for bits in counts)
    least = divided_up(nbytes * 100, 105)  # canonical bytes with which the layout is just good enough
    assert plan_rows(counts, 64, 4096, torch.float16, [LOW], least).plan.nbytes == nbytes
    assert plan_rows(counts, 64, 4096, torch.float16, [LOW], least - 1) is None


@pytest.mark.parametrize(("sparsity", "bits"), [(0.1, 2), (0.5, 2), (0.7, 4), (0.95, 4)])
def test_the_width_suits_the_sparsity(sparsity: float, bits: int) -> None:
    weight = random_matrix(64, 8000, sparsity, torch.float16)
    counts = {width: torch.tensor(row_lengths(weight, width), dtype=torch.int32) for width in DELTA_BITS}
    planned = plan_rows(counts, 64, 8000, torch.float16, [LOW], 10**9)
    assert planned.plan.delta_bits == bits


@given(
    rows=st.integers(1, 5000),
    units=st.integers(0, 10**6),
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from(DELTA_BITS),
    dtype=st.sampled_from(HALVES),
)
@settings(deadline=None)
def test_arrays_lie_one_behind_the_other_and_aligned(
    rows: int, units: int, shape: Shape, bits: int, dtype: torch.dtype
) -> None:
    plan = SlicedPlan(rows, 100, dtype, bits, shape, units)
    assert list(plan.array_nbytes) == array_sizes(rows, shape, bits, units)
    end = 0
    for offset, nbytes in zip(plan.array_offsets, plan.array_nbytes, strict=True):
        assert offset % 256 == 0
        assert end <= offset < end + 256
        end = offset + nbytes
    assert plan.nbytes == end


def make(dtype: torch.dtype = torch.bfloat16) -> SlicedMatrix:
    """A matrix in memory of the CPU, which nothing multiplies."""
    weight = random_matrix(37, 172, 0.5, dtype)
    units = sum(naive_units(row_lengths(weight, 2), 28, 2))
    plan = SlicedPlan(37, 172, dtype, 2, Shape(28, 16), units)
    return SlicedMatrix(torch.from_numpy(encode(weight, plan.shape, 2)), plan)


def fields(matrix: SlicedMatrix) -> dict[str, int]:
    struct = SlicedStruct.from_address(matrix.address)
    return {name: getattr(struct, name) for name, _ in SlicedStruct._fields_}


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_the_struct_says_what_the_matrix_is(dtype: torch.dtype, code: int) -> None:
    matrix = make(dtype)
    assert len(matrix.data) == matrix.plan.nbytes
    pointers = dict(zip(list(fields(matrix))[:5], matrix.plan.array_offsets, strict=True))
    numbers = {"rows": 37, "cols": 172, "slices": 2, "value_dtype": code, "delta_bits": 2, "height": 28, "warps": 16}
    assert fields(matrix) == {**{name: matrix.data.data_ptr() + at for name, at in pointers.items()}, **numbers}
    assert matrix.address == matrix.address == ctypes.addressof(matrix.struct)


def test_copies_have_a_struct_of_their_own() -> None:
    matrix = make()
    before = fields(matrix)  # fills the cached struct
    assert "struct" not in matrix.__getstate__()
    twin = copy.deepcopy(matrix)
    assert not {"struct", "address"} & set(vars(twin))
    assert twin.plan == matrix.plan
    assert torch.equal(twin.data, matrix.data)
    assert twin.data.data_ptr() != matrix.data.data_ptr()
    assert fields(twin)["values"] == twin.data.data_ptr()
    assert fields(matrix) == before


def test_a_copy_of_a_layers_parts_shares_memory_as_the_parts_do() -> None:
    matrix = make()
    twin, data = copy.deepcopy((matrix, matrix.data))
    assert twin.data is data
