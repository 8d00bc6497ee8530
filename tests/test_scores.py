"""The maths of pruning against definitions written out as loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from macko_llm.pruning.scores import (
    column_sums,
    lowest,
    magnitude_scores,
    removed_per_row,
    ria_scores,
    select,
    squared_norms,
    wanda_scores,
)


@st.composite
def score_rows(draw: st.DrawFn) -> list[list[int]]:
    """Rows of equal length with few distinct values: ties everywhere."""
    cols = draw(st.integers(1, 24))
    row = st.lists(st.integers(0, 3), min_size=cols, max_size=cols)
    return draw(st.lists(row, min_size=1, max_size=4))


def _first_of_sorted(row: list[int], count: int) -> list[bool]:
    chosen = sorted(range(len(row)), key=lambda column: (row[column], column))[:count]
    return [column in chosen for column in range(len(row))]


@given(score_rows(), st.data())
def test_lowest_takes_ties_from_the_left(rows: list[list[int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(rows[0])))
    marked = lowest(torch.tensor(rows, dtype=torch.float32), count)
    assert marked.tolist() == [_first_of_sorted(row, count) for row in rows]


@given(st.integers(1, 3), st.integers(1, 5), st.data())
def test_groups_lose_their_n_lowest(rows: int, groups: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 8))
    n = data.draw(st.integers(1, m - 1))
    size = groups * m
    row = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    scores = data.draw(st.lists(row, min_size=rows, max_size=rows))
    expected = [[gone for at in range(0, size, m) for gone in _first_of_sorted(one[at : at + m], n)] for one in scores]
    assert select(torch.tensor(scores, dtype=torch.float32), 0.123, (n, m)).tolist() == expected


@given(score_rows(), st.floats(0, 1, exclude_max=True))
def test_unstructured_loses_the_share_of_each_row(rows: list[list[int]], sparsity: float) -> None:
    marked = select(torch.tensor(rows, dtype=torch.float32), sparsity, None)
    assert marked.tolist() == [_first_of_sorted(row, int(len(row) * sparsity)) for row in rows]


def test_infinite_scores_are_the_highest() -> None:
    scores = torch.tensor([[torch.inf, 1.0, torch.inf, 0.0]])
    assert lowest(scores, 3).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize(
    ("cols", "sparsity", "group", "removed"),
    [(172, 0.5, None, 86), (128, 0.6, None, 76), (5, 0.5, None, 2), (1, 0.9, None, 0), (64, 0.25, (1, 4), 16)],
)
def test_removed_per_row(cols: int, sparsity: float, group: tuple[int, int] | None, removed: int) -> None:
    assert removed_per_row(cols, sparsity, group) == removed


def test_wanda_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.0, 0.5]], dtype=torch.float16)
    scores = wanda_scores(weight, torch.tensor([4.0, 9.0, 0.0]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[2.0, 6.0, 0.0], [8.0, 0.0, 0.0]]


def test_ria_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [-1.0, 0.0]], dtype=torch.float16)
    scores = ria_scores(weight, column_sums(weight), torch.tensor([16.0, 81.0]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[(1 / 2 + 1 / 4) * 2, (3 / 3 + 3 / 4) * 3], [(1 / 2 + 1) * 2, 0.0]]
    assert column_sums(torch.full((3, 1), 60000.0, dtype=torch.float16)).tolist() == [180000.0]


def test_ria_scores_of_rows_and_columns_of_zeros_are_zero() -> None:
    weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert ria_scores(weight, column_sums(weight), torch.ones(2)).tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_scores_are_computed_in_fp32() -> None:
    weight = torch.tensor([[60000.0, 6e-8]], dtype=torch.float16)
    assert wanda_scores(weight, torch.tensor([1e8, 1e-10])).isfinite().all()  # 6e8 would overflow fp16
    assert wanda_scores(weight, torch.tensor([1.0, 1e-10]))[0, 1] > 0  # 6e-13 would vanish in fp16


def test_magnitude_ignores_the_sign() -> None:
    scores = magnitude_scores(torch.tensor([[-3.0, 2.0, -0.0]], dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[3.0, 2.0, 0.0]]


@pytest.mark.parametrize("shape", [(3,), (6, 3), (1, 6, 3), (2, 3, 3), (2, 1, 3, 3)])
def test_squared_norms_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    inputs = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    expected = [sum(value**2 for value in inputs.flatten().tolist()[column::3]) for column in range(3)]
    assert squared_norms(inputs).tolist() == expected


def test_squared_norms_do_not_overflow_half_precision() -> None:
    assert squared_norms(torch.full((4, 1), 300.0, dtype=torch.float16)).tolist() == [360000.0]
