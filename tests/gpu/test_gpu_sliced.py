"""The sliced layout on a GPU: a naive encoder's bytes, float64's products, and good manners on streams and in graphs."""

import copy
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, make_tokenizer, random_tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_gpu_canonical import GPU, HALVES, MATRICES, arrays, signs, whole_numbers
from test_ops import assert_same, assert_within_rounding, every_half, sparse
from test_sliced import (
    SHAPES,
    decode,
    encode,
    naive_choice,
    naive_padding,
    patterns,
    random_matrix,
    row_lengths,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

import macko_llm
from macko_llm import checkpoint, models, native, ops
from macko_llm.errors import FormatError, NativeError
from macko_llm.format import MackoMatrix
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.ops import SLICED_SPMV_MAX_TOKENS, SPMV_MAX_TOKENS
from macko_llm.packing import pack_checkpoint
from macko_llm.sliced import (
    _MAX_TRIES,
    DELTA_BITS,
    MAX_OVERHEAD,
    MAX_PADDING,
    Shape,
    SlicedMatrix,
    choose_shapes,
    plan_rows,
)

TOKENS = range(1, SLICED_SPMV_MAX_TOKENS + 1)
LAYOUTS = [(shape, bits) for shape in SHAPES for bits in DELTA_BITS]
layouts = pytest.mark.parametrize(
    ("shape", "bits"), LAYOUTS, ids=[f"{shape.height}x{shape.warps}-{bits}bit" for shape, bits in LAYOUTS]
)


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if not native.has_cuda():
        pytest.skip("the native library was built without CUDA")


@pytest.fixture(scope="module", autouse=True)
def _full_precision_sums() -> Iterator[None]:
    """Dense products of many tokens: without it cuBLAS may add partial sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


def cut(weight: Tensor, shape: Shape, bits: int, device: torch.device = GPU) -> SlicedMatrix | None:
    """A matrix in this very layout, whatever suits it; None if its rows are too uneven for any."""
    there, (rows, cols) = weight.to(device), weight.shape
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    entries = (there.data_ptr(), rows, cols, bits, counts.data_ptr())
    native._call_cuda("macko_cuda_sliced_entries", (there,), *entries)
    planned = plan_rows({bits: counts}, rows, cols, weight.dtype, [shape], 1 << 40)
    if planned is None:
        return None
    matrix = SlicedMatrix(torch.zeros(planned.plan.nbytes, dtype=torch.uint8, device=device), planned.plan)
    for offset, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order), strict=True):
        matrix.data[offset : offset + array.nbytes] = array.view(torch.uint8)
    native._call_cuda("macko_cuda_sliced_pack", (there, matrix.data), there.data_ptr(), matrix.address)
    torch.cuda.synchronize(device)
    return matrix


def certainly_cut(weight: Tensor, shape: Shape = SHAPES[0], bits: int = 2, device: torch.device = GPU) -> SlicedMatrix:
    matrix = cut(weight, shape, bits, device)
    assert matrix is not None
    return matrix


def arranged(weight: Tensor) -> SlicedMatrix:
    matrix = ops.arrange(ops.pack(weight.to(GPU)))
    assert matrix is not None
    return matrix


def large_matrix(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`random_matrix`, but made on the GPU."""
    generator = torch.Generator(GPU).manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, device=GPU)
    return weight.mul_(torch.rand(rows, cols, generator=generator, device=GPU) >= sparsity).to(dtype)


def spmv(x: Tensor, matrix: SlicedMatrix, bias: Tensor | None) -> Tensor:
    """The op, whatever `ops.linear` would choose."""
    plan = matrix.plan
    numbers = (plan.rows, plan.cols, plan.delta_bits, plan.shape.height, plan.shape.warps, plan.units)
    return torch.ops.macko.sliced_spmv(x, matrix.data, bias, *numbers)


