"""The torch ops against float64, their fake kernels against the real ones, and the number conversions bit by bit."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macko_llm import native
from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [*HALVES, torch.float32]


def sparse(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random [rows, cols] with some rows empty and some full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    row_sparsity = torch.tensor([0.0, sparsity, sparsity, sparsity, 1.0])[
        torch.randint(5, (rows, 1), generator=generator)
    ]
    return (weight * (torch.rand(rows, cols, generator=generator) >= row_sparsity)).to(dtype)


def assert_within_rounding(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compare y with x Wᵀ + bias in float64.

    Summing n float32 terms in any order errs by at most n u / (1 - n u) times the sum of their magnitudes, u = 2^-24 (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 4.2). The terms are a row's entries and the bias, a product
    with a float32 activation is rounded once itself, and the result is rounded once to y's dtype.
    """
    weight, x64 = weight.double(), x.double()
    exact = x64 @ weight.T
    magnitude = x64.abs() @ weight.abs().T
    if bias is not None:
        exact += bias.double()
        magnitude += bias.double().abs()
    terms = (weight != 0).sum(dim=1) + 2
    accumulated = terms * 2**-24 / (1 - terms * 2**-24) * magnitude
    kind = torch.finfo(y.dtype)
    stored = (exact.abs() + accumulated) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= accumulated + stored).all()


