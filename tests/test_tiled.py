"""The tiled layout without a GPU: plans, bytes as a naive encoder and decoder see them, structs, fakes."""

import copy
import ctypes
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sliced_reference import HALVES, patterns, random_matrix
from tiled_reference import cut_rows, decode, decode_struct, encode_record, make

from macko_llm import native
from macko_llm.layouts import canonical, tiled
from macko_llm.layouts.tiled import TILED_SPMM_MAX_TOKENS, TiledGroup, TiledMatrix
from macko_llm.layouts.tiled_plan import MAX_COLS, MAX_TILES, TILE_COLUMNS, TILE_ROWS, UNIT_BYTES, choose_strips
from macko_llm.native import TiledStruct

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def fields(matrix: TiledMatrix) -> dict[str, int]:
    return {name: getattr(matrix.struct, name) for name, _ in TiledStruct._fields_}


def test_a_record_by_hand() -> None:
    """Of one tile: two values in a row's first 4 columns, one 8 columns on, one in the second step, one in another word."""
    tile = np.zeros((1, 8, 64), np.uint16)
    tile[0, 0, 1], tile[0, 0, 3], tile[0, 0, 8] = 0x3C00, 0x4000, 0x4200
    tile[0, 1, 4] = 0x4400  # row 1: the word's fifth lane; columns 4 to 7: the second step
    tile[0, 7, 63] = 0xBC00
    tile[0, 2, 0] = 0x8000  # a negative zero is none
    record = encode_record(tile)
    masks = np.frombuffer(record[:64], np.uint32).reshape(2, 4, 2)  # [halves of the columns][words][steps of a half]
    offsets = np.frombuffer(record[64:96], np.uint16).reshape(2, 4, 2)
    assert masks[0].tolist() == [[1 << 8 | 1 << 24 | 1 << 1, 1 << 4], [0, 0], [0, 0], [0, 0]]
    assert masks[1].tolist() == [[0, 0], [0, 0], [0, 0], [0, 1 << 31]]
    assert offsets[0].tolist() == [[0, 6], [6, 8], [6, 8], [6, 8]]  # the first step's four words, then the second's
    assert offsets[1].tolist() == [[8, 8]] * 4
    assert record[96:] == np.array([0x3C00, 0x4000, 0x4200, 0x4400, 0xBC00, 0, 0, 0], np.uint16).tobytes()