def poison(*sizes: int) -> None:
    """Let the allocator give out memory full of NaN for tensors of these many bytes."""
    blocks = [
        torch.full((max(size // 2, 1),), torch.nan, dtype=torch.float16, device=GPU) for size in sizes for _ in "123"
    ]
    torch.cuda.synchronize()
    del blocks


def assert_layout(matrix: SlicedMatrix, weight: Tensor) -> None:
    """The bytes of the naive encoder; the naive decoder and unpacking give the dense matrix back."""
    plan = matrix.plan
    assert (plan.rows, plan.cols, plan.dtype) == (*weight.shape, weight.dtype)
    assert plan.nbytes == len(matrix.data)
    buffer = matrix.data.cpu().numpy()
    assert np.array_equal(buffer, encode(weight, plan.shape, plan.delta_bits))
    expected = patterns(weight + 0.0)  # negative zeros count as zeros
    decoded = decode(buffer, plan.rows, plan.cols, plan.shape, plan.delta_bits, plan.units)
    assert np.array_equal(decoded, expected)
    poison(weight.nbytes)
    unpacked = native.cuda_sliced_unpack(matrix)
    assert (unpacked.shape, unpacked.dtype, unpacked.device) == (weight.shape, weight.dtype, matrix.data.device)
    assert np.array_equal(patterns(unpacked), expected)


def assert_multiplies_whole_numbers(matrix: SlicedMatrix | MackoMatrix, weight: Tensor, tokens: int) -> None:
    """Every sum is exact in float32, so that y is the exact product rounded once."""
    rows, cols = weight.shape
    x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
    exact = x.to(GPU).double() @ weight.to(GPU).double().T
    poison(tokens * rows * 2)
    cases = [(None, exact), (bias.to(GPU, weight.dtype), exact + bias.to(GPU))]
    few = SLICED_SPMV_MAX_TOKENS if isinstance(matrix, SlicedMatrix) else SPMV_MAX_TOKENS
    if tokens > few and (exact.abs() > 240).any():
        cases = cases[:1]  # torch may add the bias to a product that it has rounded
    for given_bias, expected in cases:
        y = ops.linear(x.to(GPU, weight.dtype), matrix, given_bias)
        assert (y.shape, y.dtype, y.device) == ((tokens, rows), weight.dtype, GPU)
        assert torch.equal(y, expected.to(weight.dtype))


# The layout


@layouts
@pytest.mark.parametrize("name", MATRICES)
def test_layout_of_named_matrices(name: str, shape: Shape, bits: int) -> None:
    for dtype in HALVES:
        weight = MATRICES[name].to(dtype)
        if weight.shape[0] == 0 or weight.shape[1] > 65535:
            assert ops.arrange(ops.pack(weight.to(GPU))) is None
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
    multiprocessors = torch.cuda.get_device_properties(GPU).multi_processor_count
    canonical = ops.pack(weight.to(GPU))
    matrix = ops.arrange(canonical)
    naive = None
    if len(weight) and weight.shape[1] <= native.library().macko_cuda_sliced_max_cols(0):
        lengths = {bits: row_lengths(weight, bits) for bits in DELTA_BITS}
        naive = naive_choice(lengths, choose_shapes(len(weight), multiprocessors)[:_MAX_TRIES], canonical.nbytes)
    assert (matrix is None) == (naive is None)
    if matrix is not None and naive is not None:
        assert (matrix.plan.shape, matrix.plan.nbytes, matrix.plan.delta_bits) == naive[:3]
        assert matrix.data.nbytes == matrix.plan.nbytes <= MAX_OVERHEAD * canonical.nbytes
        assert_layout(matrix, weight)
        restored = ops.restore(matrix)
        assert restored.shape == canonical.shape
        for array, expected in zip(arrays(restored), arrays(canonical), strict=True):
            assert array.dtype == expected.dtype
            assert torch.equal(array.view(torch.uint8), expected.view(torch.uint8))
    if len(weight):
        integers = ops.pack(weight.to(GPU).sign())
        for tokens in (1, 3, 9):
            assert_multiplies_whole_numbers(ops.arrange(integers) or integers, weight.sign(), tokens)
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
    canonical = ops.pack(weight.to(GPU))
    late = torch.zeros_like(canonical.values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(50_000_000)
        late.copy_(canonical.values)
        matrix = ops.arrange(MackoMatrix(late, canonical.deltas, canonical.row_offsets, canonical.shape))
    assert matrix is not None
    x = whole_numbers(1, 2048)
    y = ops.linear(x.to(GPU, torch.float16), matrix, None)
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)
    assert_layout(matrix, weight)


# Products


@layouts
@pytest.mark.parametrize("dtype", HALVES)
def test_whole_numbers_multiply_exactly(dtype: torch.dtype, shape: Shape, bits: int) -> None:
    for rows, cols in ((1, 1), (33, 172), (57, 171), (70, 2056)):
        weight = signs(rows, cols, dtype) if cols < 200 else random_matrix(rows, cols, 0.5, dtype).sign()
        matrix = certainly_cut(weight, shape, bits)
        for tokens in (0, *range(1, 10), 33):
            x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
            exact = x.double() @ weight.double().T
            for product in (spmv, ops.linear):
                poison(tokens * rows * 2)
                y = product(x.to(GPU, dtype), matrix, bias.to(GPU, dtype))
                assert (y.shape, y.dtype, y.device) == ((tokens, rows), dtype, GPU)
                assert torch.equal(y.cpu(), (exact + bias).to(dtype))
            y = ops.linear(x.to(GPU, torch.float32), matrix, bias.to(GPU, torch.float32))
            assert y.dtype == torch.float32
            assert torch.equal(y.cpu(), (exact + bias).float())


@given(
    rows=st.integers(1, 200),
    cols=st.sampled_from([1, 2, 172, 4096]) | st.integers(1, 3000),
    tokens=st.integers(0, 9),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_spmv_is_within_rounding_of_float64(
    rows: int,
    cols: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
    layout: tuple[Shape, int],
    with_bias: bool,
    seed: int,
) -> None:
    weight = random_matrix(rows, cols, sparsity, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    y = spmv(x.to(GPU), certainly_cut(weight, *layout), None if bias is None else bias.to(GPU))
    assert y.shape == (tokens, rows)
    assert_within_rounding(y.cpu(), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_large_products_are_within_rounding_of_float64(dtype: torch.dtype, tokens: int) -> None:
    for rows, cols in ((1024, 4096), (4096, 4096), (11008, 2048), (12288, 1024), (40, 32000)):
        weight = large_matrix(rows, cols, 0.5, dtype)
        matrix, x, bias = arranged(weight), torch.randn(tokens, cols), torch.randn(rows)
        x, bias = x.to(GPU, dtype), bias.to(GPU, dtype)
        assert_within_rounding(ops.linear(x, matrix, bias), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@layouts
@pytest.mark.parametrize("dtype", HALVES)
def test_every_weight_goes_in_and_out_unchanged(dtype: torch.dtype, shape: Shape, bits: int, tokens: int) -> None:
    """Subnormal numbers and the largest ones, too."""
    numbers = every_half(dtype)
    numbers = numbers[numbers.isfinite()]
    rows = -(-len(numbers) // 256)
    weight = torch.zeros(rows, 256 * 5, dtype=dtype)
    weight[:, 4::5] = F.pad(numbers, (0, rows * 256 - len(numbers))).view(rows, 256)
    weight = weight.masked_fill(weight == 0, 1)[:, 4::5].contiguous() if bits == 2 else weight
    matrix = certainly_cut(weight, shape, bits)
    assert_layout(matrix, weight)
    y = torch.cat([spmv(x, matrix, None) for x in torch.eye(weight.shape[1], dtype=dtype, device=GPU).split(tokens)])
    assert_same(y.T.cpu(), weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_activation_goes_in_and_out_unchanged(dtype: torch.dtype) -> None:
    """Also NaN and infinity, which must stay with their token."""
    numbers = every_half(dtype)
    for shape, bits in LAYOUTS:
        one = certainly_cut(torch.ones(1, 1, dtype=dtype), shape, bits)
        assert_same(spmv(numbers[:, None].to(GPU), one, None)[:, 0].cpu(), numbers)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@layouts
def test_activations_that_are_not_finite(shape: Shape, bits: int, bad: float) -> None:
    """They show in each row that uses them, as in a dense product, and in no other token."""
    weight = random_matrix(40, 300, 0.9, torch.float16).sign()
    matrix = certainly_cut(weight, shape, bits)
    for tokens in (1, 2, 3, 4):
        for column in (0, 1, 150, 299):
            x = whole_numbers(tokens, 300).to(torch.float16)
            exact = x.double() @ weight.double().T
            x[-1, column] = bad
            y = ops.linear(x.to(GPU), matrix, None).double().cpu()
            uses = weight[:, column] != 0
            assert torch.equal(y[:-1], exact[:-1])
            assert_same(y[-1, uses], x[-1, column].double() * weight[uses, column].double())
            # In other rows a bridging zero may meet it: NaN, as it is for all of them in a dense product.
            others = y[-1, ~uses]
            assert (others.isnan() | (others == exact[-1, ~uses])).all()


def test_nothing_beyond_the_activations_is_multiplied() -> None:
    """Rows' ends are padded with zeros, and those must meet zeros: not what lies behind x, nor what shared memory held."""
    dirt = torch.full((1, 4096), torch.nan, dtype=torch.float16, device=GPU)
    everywhere = arranged(large_matrix(12288, 4096, 0.5, torch.float16))
    for shape, bits in LAYOUTS:
        for cols in (171, 172, 176, 2048):
            weight = random_matrix(61, cols, 0.5, torch.float16).sign()
            weight[:, -1] = 1
            weight[5, -100:] = 0  # shorter than its slice
            matrix = certainly_cut(weight, shape, bits)
            for tokens in (1, 2, 3, 4, 5, 8):
                x = whole_numbers(tokens, cols)
                exact = (x.double() @ weight.double().T).to(GPU)
                for before in (0, 1, 3, 8):  # columns: x begins at any multiple of 2 bytes
                    around = torch.full((before + tokens * cols + 1000,), torch.nan, dtype=torch.float16, device=GPU)
                    view = around[before : before + tokens * cols].view(tokens, cols).copy_(x)
                    assert view.data_ptr() % 16 == before * 2 % 16
                    ops.linear(dirt, everywhere, None)
                    assert torch.equal(ops.linear(view, matrix, None).double(), exact)


def test_results_are_not_written_beyond_their_end() -> None:
    """Lanes without a row must stay silent."""
    for shape, bits in LAYOUTS:
        for rows in (1, 27, 28, 29, 33, 61):
            weight = random_matrix(rows, 172, 0.5, torch.float16).sign()
            matrix, x = certainly_cut(weight, shape, bits), whole_numbers(3, 172)
            around = torch.full((3 * rows + 128,), -7.0, dtype=torch.float16, device=GPU)
            native.cuda_sliced_spmv(matrix, x.to(GPU, torch.float16), None, around[64 : 64 + 3 * rows].view(3, rows))
            assert torch.equal(around[64:-64].view(3, rows).double().cpu(), x.double() @ weight.double().T)
            assert (around[:64] == -7).all()
            assert (around[-64:] == -7).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: F.pad(x, (3, 5))[..., 3:-5],
        lambda x: x[:1].expand(4, *x.shape[1:]),
    ],
    ids=["strided", "transposed", "sliced", "repeated"],
)
@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1, 2), (5, 2)])
def test_activations_of_any_shape_and_stride(view: Callable[[Tensor], Tensor], leading: tuple[int, ...]) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight, SHAPES[2], 4)
    x = view(whole_numbers(*leading, 172).to(GPU, torch.float16))
    assert not x.is_contiguous()
    exact = x.double() @ weight.to(GPU).double().T
    for given_x in (x, x.float(), x.contiguous()):
        y = ops.linear(given_x, matrix, None)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], 33), given_x.dtype)
        assert torch.equal(y.double(), exact)
    assert torch.equal(ops.linear(x.flatten()[-172:], matrix, None).double(), exact.flatten(0, -2)[-1])


