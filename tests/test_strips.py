"""The CPU's layout for high sparsity against float64, canonical bytes and a naive reader, with every set of instructions."""

import copy
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import ACTIVATIONS, HALVES, assert_same, assert_within_rounding, every_half, products, sparse
from torch import Tensor

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.layouts import bitmap, canonical, cpu_layout, strips
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.layouts.strips import StripsMatrix
from macko_llm.linear import MackoLinear

with_fixtures = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, params=native.INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if native.INSTRUCTIONS.index(request.param) > native.library().macko_cpu_instructions():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("MACKO_CPU", request.param)
    native.cpu_instructions.cache_clear()
    yield request.param
    native.cpu_instructions.cache_clear()


def make(weight: Tensor) -> StripsMatrix:
    return strips.make(bitmap.arrange(canonical.pack(weight)))


def pruned(rows: int, cols: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    """Rows that are alike, as pruning leaves them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    return (weight * (torch.rand(rows, cols, generator=generator) >= sparsity)).to(dtype)


def arranged(weight: Tensor) -> StripsMatrix | None:
    """As on one thread, for which any number of rows is enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return strips.arrange(bitmap.arrange(canonical.pack(weight)))
    finally:
        torch.set_num_threads(before)


@given(products())
@with_fixtures
def test_products_are_within_rounding_of_float64(product: tuple[Tensor, Tensor, Tensor | None]) -> None:
    x, weight, bias = product
    matrix = make(weight)
    y = torch.ops.macko.strips_spmv(x, matrix.data, bias, matrix.dtype, matrix.numbers)
    assert y.shape == (len(x), len(weight))
    assert_within_rounding(y, x, weight, bias)
    if x.dtype in (weight.dtype, torch.float32):
        assert_within_rounding(matrix.linear(x, bias), x, weight, bias)


@given(
    rows=st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257]) | st.integers(0, 600),
    cols=st.sampled_from([1, 31, 127, 128, 129, 256]) | st.integers(1, 400),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