@st.composite
def products(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens x [tokens, cols], a matrix [rows, cols], a bias or None."""
    rows, cols = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 172]) | st.integers(1, 300))
    dtype, x_dtype = draw(st.sampled_from(HALVES)), draw(st.sampled_from(ACTIVATIONS))
    seed = draw(st.integers(0, 2**32))
    weight = sparse(rows, cols, draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0])), dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(0, 9)), cols, generator=generator).to(x_dtype)
    bias = torch.randn(rows, generator=generator).to(x_dtype) if draw(st.booleans()) else None
    return x, weight, bias


@given(products())
@settings(max_examples=300, deadline=None)
def test_spmv_is_within_rounding_of_float64(product: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> None:
    x, weight, bias = product
    matrix = canonical.pack(weight)
    arrays = (matrix.values, matrix.deltas, matrix.row_offsets)
    y = torch.ops.macko.spmv(x, *arrays, bias)
    assert y.shape == (len(x), len(weight))
    assert_within_rounding(y, x, weight, bias)
    if x.dtype in (weight.dtype, torch.float32):
        assert_within_rounding(matrix.linear(x, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("entries", [(1, 1, 1, 1), (1, 2, 3, 4), (3, 0, 3, 1), (0, 5, 0, 2), (7, 9, 11, 13)])
def test_rows_that_begin_and_end_anywhere(entries: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.zeros(len(entries), 300, dtype=dtype)
    for row, count in enumerate(entries):
        weight[row, 12 : 12 * count + 1 : 12] = torch.arange(1, count + 1) * (-1) ** row
    matrix = canonical.pack(weight)
    assert (matrix.row_offsets % 2).any()
    x = torch.arange(300.0).expand(2, 300).contiguous()
    # Small whole numbers: every sum is exact.
    assert torch.equal(matrix.linear(x, None), x @ weight.float().T)


def test_a_matrix_without_rows() -> None:
    matrix = canonical.pack(torch.zeros(0, 5, dtype=torch.float16))
    assert matrix.linear(torch.ones(2, 3, 5), None).shape == (2, 3, 0)
    assert matrix.linear(torch.ones(1, 5), torch.zeros(0)).shape == (1, 0)
    assert canonical.unpack(matrix).shape == (0, 5)
    x, bias = torch.ones(3, 5, requires_grad=True), torch.ones(0, requires_grad=True)
    matrix.linear(x, bias).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))
    assert bias.grad.shape == (0,)


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def one_column(values: torch.Tensor) -> MackoMatrix:
    """The [n, 1] matrix that stores these n values, zeros, NaN and infinity too: a multiple of 8 of them."""
    deltas = torch.zeros(len(values) // 2, dtype=torch.uint8)
    return MackoMatrix(values, deltas, torch.arange(len(values) + 1, dtype=torch.int32), (len(values), 1))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal numbers of the same dtype, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", HALVES)
def test_loads_every_value_exactly(dtype: torch.dtype) -> None:
    values = every_half(dtype)
    assert_same(native.cpu_spmv(one_column(values), torch.ones(1, 1), None)[0], values.float())


@pytest.mark.usefixtures("flushed_denormals")
def test_loads_subnormal_halves_where_subnormal_floats_are_flushed() -> None:
    values = every_half(torch.float16)
    y = native.cpu_spmv(one_column(values), torch.ones(1, 1), None)[0]
    x = native.cpu_spmv(canonical.pack(torch.ones(1, 1, dtype=torch.float16)), values[:, None], None)[:, 0]
    torch.set_flush_denormal(False)
    assert_same(y, values.float())
    assert_same(x, values.where(values.isfinite(), torch.nan))


@pytest.mark.parametrize("dtype", HALVES)
def test_activations_come_back_as_they_went_in(dtype: torch.dtype) -> None:
    """But those that are not finite, which are NaN."""
    x = every_half(dtype)[:, None]
    y = native.cpu_spmv(canonical.pack(torch.ones(1, 1, dtype=dtype)), x, None)
    assert_same(y, x.where(x.isfinite(), torch.nan))


@pytest.mark.parametrize("dtype", HALVES)
def test_stores_round_as_torch_does(dtype: torch.dtype) -> None:
    """Products of two halves are exact in float32, so y is that product rounded once: normal, subnormal, zero, infinite."""
    values = every_half(dtype)
    values = values[values.isfinite()]
    generator = torch.Generator().manual_seed(0)
    x = values[torch.randint(len(values), (12, 1), generator=generator)]
    x = torch.cat([x, torch.tensor([[0.5], [1.5], [2**-9], [3.0]]).to(dtype)])
    exact = x.float() * values.float()
    y = native.cpu_spmv(one_column(values), x, None)
    assert_same(y, exact.to(dtype))
    if dtype == torch.float16:  # the sample holds what it is meant to hold
        stored = exact.to(dtype).float()
        middle = (stored - exact).abs() * 2 == 2.0 ** (exact.abs().log2().floor().clamp(min=-14) - 10)
        assert (stored.isinf() & exact.isfinite()).sum() > 1000
        assert ((stored != 0) & (stored.abs() < 2**-14)).sum() > 1000
        assert (middle & stored.isfinite()).sum() > 1000


@pytest.mark.parametrize(
    ("dtype", "product", "bias", "stored"),
    [
        (torch.float16, (2**-6, 2**-5), 1.0, 1.0),  # halfway between 1 and 1 + 2^-10: to the even one below
        (torch.float16, (2**-6, 2**-5), 1 + 2**-10, 1 + 2**-9),  # halfway again: to the even one above
        (torch.float16, (4.0, 3.75), 65504.0, 65504.0),
        (torch.float16, (4.0, 4.0), 65504.0, float("inf")),  # halfway to 2^16, the even one, which is out of range
        (torch.float16, (2**-13, 2**-12), 0.0, 0.0),  # halfway between 0 and the smallest subnormal
        (torch.float16, (2**-13, 3 * 2**-12), 0.0, 2**-23),
        (torch.float16, (2**-13, 2**-12), 2**-14 - 2**-24, 2**-14),  # the largest subnormal rounds up to a normal
        (torch.bfloat16, (2**-4, 2**-4), 1.0, 1.0),
        (torch.bfloat16, (2**-4, 2**-4), 1 + 2**-7, 1 + 2**-6),
        (torch.bfloat16, (2.0**63, 2.0**56), (2 - 2**-7) * 2.0**127, float("inf")),
        (torch.bfloat16, (2.0**63, 2.0**55), (2 - 2**-7) * 2.0**127, (2 - 2**-7) * 2.0**127),
    ],
)
def test_ties_go_to_even(dtype: torch.dtype, product: tuple[float, float], bias: float, stored: float) -> None:
    w, x = product
    for sign in (1, -1):
        matrix = canonical.pack(torch.tensor([[w]], dtype=dtype))
        y = matrix.linear(torch.tensor([[x * sign]], dtype=dtype), torch.tensor([bias * sign], dtype=dtype))
        assert y.item() == stored * sign


@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight = sparse(6, 40, 0.5, dtype)
    matrix = canonical.pack(weight)
    arrays = (matrix.values, matrix.deltas, matrix.row_offsets)
    x, bias = torch.randn(3, 40).to(x_dtype), torch.randn(6).to(x_dtype)
    torch.library.opcheck(torch.ops.macko.spmv, (x, *arrays, bias))
    torch.library.opcheck(torch.ops.macko.spmv, (x, *arrays, None))
    if x_dtype == dtype:
        torch.library.opcheck(torch.ops.macko.unpack, (*arrays, 40))
        torch.library.opcheck(torch.ops.macko.pack, (weight,))


@given(products())
@settings(max_examples=30, deadline=None)
def test_plain_torch_of_other_devices_agrees(
    product: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> None:
    x, weight, bias = product
    arrays = canonical._pack_any(weight)
    for plain, fast in zip(arrays, torch.ops.macko.pack(weight), strict=True):
        assert torch.equal(plain, fast)
    assert torch.equal(canonical._unpack_any(*arrays, weight.shape[1]), weight)
    y = canonical._spmv_any(x.float(), *arrays, None if bias is None else bias.float())
    assert_within_rounding(y, x.float(), weight, None if bias is None else bias.float())


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_byte(threads: int) -> None:
    """Large enough for csrc/cpu/parallel.h to use eight threads, and rows of odd lengths, which share bytes of deltas."""
    weight = sparse(4099, 777, 0.6, torch.float16)
    x = torch.randn(canonical.SPMV_MAX_TOKENS, 777)  # of more, torch's product may depend on threads
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            matrix = canonical.pack(weight)
            results.append(
                [
                    matrix.values,
                    matrix.deltas,
                    matrix.row_offsets,
                    canonical.unpack(matrix),
                    matrix.linear(x, None),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert weight.numel() // 2**18 >= 8
    assert matrix.row_offsets[-1] * 4 // 2**18 >= 8
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)
    assert torch.equal(results[0][3], weight)


def test_linear_refuses_another_width_or_kind() -> None:
    matrix = canonical.pack(torch.ones(3, 5, dtype=torch.float16))
    with pytest.raises(FormatError, match=r"input has 4 features and the matrix 5 columns; give it \[\.\.\., 5\]\.$"):
        matrix.linear(torch.ones(2, 4), None)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(FormatError, match=f"input is {dtype}; convert it to float16"):
            matrix.linear(torch.ones(2, 5, dtype=dtype), None)


def test_validate_names_the_layer() -> None:
    matrix = canonical.pack(torch.ones(3, 5, dtype=torch.float16))
    canonical.validate(matrix, "layer")
    with pytest.raises(FormatError, match=r"^layer is not valid MACKO data"):
        canonical.validate(MackoMatrix(matrix.values, matrix.deltas, matrix.row_offsets, (3, 4)), "layer")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_a_token_that_is_not_finite_spoils_its_whole_product(value: float, tokens: int) -> None:
    """In rows with an entry at its column and in those without, with few tokens and with many, as in a dense product."""
    weight = torch.zeros(4, 24, dtype=torch.float16)
    weight[0, 3], weight[1, 5], weight[2, 3:5] = 1, 2, 3
    for dtype in (torch.float16, torch.float32):
        x = torch.ones(tokens, 24, dtype=dtype)
        x[tokens - 1, 3] = value
        y = canonical.pack(weight).linear(x, torch.ones(4, dtype=dtype))
        assert not y[tokens - 1].isfinite().any()
        assert torch.equal(y[: tokens - 1], torch.tensor([2, 3, 7, 1], dtype=dtype).expand(tokens - 1, 4))