def test_no_tokens() -> None:
    matrix = certainly_cut(signs(33, 172, torch.float16), SHAPES[3], 2)
    for dtype in (torch.float16, torch.float32):
        for leading in ((0,), (2, 0), (0, 3)):
            y = ops.linear(torch.empty(*leading, 172, dtype=dtype, device=GPU), matrix, None)
            assert (y.shape, y.dtype) == ((*leading, 33), dtype)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_bias_of_any_stride(tokens: int) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight)
    x, bias = whole_numbers(tokens, 172), whole_numbers(66)[::2] * 5
    spread = torch.full((66,), torch.nan, dtype=torch.float16, device=GPU)
    spread[::2] = bias.to(GPU, torch.float16)
    y = ops.linear(x.to(GPU, torch.float16), matrix, spread[::2])
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + bias)


def test_refuses_what_it_cannot_multiply() -> None:
    matrix = certainly_cut(signs(33, 172, torch.float16))
    x = torch.ones(1, 172, device=GPU, dtype=torch.float16)
    with pytest.raises(FormatError, match="171 features and the matrix 172 columns"):
        ops.linear(x[:, 1:], matrix, None)
    with pytest.raises(FormatError, match=r"input is torch\.bfloat16 and the packed values are torch\.float16"):
        ops.linear(x.bfloat16(), matrix, None)
    for bias in (x.new_ones(32), x.new_ones(34), x.new_ones(1), x.new_ones(1, 33), x.new_ones(33).float()):
        with pytest.raises(NativeError, match=r"^The bias is torch\.float(16|32) \[.*\], not torch\.float16 \[33\]; "):
            ops.linear(x, matrix, bias)
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        ops.linear(x, matrix, torch.ones(33, dtype=torch.float16))
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        ops.linear(x.cpu(), matrix, None)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_gradients_of_the_input(tokens: int, x_dtype: torch.dtype) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight)
    x = whole_numbers(tokens, 172).to(GPU, x_dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    upstream = whole_numbers(tokens, 33).to(GPU, x_dtype)
    y = ops.linear(x, matrix, None)
    y.backward(upstream)
    F.linear(twin, weight.to(GPU, x_dtype)).backward(upstream)
    assert x.grad.any()
    assert torch.equal(x.grad, twin.grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = ops.linear(x, matrix, None)
        assert not without.requires_grad
        assert torch.equal(without, y)


@layouts
def test_the_same_bits_each_time(shape: Shape, bits: int) -> None:
    weight = random_matrix(700, 3000, 0.5, torch.bfloat16)
    matrix = certainly_cut(weight, shape, bits)
    for tokens in (1, 2, 4):
        x = torch.randn(tokens, 3000).to(GPU, torch.bfloat16)
        y = ops.linear(x, matrix, None)
        assert all(torch.equal(ops.linear(x, matrix, None), y) for _ in range(20))
        assert torch.equal(cut(weight, shape, bits).data, matrix.data)


def test_a_token_gets_the_same_bits_alone_and_in_company() -> None:
    """Text must not depend on how many tokens are decided at a time: each sums its row in one order."""
    matrix = certainly_cut(random_matrix(700, 3000, 0.5, torch.float16), SHAPES[1], 4)
    x = torch.randn(8, 3000).to(GPU, torch.float16)
    alone = torch.cat([ops.linear(token[None], matrix, None) for token in x])
    for tokens in TOKENS:
        assert torch.equal(ops.linear(x[:tokens], matrix, None), alone[:tokens])


# Streams and graphs


@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
def test_work_follows_the_current_stream(tokens: int) -> None:
    """Activations are written late on a side stream: work on another stream would read what was there before."""
    weight = random_matrix(64, 300, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight)
    x = whole_numbers(tokens, 300)
    there = x.to(GPU, torch.float16)
    late = torch.zeros_like(there)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(50_000_000)
        late.copy_(there)
        y = ops.linear(late, matrix, None)
        late.zero_()
        through_the_op = spmv(late.copy_(there), matrix, None)
        late.zero_()
    stream.synchronize()
    exact = x.double() @ weight.double().T
    assert torch.equal(y.double().cpu(), exact)
    assert torch.equal(through_the_op.double().cpu(), exact)


def chain(
    layers: list[SlicedMatrix | MackoMatrix], x: Tensor, *, wait: bool, between: Callable[[Tensor], Tensor]
) -> Tensor:
    for layer in layers:
        x = between(ops.linear(x, layer, None))
        if wait:
            torch.cuda.synchronize()
    return x


CHAINS = {
    "few rows": [512],
    "a slice a multiprocessor": [4096],
    "three slices a multiprocessor": [8192],
    "small and large by turns": [512, 8192],
}


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("sizes", CHAINS.values(), ids=CHAINS)
def test_kernels_that_start_early_wait_for_what_they_read(sizes: list[int], tokens: int) -> None:
    """Programmatic dependent launch: each layer reads what the one before wrote, 50 times on, with no pause between."""
    layers: list[SlicedMatrix | MackoMatrix] = []
    shapes = list(zip(sizes[1:] + sizes[:1], sizes, strict=True))
    for seed in range(2):
        for rows, cols in shapes:
            weight = large_matrix(rows, cols, 0.5, torch.float16, seed) / (cols / 2) ** 0.5
            layers.append(certainly_cut(weight, choose_shapes(rows, 132)[0], 2))
    layers = [layers[i % len(layers)] for i in range(50)]
    canonical = ops.pack(torch.eye(sizes[0], dtype=torch.float16, device=GPU))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda y: y,
        lambda y: y * 1.0,  # a kernel of torch's in between
        lambda y: ops.linear(y, canonical, None) if tokens < 3 and y.shape[-1] == sizes[0] else y.clone(),
    ]
    results = []
    with torch.inference_mode():
        for between in functions:
            for seed in range(3):  # other numbers in the same memory: what is stale is wrong
                x = torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(seed)).to(GPU, torch.float16)
                torch.cuda.synchronize()
                early = chain(layers, x, wait=False, between=between)
                assert torch.equal(early, chain(layers, x, wait=True, between=between))
                assert early.isfinite().all()
                assert early.abs().max() > 0.01
                results.append(early)
    assert not torch.equal(results[0], results[1])


