"""The sliced layout's plans and arithmetic, against a naive planner and encoder."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sliced_reference import (
    HALVES,
    LOW,
    SHAPES,
    array_sizes,
    buffer_size,
    decode,
    divided_up,
    encode,
    make,
    naive_choice,
    naive_units,
    patterns,
    random_matrix,
    row_entries,
    row_lengths,
)

from macko_llm import format as spec
from macko_llm.layouts.sliced_plan import (
    DELTA_BITS,
    HEIGHTS,
    MAX_OVERHEAD,
    MAX_PADDING,
    RESIDENT_BLOCKS,
    Shape,
    SlicedPlan,
    choose_shapes,
    plan_rows,
    resident_blocks,
)
from macko_llm.native import SlicedStruct

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "macko.h"
H200 = 132


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
    assert choose_shapes([rows], H200, RESIDENT_BLOCKS)[0] == Shape(height, warps)


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
            chosen = choose_shapes([rows], multiprocessors, RESIDENT_BLOCKS)
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
    assert choose_shapes([4096, 0], multiprocessors, RESIDENT_BLOCKS) == choose_shapes(
        [4096], multiprocessors, RESIDENT_BLOCKS
    )
    assert choose_shapes([32] * 128, multiprocessors, RESIDENT_BLOCKS) != choose_shapes(
        [4096], multiprocessors, RESIDENT_BLOCKS
    )
    for members in ([33] * 132, [9] * 264, [4096, 1024, 1024]):
        best = choose_shapes(members, multiprocessors, RESIDENT_BLOCKS)[0]
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


def test_blocks_that_a_multiprocessor_holds() -> None:
    """As its warps allow (compute capability 7.5 has 32), and its shared memory for x."""
    hopper, turing, ada = ((9, 0), 233472), ((7, 5), 65536), ((8, 9), 102400)
    assert resident_blocks(4096, *hopper) == RESIDENT_BLOCKS
    assert resident_blocks(4096, *ada) == RESIDENT_BLOCKS
    assert resident_blocks(4096, *turing) == {32: 1, 20: 1, 24: 1, 16: 2, 12: 2, 8: 4}
    # The down projection of a 70B model: 57 kB of x a block.
    assert resident_blocks(28672, *hopper) == {32: 1, 20: 1, 24: 2, 16: 3, 12: 3, 8: 3}
    assert resident_blocks(28672, *ada) == dict.fromkeys(RESIDENT_BLOCKS, 1)
    assert choose_shapes([8192], 128, resident_blocks(28672, *ada)) != choose_shapes([8192], 128, RESIDENT_BLOCKS)
