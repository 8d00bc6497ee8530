"""The tiled layout on a GPU: bytes as a naive decoder reads them, there and back again, and its products."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sliced_helpers import large_matrix, linear, poison
from sliced_reference import random_matrix
from test_gpu_canonical import GPU, HALVES, MATRICES, whole_numbers
from test_ops import assert_within_rounding, every_half, sparse
from tiled_helpers import (
    assert_same_arrays,
    assert_tiles,
    spmm,
    tile,
    tiled_matrix,
)
from tiled_reference import make
from torch import Tensor
from torch.nn import functional as F

from macko_llm import native
from macko_llm.errors import FormatError, NativeError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, tiled
from macko_llm.layouts.tiled import TiledMatrix
from macko_llm.layouts.tiled_plan import MAX_COLS, choose_strips

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums", "tensor_cores")

TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 300, 700]
SHAPES = [(1, 1), (8, 64), (7, 63), (172, 172), (129, 1000)]


def empty_rows() -> Tensor:
    weight = random_matrix(70, 172, 0.5, torch.float32)
    weight[3:20] = weight[64:] = 0
    return weight


def one_full_row() -> Tensor:
    weight = torch.zeros(70, 1000)
    weight[37] = torch.arange(1.0, 1001.0) / 64
    return weight


MORE_MATRICES = {
    "empty rows": empty_rows(),
    "one full row": one_full_row(),
    "full, the highest strips": random_matrix(1024, 200, 0.0, torch.float32),
    "as many columns as there may be": random_matrix(8, MAX_COLS, 0.5, torch.float32),
}


def assert_products(matrix: TiledMatrix, weight: Tensor, tokens: int, *, seed: int = 0) -> None:
    """Within the rounding of float32 sums, with a bias and without, and no less exact than a dense product."""
    rows, cols = weight.shape
    generator = torch.Generator(GPU).manual_seed(seed)
    weight = weight.to(GPU)
    x = torch.randn(tokens, cols, generator=generator, device=GPU).to(weight.dtype)
    for bias in (None, torch.randn(rows, generator=generator, device=GPU).to(weight.dtype)):
        poison(tokens * rows * 2)
        y = spmm(x, matrix, bias)
        assert (y.shape, y.dtype, y.device) == ((tokens, rows), weight.dtype, GPU)
        assert_within_rounding(y, x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        dense = F.linear(x, weight, bias).double()
        assert (y.double() - exact).norm() <= 1.2 * (dense - exact).norm()
        if tokens <= matrix.few_tokens(weight.dtype):
            assert torch.equal(matrix.linear(x, bias), y)
        else:
            assert torch.equal(matrix.linear(x, bias).double(), dense)


# Bytes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*MATRICES, *MORE_MATRICES])
def test_layout_of_named_matrices(name: str, dtype: torch.dtype) -> None:
    weight = {**MATRICES, **MORE_MATRICES}[name].to(dtype)
    if len(weight) == 0:
        assert tiled.arrange(canonical.pack(weight.to(GPU))) is None
        return
    tiles = -(-len(weight) // 8)
    for strips in {-(-tiles // 8), *choose_strips([len(weight)], 7), tiles}:
        matrix, expected = tile(weight, strips), make(weight, strips)
        assert matrix.plan == expected.plan
        assert torch.equal(matrix.data.cpu(), expected.data)
        assert_tiles(matrix, weight)


@given(
    rows=st.sampled_from([1, 7, 8, 9, 63, 64, 65, 129]) | st.integers(1, 300),
    cols=st.sampled_from([1, 7, 8, 63, 64, 65, 172]) | st.integers(1, 1000),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    dtype=st.sampled_from(HALVES),
    share=st.floats(0, 1),
    tokens=st.integers(1, 140),
    uneven=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(172, 172, 0.5, torch.float16, 0.0, 8, False, 0)
@example(300, 1000, 0.0, torch.bfloat16, 0.0, 32, False, 0)
@settings(max_examples=50, deadline=None)
def test_layout_and_products_of_any_matrix(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, share: float, tokens: int, uneven: bool, seed: int
) -> None:
    weight = (sparse if uneven else random_matrix)(rows, cols, sparsity, dtype, seed)
    tiles = -(-rows // 8)
    strips = round(-(-tiles // 8) * (1 - share) + tiles * share)
    matrix = tile(weight, strips)
    assert torch.equal(matrix.data.cpu(), make(weight, strips).data)
    assert_tiles(matrix, weight)
    signs = weight.sign()
    x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
    y = spmm(x.to(GPU, dtype), tile(signs, strips), bias.to(GPU, dtype))
    assert torch.equal(y.cpu(), (x.double() @ signs.double().T + bias).to(dtype))  # exact sums, rounded once


@pytest.mark.parametrize(
    ("rows", "cols", "sparsity"),
    [(4096, 4096, 0.5), (11008, 1024, 0.5), (4096, 4096, 0.9), (1024, 4096, 0.3), (8, MAX_COLS, 0.5)],
)
def test_large_matrices_there_and_back_again(rows: int, cols: int, sparsity: float) -> None:
    weight = large_matrix(rows, cols, sparsity, torch.bfloat16)
    stored = canonical.pack(weight)
    matrix = tiled.arrange(stored)
    assert matrix is not None
    multiprocessors = torch.cuda.get_device_properties(GPU).multi_processor_count
    assert [matrix.plan.strips] == choose_strips([rows], multiprocessors)
    assert matrix.data.nbytes <= weight.nbytes
    assert_tiles(matrix, weight)
    assert_same_arrays(matrix.canonical(), stored)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_weight_goes_in_and_out_unchanged(dtype: torch.dtype) -> None:
    numbers = every_half(dtype)
    numbers = numbers[numbers.isfinite()]
    weight = torch.zeros(-(-len(numbers) // 100), 200, dtype=dtype)
    weight[:, 1::2] = F.pad(numbers, (0, -len(numbers) % 100)).view(-1, 100)
    assert_tiles(tile(weight), weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_matrices_that_tiles_do_not_suit(dtype: torch.dtype) -> None:
    for weight in (
        torch.zeros(0, 64),
        torch.ones(1, 1),
        torch.ones(64, 64),  # full: more bytes than dense
        random_matrix(8, MAX_COLS + 8, 0.5, torch.float32),
    ):
        assert tiled.arrange(canonical.pack(weight.to(GPU, dtype))) is None
    for weight in (torch.zeros(33, 172), torch.ones(64, 64).tril(-32)):
        matrix = tiled_matrix(weight.to(dtype))
        assert_tiles(matrix, weight.to(dtype))


def test_a_gpu_older_than_its_tensor_cores_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = canonical.pack(large_matrix(1024, 1024, 0.5, torch.float16))
    assert tiled.arrange(stored) is not None
    monkeypatch.setattr(tiled, "TILED_CAPABILITY", (99, 0))
    assert tiled.arrange(stored) is None


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
        matrix = tiled.arrange(MackoMatrix(late, stored.deltas, stored.row_offsets, stored.shape))
    assert matrix is not None
    x = whole_numbers(5, 2048)
    y = matrix.linear(x.to(GPU, torch.float16), None)
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)
    assert_tiles(matrix, weight)


# Products


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_exact_as_dense_ones(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    for sparsity in (0.5, 0.9):
        weight = random_matrix(*shape, sparsity if shape != (1, 1) else 0.0, dtype)
        assert_products(tile(weight), weight, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MORE_MATRICES)
def test_products_of_uneven_and_full_matrices(name: str, dtype: torch.dtype, tokens: int) -> None:
    weight = MORE_MATRICES[name].to(dtype)
    for strips in {-(-len(weight) // 64), -(-len(weight) // 8)}:
        assert_products(tile(weight, strips), weight, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (11008, 1024), (1024, 4096), (17000, 1024), (5200, 6400), (5200, 1024)], ids=str
)
def test_large_products_are_as_exact_as_dense_ones(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    weight = large_matrix(*shape, 0.5, dtype)
    assert_products(tiled_matrix(weight), weight, tokens)


@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [
        (4096, 1024, 100),  # few products, which clusters share
        (4096, 1024, 150),
        (22000, 136, 128),  # a product for each of nearly all multiprocessors
        (17000, 72, 65),  # more products than multiprocessors, in ranges
        (17000, 72, 300),  # whole products and ranges
        (9000, 1000, 1024),
        (11008, 640, 192),
        (13000, 2560, 17),  # more strips than their own kernel likes
        (13000, 2560, 64),
        (5200, 12000, 50),  # one high strip for each multiprocessor
    ],
)
def test_products_of_many_tokens_are_shared_in_every_way(rows: int, cols: int, tokens: int) -> None:
    weight = large_matrix(rows, cols, 0.5, torch.float16)
    matrix = tile(weight)
    assert_products(matrix, weight, tokens)
    x = torch.randn(tokens, cols, device=GPU).half()
    y = spmm(x, matrix, None)
    workspace = native._tiled_workspace(matrix.address, 1, tokens, GPU)
    for _ in range(20):
        poison(0 if workspace is None else workspace.nbytes)
        assert torch.equal(spmm(x, matrix, None), y)


@pytest.mark.parametrize(
    ("rows", "cols", "tokens"), [(1000, 640, 65), (172, 172, 300), (26000, 72, 65), (13000, 2560, 17)]
)
def test_many_tokens_without_a_workspace_are_multiplied_a_few_at_a_time(
    rows: int, cols: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them would have one on an H100."""
    monkeypatch.setattr(native, "_tiled_workspace", lambda *_: None)
    weight = random_matrix(rows, cols, 0.5, torch.float16)
    assert_products(tile(weight), weight, tokens)