def test_a_bias_that_the_kernel_before_wrote() -> None:
    """It is not a weight: it may be as new as the activations."""
    size = 4096
    first, second = (arranged(large_matrix(size, size, 0.5, torch.float16, seed) / 45) for seed in range(2))
    xs = torch.randn(40, 1, size, generator=torch.Generator().manual_seed(0)).to(GPU, torch.float16)
    wide = torch.randn(40, size, generator=torch.Generator().manual_seed(1)).to(GPU)
    results: dict[bool, list[Tensor]] = {False: [], True: []}
    with torch.inference_mode():
        for wait, found in results.items():
            for x, other in zip(xs, wide, strict=True):
                torch.cuda.synchronize()
                bias = ops.linear(x, first, None)[0]
                if wait:
                    torch.cuda.synchronize()
                found.append(ops.linear(x, second, bias))
                rounded = other.half()  # as a layer does with a bias of another dtype
                if wait:
                    torch.cuda.synchronize()
                found.append(ops.linear(x, second, rounded))
                del bias, rounded
    assert all(torch.equal(*pair) for pair in zip(results[False], results[True], strict=True))


def test_activations_written_right_before_and_overwritten_right_after() -> None:
    """Also the other way round: what comes after a kernel must not overtake its reads."""
    size = 4096
    matrix = arranged(large_matrix(size, size, 0.5, torch.float16).sign())
    dense = native.cuda_sliced_unpack(matrix).double()
    xs = torch.randint(-1, 2, (40, 1, size), generator=torch.Generator().manual_seed(1)).to(GPU, torch.float16)
    x, results = torch.empty_like(xs[0]), []
    with torch.inference_mode():
        torch.cuda.synchronize()
        for new in xs:
            x.copy_(new)
            results.append(ops.linear(x, matrix, None))
            x.fill_(torch.nan)
    for new, y in zip(xs, results, strict=True):
        assert torch.equal(y, (new.double() @ dense.T).half())


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_cuda_graphs_replay_with_new_activations(tokens: int) -> None:
    weights = [random_matrix(700, 700, 0.5, torch.float16, seed).sign() for seed in range(2)]
    first, second = (certainly_cut(weight, shape, 2) for weight, shape in zip(weights, SHAPES, strict=False))
    bias = whole_numbers(700).to(GPU, torch.float16)
    x = torch.zeros(tokens, 700, dtype=torch.float16, device=GPU)

    def layers(through: Callable) -> Tensor:
        return through(through(x, first, bias).clamp(-1, 1), second, None)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        layers(ops.linear)
    torch.cuda.synchronize()
    for through in (ops.linear, spmv):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            y = layers(through)
            unpacked = native.cuda_sliced_unpack(first)
        for round_ in range(4):
            new = whole_numbers(tokens, 700).roll(round_ * 13, dims=1)
            x.copy_(new)
            with torch.inference_mode():
                unpacked.zero_()
            graph.replay()
            hidden = (new.double() @ weights[0].double().T + bias.double().cpu()).clamp(-1, 1)
            assert torch.equal(y.double().cpu(), hidden @ weights[1].double().T)
            assert torch.equal(unpacked.cpu(), weights[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype: torch.dtype) -> None:
    weight = random_matrix(6, 40, 0.5, dtype)
    for shape, bits in (LAYOUTS[0], LAYOUTS[-1]):
        matrix = certainly_cut(weight, shape, bits)
        plan = matrix.plan
        numbers = (plan.rows, plan.cols, plan.delta_bits, plan.shape.height, plan.shape.warps, plan.units)
        x, bias = torch.randn(3, 40).to(GPU, dtype), torch.randn(6).to(GPU, dtype)
        torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, bias, *numbers))
        torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, None, *numbers))
        torch.library.opcheck(torch.ops.macko.sliced_unpack, (matrix.data, dtype, *numbers))
        assert torch.equal(torch.ops.macko.sliced_unpack(matrix.data, dtype, *numbers).cpu(), weight)


