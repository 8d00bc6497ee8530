"""The sliced layout on a GPU: a naive encoder's bytes, and there and back again."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sliced_helpers import (
    LAYOUTS,
    assert_layout,
    assert_multiplies_whole_numbers,
    certainly_cut,
    cut,
    large_matrix,
    layouts,
)
from sliced_reference import naive_choice, naive_padding, random_matrix, row_lengths
from test_gpu_canonical import GPU, HALVES, MATRICES, arrays, whole_numbers
from test_ops import sparse
from torch import Tensor

from macko_llm import native
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, sliced
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import (
    _MAX_TRIES,
    DELTA_BITS,
    MAX_OVERHEAD,
    MAX_PADDING,
    Shape,
    choose_shapes,
    resident_blocks,
)

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")


@layouts
@pytest.mark.parametrize("name", MATRICES)
def test_layout_of_named_matrices(name: str, shape: Shape, bits: int) -> None:
    for dtype in HALVES:
        weight = MATRICES[name].to(dtype)
        if weight.shape[0] == 0 or weight.shape[1] > 65535:
            assert sliced.arrange(canonical.pack(weight.to(GPU))) is None
            return
        matrix = cut(weight, shape, bits)
        if matrix is None:
            assert naive_padding(row_lengths(weight, bits), shape.height, bits) > MAX_PADDING
            continue
        assert_layout(matrix, weight)
        for tokens in (1, 2, 3, 4, 7):
            assert_multiplies_whole_numbers(matrix, weight, tokens)


@given(
    rows=st.sampled_from([1, 7, 8, 9, 28, 31, 32, 33, 56, 64, 65]) | st.integers(1, 600),
    cols=st.sampled_from([1, 2, 8, 15, 16, 17, 31, 32, 33, 172]) | st.integers(1, 3000),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.97, 0.999, 1.0]),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    tokens=st.integers(1, 9),
    uneven=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(33, 172, 0.5, torch.float16, (Shape(32, 32), 2), 1, False, 0)
@example(57, 3000, 0.97, torch.bfloat16, (Shape(28, 16), 4), 4, False, 0)
@example(9, 250, 0.5, torch.bfloat16, (Shape(5, 8), 4), 2, True, 0)
@settings(max_examples=50, deadline=None)
def test_layout_and_products_of_any_matrix(
    rows: int,
    cols: int,
    sparsity: float,
    dtype: torch.dtype,
    layout: tuple[Shape, int],
    tokens: int,
    uneven: bool,
    seed: int,
) -> None:
    weight = (sparse if uneven else random_matrix)(rows, cols, sparsity, dtype, seed)
    matrix = cut(weight, *layout)
    if matrix is None:
        assert naive_padding(row_lengths(weight, layout[1]), layout[0].height, layout[1]) > MAX_PADDING
        return
    assert_layout(matrix, weight)
    assert_multiplies_whole_numbers(certainly_cut(weight.sign(), *layout), weight.sign(), tokens)


def assert_arranges_or_not(weight: Tensor) -> SlicedMatrix | None:
    """Arranged exactly if the naive planner would, into its bytes; and there and back again is nothing lost."""
    gpu = torch.cuda.get_device_properties(GPU)
    multiprocessors = gpu.multi_processor_count
    resident = resident_blocks(weight.shape[1], (gpu.major, gpu.minor), gpu.shared_memory_per_multiprocessor)
    stored = canonical.pack(weight.to(GPU))
    matrix = sliced.arrange(stored)
    naive = None
    if len(weight) and weight.shape[1] <= native.library().macko_cuda_sliced_max_cols(0):
        lengths = {bits: row_lengths(weight, bits) for bits in DELTA_BITS}
        naive = naive_choice(
            lengths, choose_shapes([len(weight)], multiprocessors, resident)[:_MAX_TRIES], stored.nbytes
        )
    assert (matrix is None) == (naive is None)
    if matrix is not None and naive is not None:
        assert (matrix.plan.shape, matrix.plan.nbytes, matrix.plan.delta_bits) == naive[:3]
        assert matrix.data.nbytes == matrix.plan.nbytes <= MAX_OVERHEAD * stored.nbytes
        assert_layout(matrix, weight)
        restored = matrix.canonical()
        assert restored.shape == stored.shape
        for array, expected in zip(arrays(restored), arrays(stored), strict=True):
            assert array.dtype == expected.dtype
            assert torch.equal(array.view(torch.uint8), expected.view(torch.uint8))
    if len(weight):
        integers = canonical.pack(weight.to(GPU).sign())
        for tokens in (1, 3, 9):
            assert_multiplies_whole_numbers(sliced.arrange(integers) or integers, weight.sign(), tokens)
    return matrix


@given(
    rows=st.integers(0, 600),
    cols=st.integers(1, 3000),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
@example(rows=64, cols=2048, sparsity=0.5, dtype=torch.float16, seed=0)
@settings(max_examples=20, deadline=None)
def test_arranging_any_matrix(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int) -> None:
    assert_arranges_or_not(random_matrix(rows, cols, sparsity, dtype, seed))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MATRICES)
def test_arranging_named_matrices(name: str, dtype: torch.dtype) -> None:
    matrix = assert_arranges_or_not(MATRICES[name].to(dtype))
    if name in ("no rows", "one element", "all zero", "very wide", "a full row among empty ones"):
        assert matrix is None


@pytest.mark.parametrize(
    ("rows", "cols", "sparsity", "suits"),
    [
        (1024, 4096, 0.5, True),
        (4096, 4096, 0.5, True),
        (11008, 4096, 0.5, True),
        (12288, 1024, 0.3, True),
        (40, 65535, 0.5, True),
        (5, 65536, 0.5, False),
        (7, 131072, 0.5, False),
    ],
)
def test_arranging_large_matrices(rows: int, cols: int, sparsity: float, suits: bool) -> None:
    if suits and cols > native.library().macko_cuda_sliced_max_cols(0):
        suits = False  # a GPU with less shared memory
    matrix = assert_arranges_or_not(large_matrix(rows, cols, sparsity, torch.float16))
    assert (matrix is not None) == suits


def test_arranged_memory_is_written_before_anything_multiplies_it() -> None:
    """On a side stream too, where the canonical arrays come late."""
    weight = random_matrix(1024, 2048, 0.5, torch.float16).sign()
    stored = canonical.pack(weight.to(GPU))
    late = torch.zeros_like(stored.values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(50_000_000)
        late.copy_(stored.values)
        matrix = sliced.arrange(MackoMatrix(late, stored.deltas, stored.row_offsets, stored.shape))
    assert matrix is not None
    x = whole_numbers(1, 2048)
    y = matrix.linear(x.to(GPU, torch.float16), None)
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)
    assert_layout(matrix, weight)
