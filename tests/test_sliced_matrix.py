"""Sliced matrices in memory: structs, groups and their members, copies, as naive decoders read them."""

import copy
import ctypes
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sliced_reference import GROUPS, HALVES, SHAPES, decode, decode_struct, fields, make, patterns, random_matrix

from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import DELTA_BITS, Shape


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