def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    weight = random_matrix(64, 2048, 0.5, torch.float16).sign()
    x = whole_numbers(2, 2048)
    for current, other in ((0, 1), (1, 0)):
        device = torch.device("cuda", other)
        with torch.cuda.device(current):
            matrix = ops.arrange(ops.pack(weight.to(device)))
            assert matrix is not None
            restored = ops.restore(matrix)
            products = [ops.linear(x.to(device, dtype), matrix, None) for dtype in (torch.float16, torch.float32)]
            assert torch.cuda.current_device() == current
            assert torch.ones(1, device="cuda").device.index == current
        assert {tensor.device for tensor in (matrix.data, *arrays(restored), *products)} == {device}
        assert torch.equal(ops.unpack(restored).cpu(), weight)
        assert all(torch.equal(y.double().cpu(), x.double() @ weight.double().T) for y in products)
    with pytest.raises(NativeError, match=r"^The tensors lie on cuda:0 and cuda:1; move them to one device\.$"):
        ops.linear(x.to("cuda:1", torch.float16), arranged(weight), None)
    layer = MackoLinear.from_matrix(ops.pack(weight)).to("cuda:0").to("cuda:1")
    assert layer.is_arranged
    assert {tensor.device.index for tensor in layer.state_dict().values()} == {1}
    assert torch.equal(layer(x.to("cuda:1", torch.float16)), products[0].to("cuda:1"))