def test_many_tokens_with_long_records_and_with_many() -> None:
    """Full tiles, for which a block has fewer slots, and strips of one tile, of which it has 16 or 24 records in each."""
    weight = random_matrix(1000, 640, 0.0, torch.bfloat16)
    for strips in (16, 125):
        assert_products(tile(weight, strips), weight, 200)


def test_strips_of_every_height_multiply() -> None:
    for tiles in range(1, 9):
        weight = random_matrix(24 * tiles - 3, 172, 0.5, torch.float16).sign()
        matrix = tile(weight, 3)
        for tokens in (1, 8, 9, 16, 17, 32, 33, 70):
            x = whole_numbers(tokens, 172)
            y = spmm(x.to(GPU, torch.float16), matrix, None)
            assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    weight = random_matrix(700, 3000, 0.5, dtype)
    matrix = tile(weight)
    assert torch.equal(tile(weight).data, matrix.data)
    for tokens in TOKENS:
        x = torch.randn(tokens, 3000).to(GPU, dtype)
        y = spmm(x, matrix, None)
        assert all(torch.equal(spmm(x, matrix, None), y) for _ in range(20))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 32, 40, 65, 150, 256])
def test_a_token_that_is_not_finite_spoils_its_whole_product_and_no_other(tokens: int, value: float) -> None:
    """In empty rows too, and in those of a tile that no column of x reaches."""
    for rows, cols in ((70, 172), (33, 1024)):
        weight = random_matrix(rows, cols, 0.9, torch.bfloat16).sign()
        weight[9:30] = 0
        matrix = tile(weight)
        for column in (0, cols // 2, cols - 1):
            for token in {0, tokens // 2, tokens - 1}:
                x = whole_numbers(tokens, cols).to(GPU, torch.bfloat16)
                expected = spmm(x, matrix, None)
                x[token, column] = value
                for y in (spmm(x, matrix, None), matrix.linear(x, None)):
                    assert not y[token].isfinite().any()
                    others = [other for other in range(tokens) if other != token]
                    assert torch.equal(y[others], expected[others])


def test_nothing_beyond_the_activations_is_multiplied() -> None:
    """Nor what lies between them and the next multiple of 8 columns, wherever x begins."""
    for cols in (171, 172, 176, 2048):
        weight = random_matrix(61, cols, 0.5, torch.float16).sign()
        weight[:, -1] = 1
        matrix = tile(weight)
        for tokens in (1, 3, 8, 9, 17, 32):
            x = whole_numbers(tokens, cols)
            exact = (x.double() @ weight.double().T).to(GPU)
            for before in (0, 1, 3, 8):
                around = torch.full((before + tokens * cols + 1000,), torch.nan, dtype=torch.float16, device=GPU)
                view = around[before : before + tokens * cols].view(tokens, cols).copy_(x)
                assert view.data_ptr() % 16 == before * 2 % 16
                poison(tokens * -(-cols // 8) * 16)  # where a padded copy would lie
                for product in (linear, spmm):
                    assert torch.equal(product(view, matrix, None).double(), exact)


def test_results_are_not_written_beyond_their_end() -> None:
    for rows in (1, 7, 8, 9, 61):
        weight = random_matrix(rows, 172, 0.5, torch.float16).sign()
        matrix = tile(weight)
        for tokens in (1, 3, 9, 17, 33, 70):
            x, size = whole_numbers(tokens, 172), tokens * rows
            around = torch.full((size + 128,), -7.0, dtype=torch.float16, device=GPU)
            y = around[64:-64].view(tokens, rows)
            native.cuda_tiled_spmm(matrix.address, 1, x.to(GPU, torch.float16), None, None, y)
            assert torch.equal(around[64:-64].view(tokens, rows).double().cpu(), x.double() @ weight.double().T)
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
    for cols in (172, 176):
        weight = random_matrix(33, cols, 0.5, torch.float16).sign()
        matrix = tile(weight)
        x = view(whole_numbers(*leading, cols).to(GPU, torch.float16))
        assert not x.is_contiguous()
        exact = x.double() @ weight.to(GPU).double().T
        for given_x in (x, x.float(), x.contiguous()):
            y = matrix.linear(given_x, None)
            assert (y.shape, y.dtype) == ((*x.shape[:-1], 33), given_x.dtype)
            assert torch.equal(y.double(), exact)
        assert torch.equal(matrix.linear(x.flatten()[-cols:], None).double(), exact.flatten(0, -2)[-1])


def test_no_tokens() -> None:
    matrix = tile(random_matrix(33, 172, 0.5, torch.float16))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for leading in ((0,), (2, 0), (0, 3)):
            y = matrix.linear(torch.empty(*leading, 172, dtype=dtype, device=GPU), None)
            assert (y.shape, y.dtype) == ((*leading, 33), dtype)


@pytest.mark.parametrize("x_dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALVES)
def test_activations_of_every_dtype(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight = random_matrix(33, 172, 0.5, dtype).sign()
    matrix, x, bias = tile(weight), whole_numbers(5, 172), whole_numbers(33)
    y = matrix.linear(x.to(GPU, x_dtype), bias.to(GPU, x_dtype))
    assert y.dtype == x_dtype
    assert torch.equal(y.cpu(), (x.double() @ weight.double().T + bias).to(x_dtype))


def test_refuses_what_it_cannot_multiply() -> None:
    matrix = tile(random_matrix(33, 172, 0.5, torch.float16))
    x = torch.ones(1, 172, device=GPU, dtype=torch.float16)
    with pytest.raises(FormatError, match="171 features and the matrix 172 columns"):
        matrix.linear(x[:, 1:], None)
    for bias in (x.new_ones(32), x.new_ones(1), x.new_ones(1, 33)):
        with pytest.raises(NativeError, match=r"^The bias is torch\.float16 \[.*\], not torch\.float16 \[33\]; "):
            matrix.linear(x, bias)
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        matrix.linear(x, torch.ones(33, dtype=torch.float16))
    with pytest.raises(NativeError, match=r"^The input is torch\.float32 and the tiles are torch\.float16; convert"):
        spmm(x.float(), matrix, None)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_gradients_of_the_input_and_the_bias(tokens: int, x_dtype: torch.dtype) -> None:
    weight = random_matrix(33, 172, 0.5, torch.float16).sign()
    matrix = tile(weight)
    x, bias = whole_numbers(tokens, 172).to(GPU, x_dtype), whole_numbers(33).to(GPU, x_dtype)
    upstream = whole_numbers(tokens, 33).to(GPU, x_dtype)
    own, twins = ([tensor.clone().requires_grad_() for tensor in (x, bias)] for _ in "ot")
    y = matrix.linear(*own)
    y.backward(upstream)
    F.linear(twins[0], weight.to(GPU, x_dtype), twins[1]).backward(upstream)
    for tensor, twin in zip(own, twins, strict=True):
        assert tensor.grad.any()
        assert torch.equal(tensor.grad, twin.grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = matrix.linear(*own)
        assert not without.requires_grad
        assert torch.equal(without, y)


@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype: torch.dtype) -> None:
    weight = random_matrix(6, 40, 0.5, dtype)
    matrix = tile(weight)
    x, bias = torch.randn(3, 40).to(GPU, dtype), torch.randn(6).to(GPU, dtype)
    for given_bias in (bias, None):
        torch.library.opcheck(torch.ops.macko.tiled_spmm, (x, matrix.data, given_bias, dtype, matrix.numbers))
    torch.library.opcheck(torch.ops.macko.tiled_unpack, (matrix.data, dtype, matrix.numbers))
    x.requires_grad_()
    torch.library.opcheck(torch.ops.macko.tiled_linear, (x, matrix.data, bias, dtype, matrix.numbers))
