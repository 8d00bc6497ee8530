"""Slices of packed matrices, against packing the slice of the dense matrix with the specification in plain torch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macko_llm import format as spec
from macko_llm.errors import FormatError, UsageError
from macko_llm.format import MackoMatrix
from macko_llm.slicing import slice_columns, slice_rows, stack_rows


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Dense matrices with empty rows, odd numbers of entries and gaps that take bridges."""
    rows, cols = draw(st.integers(0, 9)), draw(st.integers(1, 90))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=rows, max_size=rows)))
    kept = torch.rand(rows, cols, generator=generator) < density.reshape(rows, 1)
    return torch.randn(rows, cols, generator=generator).masked_fill(~kept, 0).to(dtype)


def same_bytes(ours: MackoMatrix, expected: MackoMatrix) -> bool:
    return ours.shape == expected.shape and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(
            (ours.values, ours.deltas, ours.row_offsets),
            (expected.values, expected.deltas, expected.row_offsets),
            strict=True,
        )
    )


@given(matrices(), st.data())
@settings(max_examples=300, deadline=None)
def test_rows_are_the_bytes_that_packing_those_rows_gives(weight: torch.Tensor, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(weight)), st.integers(0, len(weight)))))
    sliced = slice_rows(spec.pack(weight), start, stop)
    assert same_bytes(sliced, spec.pack(weight[start:stop]))
    spec.validate(sliced)


@given(matrices(), st.data())
@settings(max_examples=300, deadline=None)
def test_columns_are_the_bytes_that_packing_those_columns_gives(weight: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, weight.shape[1] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[1]))
    sliced = slice_columns(spec.pack(weight), start, stop)
    assert same_bytes(sliced, spec.pack(weight[:, start:stop]))
    spec.validate(sliced)


@given(matrices(), st.lists(st.integers(0, 9), max_size=4))
@settings(max_examples=300, deadline=None)
def test_stacked_matrices_are_the_bytes_that_packing_the_stacked_rows_gives(
    weight: torch.Tensor, cuts: list[int]
) -> None:
    ends = sorted(min(cut, len(weight)) for cut in cuts)
    parts = [spec.pack(weight[start:stop]) for start, stop in pairwise([0, *ends, len(weight)])]
    stacked = stack_rows(parts)
    assert same_bytes(stacked, spec.pack(weight))
    spec.validate(stacked)


def test_matrices_that_do_not_stack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = spec.pack(torch.ones(2, 4, dtype=torch.float16))
    for other in (torch.ones(2, 5, dtype=torch.float16), torch.ones(2, 4, dtype=torch.bfloat16)):
        with pytest.raises(UsageError, match="one width, dtype and device"):
            stack_rows([matrix, spec.pack(other)])
    monkeypatch.setattr(spec, "MAX_ENTRIES", 15)
    with pytest.raises(FormatError, match="a 4 x 4 matrix with 16 entries"):
        stack_rows([matrix, matrix])


def test_arrays_that_no_writer_would_produce_are_sliced_to_valid_ones_of_the_same_matrix() -> None:
    matrix = MackoMatrix(  # entries that are zero of either sign, one of them the last of its row
        torch.tensor([-0.0, 1, 0, 2, 0, 3, 0, 0], dtype=torch.float16),
        torch.tensor([0x10, 0x00, 0x05, 0x00], dtype=torch.uint8),
        torch.tensor([0, 3, 5, 6], dtype=torch.int32),
        (3, 8),
    )
    spec.validate(matrix)
    dense = spec.unpack(matrix)
    for start, stop in [(0, 1), (1, 2), (1, 3), (2, 3)]:
        sliced = slice_rows(matrix, start, stop)
        spec.validate(sliced)
        assert torch.equal(spec.unpack(sliced), dense[start:stop])
        assert same_bytes(slice_columns(matrix, start, stop), spec.pack(dense[:, start:stop]))


def test_a_slice_does_not_share_the_matrix_s_memory() -> None:
    matrix = spec.pack(torch.ones(4, 16, dtype=torch.float16))
    for sliced in (slice_rows(matrix, 0, 4), slice_columns(matrix, 0, 16)):
        for array in (sliced.values, sliced.deltas, sliced.row_offsets):
            array.zero_()
    assert same_bytes(matrix, spec.pack(torch.ones(4, 16, dtype=torch.float16)))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 5), (3, 2)])
def test_rows_and_columns_that_are_not_there_are_refused(start: int, stop: int) -> None:
    matrix = spec.pack(torch.ones(4, 4, dtype=torch.float16))
    with pytest.raises(UsageError, match="take them from 0:4"):
        slice_rows(matrix, start, stop)
    with pytest.raises(UsageError, match="take at least one from 0:4"):
        slice_columns(matrix, start, stop)


def test_a_matrix_without_columns_is_refused() -> None:
    with pytest.raises(UsageError, match="Columns 2:2"):
        slice_columns(spec.pack(torch.ones(4, 4, dtype=torch.float16)), 2, 2)