# Layers

ROWS, COLS = 256, 2048


def make(dtype: torch.dtype = torch.float16, *, bias: bool = True) -> tuple[MackoLinear, Tensor, dict[str, Tensor]]:
    """An arranged layer of whole numbers, its dense weight on the CPU, and its canonical state."""
    weight = random_matrix(ROWS, COLS, 0.5, dtype).sign()
    layer = MackoLinear.from_matrix(ops.pack(weight), whole_numbers(ROWS).to(dtype) if bias else None)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.cuda()
    assert layer.is_arranged
    return layer, weight, state


def assert_state(layer: MackoLinear, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8))


def assert_layer_multiplies(layer: MackoLinear, weight: Tensor) -> None:
    device = layer.state_dict()["weight_values"].device
    for tokens in (1, 2, 9):
        x = whole_numbers(1, tokens, COLS)
        exact = x.double() @ weight.double().T
        if layer.bias is not None:
            exact += layer.bias.double().cpu()
        for dtype in (weight.dtype, torch.float32):
            y = layer(x.to(device, dtype))
            assert (y.dtype, y.device) == (dtype, device)
            assert torch.equal(y.cpu(), exact.to(dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_layer_arranges_and_restores(dtype: torch.dtype, bias: bool) -> None:
    layer, weight, state = make(dtype, bias=bias)
    assert layer.weight_sliced is not None
    assert layer.weight_sliced.is_cuda
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * bias
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    layer.arrange()  # once more is nothing more
    assert_state(layer, state)
    layer.restore()
    assert not layer.is_arranged
    assert layer.weight_sliced is None
    assert {name for name, _ in layer.named_parameters()} == state.keys()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    layer.restore()
    layer.arrange()
    assert layer.is_arranged
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    assert "delta_bits=2" in str(layer)
    assert "entries=" not in str(layer)


def test_a_layer_moves_to_the_cpu_and_back() -> None:
    layer, weight, state = make()
    for move in (layer.cpu, layer.cuda, lambda: layer.to("cpu"), lambda: layer.to(GPU), layer.cuda, layer.half):
        assert move() is layer
        assert layer.is_arranged == (layer.bias.device == GPU)
        assert_state(layer, state)
        assert_layer_multiplies(layer, weight)


def test_a_layer_of_another_dtype_and_back() -> None:
    layer, weight, state = make()
    layer.float()  # which no kernel multiplies
    assert not layer.is_arranged
    layer.half()
    assert layer.is_arranged
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    layer.bfloat16()  # -1, 0 and 1 are the same there
    assert layer.is_arranged
    assert layer.state_dict()["weight_values"].dtype == torch.bfloat16
    assert_layer_multiplies(layer, weight.bfloat16())


def test_a_model_of_layers_moves_as_one() -> None:
    layer, weight, state = make()
    model = torch.nn.Sequential(layer.cpu(), torch.nn.Linear(ROWS, 3, dtype=torch.float16))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.cuda()[0].is_arranged
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    assert_state(model[0], state)
    model.load_state_dict(saved)
    assert model[0].is_arranged
    assert_layer_multiplies(model[0], weight)


def test_loading_a_state_into_an_arranged_layer() -> None:
    layer, weight, state = make()
    twin, _, _ = make()
    assert twin.is_arranged
    values = state["weight_values"]
    sign = {**state, "weight_values": values.where(values == 0, -values), "bias": state["bias"] + 1}
    twin.load_state_dict(sign)
    assert twin.is_arranged
    assert_state(twin, sign)
    assert_layer_multiplies(twin, -weight)
    twin.load_state_dict(layer.state_dict())  # from GPU to GPU
    assert twin.is_arranged
    assert_state(twin, state)
    assert_layer_multiplies(twin, weight)
    empty = MackoLinear(COLS, ROWS, len(state["weight_values"]), bias=True, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    empty.arrange()
    assert empty.is_arranged
    assert_layer_multiplies(empty, weight)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        twin.load_state_dict({**state, "weight_values": state["weight_values"][:-8]})


def test_copies_of_a_layer() -> None:
    layer, weight, state = make()
    x = whole_numbers(1, COLS).to(GPU, torch.float16)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)  # at once: its weights have only just been queued for copying
    assert twin.is_arranged
    assert twin.weight_sliced.data_ptr() != layer.weight_sliced.data_ptr()
    assert twin._sliced.data is twin.weight_sliced
    layer.weight_sliced.zero_()  # the twin must not read the first one's memory
    assert_state(twin, state)
    assert_layer_multiplies(twin, weight)


def test_a_layer_that_is_emptied() -> None:
    layer, weight, state = make()
    layer.to_empty(device="cuda")  # anything at all in the arrays
    layer.load_state_dict(state)
    layer.arrange()
    assert layer.is_arranged
    assert_layer_multiplies(layer, weight)
    placeholder = MackoLinear(COLS, ROWS, 8, bias=True, device="meta").to_empty(device="cuda")
    assert not placeholder.is_arranged
    placeholder.to("meta")
    assert placeholder.weight_values.is_meta


def test_arranging_frees_the_canonical_arrays() -> None:
    weight = large_matrix(4096, 4096, 0.5, torch.float16)
    ops.linear(torch.ones(1, 4096, device=GPU, dtype=torch.float16), arranged(weight), None)  # all that is ever loaded
    gc.collect()
    before = torch.cuda.memory_allocated()
    layer = MackoLinear.from_matrix(ops.pack(weight))
    canonical = sum(parameter.nbytes for parameter in layer.parameters())
    assert canonical > 20_000_000
    slack = 2**22  # the allocator's rounding, at most 1 MiB a tensor
    assert canonical <= torch.cuda.memory_allocated() - before < canonical + slack
    layer.arrange()
    nbytes = layer.weight_sliced.nbytes
    assert nbytes <= MAX_OVERHEAD * canonical
    assert nbytes <= torch.cuda.memory_allocated() - before < nbytes + slack
    layer.restore()
    assert canonical <= torch.cuda.memory_allocated() - before < canonical + slack
    del layer
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_layer_refuses_another_width_or_dtype() -> None:
    layer, _, _ = make()
    for tokens in (1, 9):
        with pytest.raises(FormatError, match="2047 features and the matrix 2048 columns"):
            layer(torch.ones(tokens, COLS - 1, device=GPU).half())
        with pytest.raises(FormatError, match=r"input is torch\.bfloat16 and the packed values are torch\.float16"):
            layer(torch.ones(tokens, COLS, device=GPU).bfloat16())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_without_gradients(mode: Callable) -> None:
    layer, weight, state = make()
    with mode():
        assert_layer_multiplies(layer, weight)
        made_inside, _, _ = make()
        assert_layer_multiplies(made_inside, weight)
    assert_state(made_inside, state)
    with torch.no_grad():
        assert_layer_multiplies(made_inside, weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["as it comes", "dynamic"])
def test_compiles_as_one_graph(backend: str, dynamic: bool | None) -> None:
    if backend == "inductor":
        pytest.importorskip("triton")
    layer, weight, _ = make()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (1, 2, 5, 8, 9, 30, 3):
        x = whole_numbers(1, tokens, COLS)
        with torch.inference_mode():
            y = compiled(x.to(GPU, torch.float16))
        assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + layer.bias.double().cpu())
    x = whole_numbers(2, COLS).to(GPU, torch.float16).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(twin).sum().backward()
    assert torch.equal(x.grad, twin.grad)


@pytest.fixture(scope="module", params=HALVES, ids=["float16", "bfloat16"])
def packed_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of one layer, half of its weights zero, wide enough that its matrices are arranged."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 1280, "num_hidden_layers": 1, "vocab_size": 320}
    model = build(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64))
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    model.to(request.param).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    pack_checkpoint(folder / "dense", folder / "packed")
    yield folder / "packed"
    shutil.rmtree(folder)