@given(
    rows=st.sampled_from([1, 7, 8, 9, 64, 65, 129]) | st.integers(1, 200),
    cols=st.sampled_from([1, 63, 64, 65, 172]) | st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(HALVES),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@example(64, 128, 0.0, torch.float16, 0.0, 0)
@settings(max_examples=50, deadline=None)
def test_the_decoder_and_the_struct_read_what_the_encoder_writes(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, share: float, seed: int
) -> None:
    weight = random_matrix(rows, cols, sparsity, dtype, seed)
    tiles = -(-rows // 8)
    strips = round(-(-tiles // 8) * (1 - share) + tiles * share)
    matrix = make(weight, strips)
    assert len(matrix.data) == matrix.plan.nbytes
    assert matrix.plan.records == strips * -(-cols // 64)
    expected = patterns(weight + 0.0)  # negative zeros count as zeros
    assert np.array_equal(decode(matrix.data.numpy(), matrix.plan), expected)
    assert np.array_equal(decode_struct(matrix), expected)


@given(rows=st.integers(1, 300_000), multiprocessors=st.integers(1, 160))
@example(4096, 132)
@example(1, 132)
@settings(max_examples=500, deadline=None)
def test_strips_are_spread_evenly(rows: int, multiprocessors: int) -> None:
    (strips,) = choose_strips([rows], multiprocessors)
    cut = cut_rows(rows, strips)
    tiles = [tile for strip in cut for tile in strip]
    assert tiles == [*range(-(-rows // 8))]
    assert {len(strip) for strip in cut} <= {len(cut[-1]), len(cut[-1]) + 1}
    assert 1 <= len(cut[-1]) <= len(cut[0]) <= MAX_TILES
    of_each = [sum(len(strip) for strip in cut[at::multiprocessors]) for at in range(min(multiprocessors, strips))]
    assert max(of_each) == -(-len(tiles) // multiprocessors)  # no cut can do with less


@given(
    member_rows=st.lists(st.integers(1, 60) | st.integers(1, 60_000), min_size=1, max_size=4),
    multiprocessors=st.integers(1, 160),
)
@example([4096, 1024, 1024], 132)
@example([3200, 504, 512], 132)  # the tiles of 132 strips of 4, of which no cut makes more than 131
@settings(max_examples=500, deadline=None)
def test_strips_of_several_matrices_suit_all_together(member_rows: list[int], multiprocessors: int) -> None:
    strips = choose_strips(member_rows, multiprocessors)
    tiles = [-(-rows // TILE_ROWS) for rows in member_rows]
    assert all(-(-of_all // MAX_TILES) <= own <= of_all for of_all, own in zip(tiles, strips, strict=True))
    assert sum(strips) % multiprocessors == 0 or strips == tiles
    highest = max(-(-of_all // own) for of_all, own in zip(tiles, strips, strict=True))
    assert highest <= 4 or (highest == 5 and sum(strips) <= multiprocessors)
    if highest > 1:  # lower ones would be too many
        assert sum(-(-of_all // (highest - 1)) for of_all in tiles) > sum(strips)
    averages = [of_all / own for of_all, own in zip(tiles, strips, strict=True)]
    for average, of_all, own in zip(averages, tiles, strips, strict=True):
        if own > -(-of_all // highest):  # nobody has a strip that would have been of more use to another
            assert of_all / (own - 1) >= max(averages)
            assert average <= highest


@pytest.mark.parametrize(
    ("member_rows", "strips"),
    [
        ([8], [1]),
        ([1024], [128]),
        ([4096], [132]),
        ([5120], [132]),
        ([8192], [2 * 132]),
        ([11008], [3 * 132]),
        ([6144], [2 * 132]),
        ([22016], [6 * 132]),
        ([28672], [7 * 132]),
        ([152064], [36 * 132]),
        ([4096, 4096, 4096], [132, 132, 132]),
        ([4096, 1024, 1024], [176, 44, 44]),
        ([3584, 512, 512], [102, 15, 15]),
        ([11008, 11008], [3 * 132, 3 * 132]),
        ([14336, 14336], [462, 462]),
        ([7, 8, 9], [1, 1, 2]),
    ],
)
def test_strips_of_an_h100(member_rows: list[int], strips: list[int]) -> None:
    assert choose_strips(member_rows, 132) == strips


def test_constants_are_those_of_the_library() -> None:
    header, layout = (SOURCES / "macko.h").read_text(), (SOURCES / "cuda" / "tiled.cuh").read_text()
    assert re.search(r"#define MACKO_TILED_MAX_COLS (\d+)", header).group(1) == str(MAX_COLS)
    assert re.search(r"#define MACKO_TILED_MEMBERS (\d+)", header).group(1) == str(native.TILED_MEMBERS)
    assert re.search(r"#define MACKO_TILED_FEW_TOKENS (\d+)", header).group(1) == str(native.TILED_FEW_TOKENS)
    assert f"kTileRows = {TILE_ROWS}, kTileColumns = {TILE_COLUMNS};" in layout
    assert f"kRecordAlignment = {UNIT_BYTES};" in layout
    assert f"kMaxTiles = {MAX_TILES};" in layout
    declared = re.search(r"typedef struct macko_tiled \{(.*?)\} macko_tiled;", header, re.DOTALL).group(1)
    names = re.findall(r"(\w+);", re.sub(r"//.*", "", declared))
    assert names == [name for name, _ in TiledStruct._fields_]
    assert ctypes.sizeof(TiledStruct) == 2 * 8 + 6 * 4  # five numbers, and the end of the last 8 bytes


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_the_struct_says_what_the_matrix_is(dtype: torch.dtype, code: int) -> None:
    matrix = make(random_matrix(37, 172, 0.5, dtype), 2)
    assert fields(matrix) == {
        "records": matrix.data.data_ptr(),
        "starts": matrix.data.data_ptr() + matrix.plan.starts_offset,
        "rows": 37,
        "cols": 172,
        "strips": 2,
        "record_bytes": matrix.plan.record_bytes,
        "value_dtype": code,
    }
    assert matrix.plan.starts_offset % 256 == 0
    assert matrix.address == ctypes.addressof(matrix.struct)


def test_the_numbers_of_an_op_are_the_matrix() -> None:
    matrix = make(random_matrix(37, 172, 0.5, torch.bfloat16), 3)
    assert all(type(number) is int for number in matrix.numbers)
    twin = TiledMatrix.from_numbers(matrix.data, torch.bfloat16, matrix.numbers)
    assert twin.plan == matrix.plan
    assert fields(twin) == fields(matrix)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_copies_have_a_struct_of_their_own(remake: Callable[[TiledMatrix], TiledMatrix]) -> None:
    matrix = make(random_matrix(37, 172, 0.5, torch.float16), 2)
    before = fields(matrix)  # fills the cached struct
    twin = remake(matrix)
    assert not {"struct", "address"} & set(vars(twin))
    assert twin.plan == matrix.plan
    assert torch.equal(twin.data, matrix.data)
    assert fields(twin)["records"] == twin.data.data_ptr() != matrix.data.data_ptr()
    assert np.array_equal(decode_struct(twin), decode_struct(matrix))
    assert fields(matrix) == before


def test_a_group_is_its_members_structs_one_behind_the_other() -> None:
    members = [make(random_matrix(rows, 172, 0.5, torch.float16), 1) for rows in (37, 7, 64)]
    group = TiledGroup.of(members)
    for held in (group, copy.deepcopy(group)):
        assert len(held.structs) == 3
        for struct, member in zip(held.structs, held.members, strict=True):
            assert {name: getattr(struct, name) for name, _ in TiledStruct._fields_} == fields(member)
    assert (group.dtype, group.few_tokens(torch.float16)) == (torch.float16, TILED_SPMM_MAX_TOKENS)
    assert TiledGroup.of(members[:1]).members == (members[0],)


def test_what_makes_no_group() -> None:
    matrix = make(random_matrix(37, 172, 0.5, torch.float16), 1)
    assert TiledGroup.of([matrix] * native.TILED_MEMBERS) is not None
    assert TiledGroup.of([matrix] * (native.TILED_MEMBERS + 1)) is None
    for other in (random_matrix(37, 173, 0.5, torch.float16), random_matrix(37, 172, 0.5, torch.bfloat16)):
        assert TiledGroup.of([matrix, make(other, 1)]) is None


def test_fakes_have_the_shapes_and_dtypes_of_products() -> None:
    matrix = make(random_matrix(37, 172, 0.5, torch.bfloat16), 2)
    arguments = matrix.data.to("meta"), None, matrix.dtype, matrix.numbers
    x = torch.empty(5, 172, dtype=torch.bfloat16, device="meta")
    y = torch.ops.macko.tiled_spmm(x, *arguments)
    assert (y.shape, y.dtype, y.device.type) == ((5, 37), torch.bfloat16, "meta")
    y = torch.ops.macko.tiled_linear(x.float().view(5, 1, 172), *arguments)
    assert (y.shape, y.dtype) == ((5, 1, 37), torch.float32)
    weight = torch.ops.macko.tiled_unpack(arguments[0], matrix.dtype, matrix.numbers)
    assert (weight.shape, weight.dtype, weight.device.type) == ((37, 172), torch.bfloat16, "meta")


def test_gradients_pass_through_the_fakes() -> None:
    matrix = make(random_matrix(37, 172, 0.5, torch.float16), 2)
    x = torch.empty(2, 3, 172, dtype=torch.float16, device="meta", requires_grad=True)
    bias = torch.empty(37, dtype=torch.float16, device="meta", requires_grad=True)
    y = torch.ops.macko.tiled_linear(x, matrix.data.to("meta"), bias, matrix.dtype, matrix.numbers)
    y.sum().backward()
    assert (x.grad.shape, bias.grad.shape) == (x.shape, bias.shape)


@pytest.mark.parametrize("dtype", HALVES)
def test_tokens_of_its_own_dtype_alone_are_few(dtype: torch.dtype) -> None:
    matrix = make(random_matrix(8, 64, 0.5, dtype), 1)
    assert matrix.few_tokens(dtype) == TILED_SPMM_MAX_TOKENS
    assert {matrix.few_tokens(other) for other in {*HALVES, torch.float32, torch.float64} - {dtype}} == {0}
    assert (matrix.shape, matrix.dtype) == ((8, 64), dtype)


def test_a_cpu_has_no_tiles() -> None:
    assert tiled.arrange(canonical.pack(random_matrix(64, 64, 0.5, torch.float16))) is None
