"""Products with sliced matrices on a GPU: float64's, exact for whole numbers, and unmoved by odd inputs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced_helpers import (
    LAYOUTS,
    arranged,
    assert_layout,
    certainly_cut,
    cut,
    large_matrix,
    layouts,
    linear,
    poison,
    spmv,
)
from sliced_reference import SHAPES, random_matrix
from test_gpu_canonical import GPU, HALVES, signs, whole_numbers
from test_ops import assert_same, assert_within_rounding, every_half
from torch import Tensor
from torch.nn import functional as F

from macko_llm import native
from macko_llm.errors import FormatError, NativeError
from macko_llm.layouts.sliced import SLICED_SPMV_MAX_TOKENS
from macko_llm.layouts.sliced_plan import Shape

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")

TOKENS = range(1, SLICED_SPMV_MAX_TOKENS + 1)


@layouts
@pytest.mark.parametrize("dtype", HALVES)
def test_whole_numbers_multiply_exactly(dtype: torch.dtype, shape: Shape, bits: int) -> None:
    for rows, cols in ((1, 1), (33, 172), (57, 171), (70, 2056)):
        weight = signs(rows, cols, dtype) if cols < 200 else random_matrix(rows, cols, 0.5, dtype).sign()
        matrix = certainly_cut(weight, shape, bits)
        for tokens in (0, *range(1, 10), 33):
            x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
            exact = x.double() @ weight.double().T
            for product in (spmv, linear):
                poison(tokens * rows * 2)
                y = product(x.to(GPU, dtype), matrix, bias.to(GPU, dtype))
                assert (y.shape, y.dtype, y.device) == ((tokens, rows), dtype, GPU)
                assert torch.equal(y.cpu(), (exact + bias).to(dtype))
            y = matrix.linear(x.to(GPU, torch.float32), bias.to(GPU, torch.float32))
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
        assert_within_rounding(matrix.linear(x, bias), x, weight, bias)


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
        assert_same(spmv(numbers[:, None].to(GPU), one, None)[:, 0].cpu(), numbers.where(numbers.isfinite(), torch.nan))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@layouts
def test_activations_that_are_not_finite(shape: Shape, bits: int, bad: float) -> None:
    """They show in all rows, as in a dense product, and in no other token."""
    weight = random_matrix(40, 300, 0.9, torch.float16).sign()
    matrix = certainly_cut(weight, shape, bits)
    for tokens in (1, 2, 3, 4):
        for column in (0, 1, 150, 299):
            x = whole_numbers(tokens, 300).to(torch.float16)
            exact = x.double() @ weight.double().T
            x[-1, column] = bad
            y = matrix.linear(x.to(GPU), None).double().cpu()
            assert torch.equal(y[:-1], exact[:-1])
            assert y[-1].isnan().all()


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
                    everywhere.linear(dirt, None)
                    assert torch.equal(matrix.linear(view, None).double(), exact)


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
        y = matrix.linear(given_x, None)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], 33), given_x.dtype)
        assert torch.equal(y.double(), exact)
    assert torch.equal(matrix.linear(x.flatten()[-172:], None).double(), exact.flatten(0, -2)[-1])


def test_no_tokens() -> None:
    matrix = certainly_cut(signs(33, 172, torch.float16), SHAPES[3], 2)
    for dtype in (torch.float16, torch.float32):
        for leading in ((0,), (2, 0), (0, 3)):
            y = matrix.linear(torch.empty(*leading, 172, dtype=dtype, device=GPU), None)
            assert (y.shape, y.dtype) == ((*leading, 33), dtype)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_bias_of_any_stride(tokens: int) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight)
    x, bias = whole_numbers(tokens, 172), whole_numbers(66)[::2] * 5
    spread = torch.full((66,), torch.nan, dtype=torch.float16, device=GPU)
    spread[::2] = bias.to(GPU, torch.float16)
    y = matrix.linear(x.to(GPU, torch.float16), spread[::2])
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + bias)


def test_refuses_what_it_cannot_multiply() -> None:
    matrix = certainly_cut(signs(33, 172, torch.float16))
    x = torch.ones(1, 172, device=GPU, dtype=torch.float16)
    with pytest.raises(FormatError, match="171 features and the matrix 172 columns"):
        matrix.linear(x[:, 1:], None)
    with pytest.raises(FormatError, match=r"input is torch\.int64; convert it to float16"):
        matrix.linear(x.long(), None)
    for bias in (x.new_ones(32), x.new_ones(34), x.new_ones(1), x.new_ones(1, 33)):
        with pytest.raises(NativeError, match=r"^The bias is torch\.float16 \[.*\], not torch\.float16 \[33\]; "):
            matrix.linear(x, bias)
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        matrix.linear(x, torch.ones(33, dtype=torch.float16))
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        matrix.linear(x.cpu(), None)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_gradients_of_the_input(tokens: int, x_dtype: torch.dtype) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight)
    x = whole_numbers(tokens, 172).to(GPU, x_dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    upstream = whole_numbers(tokens, 33).to(GPU, x_dtype)
    y = matrix.linear(x, None)
    y.backward(upstream)
    F.linear(twin, weight.to(GPU, x_dtype)).backward(upstream)
    assert x.grad.any()
    assert torch.equal(x.grad, twin.grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = matrix.linear(x, None)
        assert not without.requires_grad
        assert torch.equal(without, y)


@layouts
def test_the_same_bits_each_time(shape: Shape, bits: int) -> None:
    weight = random_matrix(700, 3000, 0.5, torch.bfloat16)
    matrix = certainly_cut(weight, shape, bits)
    for tokens in (1, 2, 4):
        x = torch.randn(tokens, 3000).to(GPU, torch.bfloat16)
        y = matrix.linear(x, None)
        assert all(torch.equal(matrix.linear(x, None), y) for _ in range(20))
        assert torch.equal(cut(weight, shape, bits).data, matrix.data)


def test_a_token_gets_the_same_bits_alone_and_in_company() -> None:
    """Text must not depend on how many tokens are decided at a time: each sums its row in one order."""
    matrix = certainly_cut(random_matrix(700, 3000, 0.5, torch.float16), SHAPES[1], 4)
    x = torch.randn(8, 3000).to(GPU, torch.float16)
    alone = torch.cat([matrix.linear(token[None], None) for token in x])
    for tokens in TOKENS:
        assert torch.equal(matrix.linear(x[:tokens], None), alone[:tokens])