def layers_of(model: torch.nn.Module) -> list[MackoLinear]:
    return [module for module in model.modules() if isinstance(module, MackoLinear)]


def test_an_arranged_llama_saves_the_files_that_it_came_from(packed_llama: Path, tmp_path: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    assert len(layers_of(model)) == 7
    assert all(layer.is_arranged for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    assert all(layer.is_arranged for layer in layers_of(model))
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(packed_llama)
    files, saved = checkpoint.weight_files(packed_llama), checkpoint.weight_files(tmp_path)
    assert [file.name for file in files] == [file.name for file in saved]
    for file, twin in zip(files, saved, strict=True):
        assert file.read_bytes() == twin.read_bytes()


def test_an_arranged_llama_gives_the_logits_of_the_canonical_one(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    exact = macko_llm.load(packed_llama, dtype="float32", device="cuda")
    canonical = macko_llm.load(packed_llama, device="cuda")
    for layer in layers_of(canonical):
        layer.restore()
    for tokens in (random_tokens(1, 1), random_tokens(1, 3), random_tokens(2, 20)):
        with torch.inference_mode():
            expected = exact(tokens.to(GPU)).logits.double()
            rounding = (canonical(tokens.to(GPU)).logits.double() - expected).abs().max()
            assert (model(tokens.to(GPU)).logits.double() - expected).abs().max() < 2 * rounding + 1e-3


def test_state_of_an_arranged_llama_has_the_canonical_names(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    stored = macko_llm.load(packed_llama, device="cpu").state_dict()
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert sum(name.endswith(ARRAY_NAMES) for name in state) == 3 * 7
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in state.items())


# Memory errors and races

SMALL_SET = """
import torch
from macko_llm import native, ops
from macko_llm.sliced import _MAX_TRIES, DELTA_BITS, Shape, SlicedMatrix, plan_rows

torch.manual_seed(0)
device = torch.device("cuda")
for rows, cols in ((1, 1), (33, 172), (61, 1031)):
    for dtype in (torch.float16, torch.bfloat16):
        weight = (torch.randint(1, 3, (rows, cols)) * (torch.rand(rows, cols) < 0.5)).to(dtype)
        x = torch.randint(-1, 2, (4, cols))
        exact = (x.double() @ weight.double().T).to(dtype)
        there, x = weight.to(device), x.to(device, dtype)
        canonical = ops.pack(there)
        ops.validate(canonical, "the matrix")
        assert torch.equal(ops.unpack(canonical).cpu(), weight)
        products = [native.cuda_spmv_rows(canonical, x[:tokens].contiguous(), None) for tokens in (1, 2, 4)]
        for shape in (Shape(32, 32), Shape(8, 24), Shape(28, 16), Shape(20, 12), Shape(5, 8)):
            for bits in DELTA_BITS:
                counts = torch.empty(rows, dtype=torch.int32, device=device)
                arguments = (there.data_ptr(), rows, cols, bits, counts.data_ptr())
                native._call_cuda("macko_cuda_sliced_entries", (there,), *arguments)
                planned = plan_rows({bits: counts}, rows, cols, dtype, [shape], 1 << 40)
                matrix = SlicedMatrix(torch.zeros(planned.plan.nbytes, dtype=torch.uint8, device=device), planned.plan)
                for at, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order)):
                    matrix.data[at : at + array.nbytes] = array.view(torch.uint8)
                native._call_cuda("macko_cuda_sliced_pack", (there,), there.data_ptr(), matrix.address)
                torch.cuda.synchronize()
                assert torch.equal(native.cuda_sliced_unpack(matrix).cpu(), weight)
                products += [ops.linear(x[:tokens], matrix, None) for tokens in (1, 2, 4)]
        assert all(torch.equal(y.cpu(), exact[: len(y)]) for y in products)
torch.cuda.synchronize()
print("all products are right")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on PATH")
    script = tmp_path / "small_set.py"
    script.write_text(SMALL_SET)
    # Torch asks CUDA things that it may refuse, so only what kernels do counts. Without a cache every tensor ends where
    # its memory does.
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        *(["--report-api-errors", "no"] * (tool == "memcheck")),
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, sys.executable, script], capture_output=True, text=True, timeout=90, env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all products are right" in run.stdout