@with_fixtures
def test_the_dense_matrix_its_product_and_the_canonical_bytes_come_back(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse(rows, cols, sparsity, dtype, seed)
    packed = canonical.pack(weight)
    matrix = strips.make(bitmap.arrange(packed))
    again = matrix.canonical()
    for name in ("values", "deltas", "row_offsets"):
        assert torch.equal(getattr(again, name).view(torch.uint8), getattr(packed, name).view(torch.uint8))
    assert torch.equal(matrix.dense().view(torch.int16), (weight + 0.0).view(torch.int16))
    x = torch.randn(2, cols, generator=torch.Generator().manual_seed(seed))
    for inputs in (x, x.to(dtype)):
        assert_within_rounding(matrix.linear(inputs, None), inputs, weight, None)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_bytes_are_groups_lengths_rows_and_starts(dtype: torch.dtype) -> None:
    """Read by a loop that follows csrc/macko.h, which finds the rows sorted."""
    rows, cols = 300, 200
    weight = sparse(rows, cols, 0.9, dtype)
    matrix = make(weight)
    data = matrix.data.numpy()
    sizes = [matrix.groups * 96, 2 * 2 * 16, 2 * 2 * 256, 3 * 8]
    ends = np.cumsum([64 * -(-size // 64) for size in sizes]).tolist()
    assert len(data) == ends[3]
    lengths = data[ends[0] : ends[0] + sizes[1]].reshape(2, 2, 16)
    ids = data[ends[1] : ends[1] + sizes[2]].reshape(2, 2, 16, 16)
    starts = data[ends[2] : ends[2] + sizes[3]].view(np.int64)
    assert (np.diff(lengths.astype(int), axis=2) <= 0).all()
    assert starts.tolist() == [0, int(lengths[0].sum()), int(lengths.sum())]
    read, at = torch.zeros(512, 256, dtype=torch.int16), 0
    for chunk, strip, tile in np.ndindex(2, 2, 16):
        for _ in range(lengths[chunk, strip, tile]):
            group = data[at * 96 : at * 96 + 96]
            values = group[32:].view(np.int16)
            for slot in range(32):
                row = ids[chunk, strip, tile, slot // 2 if dtype == torch.bfloat16 else slot % 16]
                if values[slot]:
                    read[chunk * 256 + int(row), strip * 128 + int(group[slot])] = int(values[slot])
            at += 1
    assert torch.equal(read[:rows, :cols], (weight + 0.0).view(torch.int16))
    assert not read[rows:].any()
    assert not read[:, cols:].any()
    assert (matrix.count, matrix.smallest) == (int((weight != 0).sum()), make(weight[weight != 0][:, None]).smallest)


@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
def test_tokens_together_are_what_they_are_alone(x_dtype: torch.dtype) -> None:
    weight = sparse(270, 1000, 0.9, torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float16)
    matrix = make(weight)
    most = matrix.few_tokens(x_dtype)
    assert most >= 6
    x = torch.randn(most, 1000).to(x_dtype)
    alone = torch.cat([matrix.linear(token[None], None) for token in x])
    for count in range(2, most + 1):
        assert torch.equal(matrix.linear(x[:count], None), alone[:count])
    assert_within_rounding(alone, x, weight, None)


@pytest.mark.parametrize("rows_at_a_time", [1, 256, 511, 512, 10000])
def test_more_tokens_are_multiplied_with_dense_rows(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks of them."""
    monkeypatch.setattr(cpu_layout, "DENSE_ELEMENTS", rows_at_a_time * 30)
    for dtype in HALVES:
        weight, bias = torch.randint(-4, 5, (900, 30)).to(dtype), torch.arange(900.0)
        matrix = make(weight)
        x = torch.randint(-4, 5, (2, matrix.few_tokens(torch.float32), 30)).float()
        # Small whole numbers: every sum is exact.
        assert torch.equal(matrix.linear(x, bias), x @ weight.float().T + bias)
        assert torch.equal(matrix.linear(x.double(), None), x.double() @ weight.double().T)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_token_that_is_not_finite_spoils_its_whole_product(value: float, tokens: int) -> None:
    for dtype in HALVES:
        weight = torch.zeros(4, 40, dtype=dtype)
        weight[0, 3], weight[1, 35], weight[2, 3:5] = 1, 2, 3
        for x_dtype in ACTIVATIONS:
            x = torch.ones(tokens, 40, dtype=x_dtype)
            x[tokens - 1, 3] = value
            y = make(weight).linear(x, torch.ones(4, dtype=x_dtype))
            assert not y[tokens - 1].isfinite().any()
            assert torch.equal(y[: tokens - 1], torch.tensor([2, 3, 7, 1], dtype=x_dtype).expand(tokens - 1, 4))


# Numbers that instructions may round away


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_float", [False, True])
def test_every_value_is_multiplied_exactly(dtype: torch.dtype, is_float: bool) -> None:
    values = every_half(dtype)
    values = values[values.isfinite()]
    x = torch.ones(1, 1, dtype=torch.float32 if is_float else dtype)
    assert_same(make(values[:, None]).linear(x, None)[0], values.to(x.dtype))
    ones = make(torch.ones(1, 1, dtype=dtype))
    # One token at a time: the smallest of all decides for all.
    for token in values[:: len(values) // 200, None, None]:
        assert_same(ones.linear(token, None), token)


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_inputs_keep_all_their_bits(dtype: torch.dtype) -> None:
    """Of every exponent, in every column, for the first and the second entry of a row."""
    weight = torch.eye(256, dtype=dtype)
    matrix = make(torch.cat([weight, weight + weight.roll(1, 1)]))
    bits = torch.randint(0, 255 << 23, (1, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)
    y = matrix.linear(x, None)
    assert torch.equal(y[:, :256], x)
    assert torch.equal(y[:, 256:], x + x.roll(-1, 1))


@pytest.mark.parametrize(
    ("weight", "x"),
    [
        ([2.0**-70], [2.0**-60]),  # a product that is a subnormal float32
        ([2.0**-130], [2.0**100]),
        ([2.0**100], [2.0**-130]),
        ([1 + 2**-7, -1.0], [2.0**-120, 2.0**-120]),  # two normal products whose sum is subnormal
    ],
)
def test_bfloat16_keeps_what_is_below_the_normal_float32(weight: list[float], x: list[float]) -> None:
    weights, inputs = torch.tensor([weight]).bfloat16(), torch.tensor([x]).bfloat16()
    exact = (inputs.double() @ weights.double().T).bfloat16()
    assert exact.item() != 0
    assert torch.equal(make(weights).linear(inputs, None), exact)


# Memory and threads


def test_threads_change_no_byte() -> None:
    weight, x = pruned(1200, 1000, 0.3, torch.float16), torch.randn(2, 1000)
    bits = bitmap.arrange(canonical.pack(weight))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            matrix = strips.make(bits)
            results.append([matrix.data, matrix.dense(), matrix.linear(x, None)])
    finally:
        torch.set_num_threads(before)
    assert bits.count // 2**18 >= 3  # enough for three threads (csrc/cpu/parallel.h)
    for together in results[1:]:
        for one, other in zip(results[0], together, strict=True):
            assert torch.equal(one, other)


def test_a_matrix_without_rows_and_one_without_values() -> None:
    nothing = make(torch.zeros(0, 5, dtype=torch.float16))
    assert nothing.linear(torch.ones(2, 3, 5), None).shape == (2, 3, 0)
    assert nothing.dense().shape == (0, 5)
    zeros = make(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert torch.equal(zeros.linear(torch.ones(1, 5).bfloat16(), torch.ones(3).bfloat16()), torch.ones(1, 3).bfloat16())


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_copies_have_a_struct_of_their_own(remake: Callable[[StripsMatrix], StripsMatrix]) -> None:
    matrix = make(sparse(5, 77, 0.9, torch.float16))
    x = torch.randn(1, 77)
    expected = matrix.linear(x, None)
    assert matrix.struct.rows == 5  # fills the cache
    twin = remake(matrix)
    matrix.data.zero_()
    assert twin.numbers == matrix.numbers
    assert torch.equal(twin.linear(x, None), expected)


@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    matrix = make(sparse(6, 40, 0.9, dtype))
    x, bias = torch.randn(3, 40).to(x_dtype), torch.randn(6).to(x_dtype)
    for values in (bias, None):
        torch.library.opcheck(torch.ops.macko.strips_spmv, (x, matrix.data, values, dtype, matrix.numbers))
        torch.library.opcheck(torch.ops.macko.strips_dense_product, (x, matrix.data, values, dtype, matrix.numbers))
    torch.library.opcheck(torch.ops.macko.strips_unpack, (matrix.data, dtype, matrix.numbers))


def test_rows_between_chunks_are_refused() -> None:
    matrix = make(sparse(600, 10, 0.5, torch.float16))
    for first, count in ((1, 599), (0, 300), (256, 300), (512, 89)):
        with pytest.raises(NativeError, match="refused its arguments"):
            matrix.unpack_rows(first, torch.empty(count, 10, dtype=torch.float16))


# Which matrices become strips


@pytest.mark.parametrize("dtype", HALVES)
def test_strips_are_for_sparse_matrices_with_avx512(dtype: torch.dtype, instructions: str) -> None:
    kinds = [arranged(pruned(1024, 1024, sparsity, dtype)) for sparsity in (0.5, 0.8, 0.9, 0.95)]
    assert [kind is not None for kind in kinds] == [False, False, *([instructions == "avx512"] * 2)]


def test_strips_take_hardly_more_memory_than_the_bitmap() -> None:
    """Wherever rows are even, and wherever they are not."""
    for weight in (pruned(512, 512, 0.93, torch.float16), sparse(512, 512, 0.95, torch.float16)):
        bits, matrix = bitmap.arrange(canonical.pack(weight)), arranged(weight)
        assert matrix is None or matrix.data.nbytes <= 1.05 * bits.data.nbytes
    assert arranged(pruned(8, 64, 0.95, torch.float16)) is None  # room for 256 rows


def test_threads_do_not_idle_for_want_of_chunks(instructions: str) -> None:
    bits = bitmap.arrange(canonical.pack(pruned(512, 1024, 0.95, torch.float16)))
    before = torch.get_num_threads()
    try:
        found = []
        for count in (2, 3):
            torch.set_num_threads(count)
            found.append(strips.arrange(bits) is not None)
    finally:
        torch.set_num_threads(before)
    assert found == [instructions == "avx512", False]


def test_a_layer_is_arranged_in_strips_and_its_state_is_canonical(instructions: str) -> None:
    weight = pruned(1024, 512, 0.95, torch.bfloat16)
    packed = canonical.pack(weight)
    layer = MackoLinear.from_matrix(packed, torch.randn(1024).bfloat16())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer.arrange()
    finally:
        torch.set_num_threads(before)
    assert type(layer.packed) is (StripsMatrix if instructions == "avx512" else BitmapMatrix)
    state = layer.state_dict()
    for name in ("values", "deltas", "row_offsets"):
        assert torch.equal(state["weight_" + name], getattr(packed, name))
    x = torch.randn(3, 512, requires_grad=True)
    y = layer(x)
    upstream = torch.randn(3, 1024)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream @ weight.float())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x.detach().bfloat16()), layer(x.detach().bfloat16()))
