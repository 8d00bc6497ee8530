"""What both layouts of a CPU promise, against float64 and canonical bytes, with every set of instructions that this CPU has."""

import copy
import ctypes
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import ACTIVATIONS, HALVES, assert_same, assert_within_rounding, every_half, products, sparse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import bitmap, canonical, cpu_layout, strips
from macko_llm.layouts.cpu_layout import CpuLayout
from macko_llm.linear import ARRAY_NAMES, MackoLinear

pytestmark = pytest.mark.usefixtures("instructions")
with_fixtures = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
whatever_instructions = pytest.mark.parametrize(
    "instructions", [native.INSTRUCTIONS[native.library().macko_cpu_instructions()]], indirect=True
)
"""For what torch sees of a layout: the most that this CPU can do, only."""


class Kind(NamedTuple):
    """A layout, and matrices that it is for."""

    arrange: Callable[[MackoMatrix], CpuLayout]
    rows: int
    sparsity: float

    def make(self, weight: Tensor) -> CpuLayout:
        return self.arrange(canonical.pack(weight))


KINDS = {
    "bitmap": Kind(bitmap.arrange, 9, 0.5),
    "strips": Kind(lambda matrix: strips.make(bitmap.arrange(matrix)), 270, 0.9),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arranged_layer(kind: Kind, weight: Tensor, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> MackoLinear:
    """A layer whose weight is in this layout, whether it suits or not."""
    monkeypatch.setattr(strips, "arrange", strips.make if kind is KINDS["strips"] else lambda _: None)
    layer = MackoLinear.from_matrix(canonical.pack(weight), bias)
    layer.arrange()
    assert type(layer.packed) is type(kind.make(weight))
    return layer


# Products


@given(products())
@with_fixtures
def test_products_are_within_rounding_of_float64(kind: Kind, product: tuple[Tensor, Tensor, Tensor | None]) -> None:
    x, weight, bias = product
    matrix = kind.make(weight)
    y = matrix._op("spmv")(x, matrix.data, bias, matrix.dtype, matrix.numbers)
    assert y.shape == (len(x), len(weight))
    assert_within_rounding(y, x, weight, bias)
    if x.dtype in (weight.dtype, torch.float32):
        assert_within_rounding(matrix.linear(x, bias), x, weight, bias)


@given(
    shape=st.tuples(
        st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257]) | st.integers(0, 600),
        st.sampled_from([1, 31, 127, 128, 129, 256]) | st.integers(1, 400),
    )
    | st.tuples(st.integers(0, 9), st.sampled_from([1, 31, 32, 33, 64]) | st.integers(1, 3000)),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
@with_fixtures
def test_the_dense_matrix_its_product_and_the_canonical_bytes_come_back(
    kind: Kind, shape: tuple[int, int], sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    """With the zeros that bridge gaps of 16 columns and more, and no others."""
    weight = sparse(*shape, sparsity, dtype, seed)
    packed = canonical.pack(weight)
    matrix = kind.arrange(packed)
    again = matrix.canonical()
    for name in ("values", "deltas", "row_offsets"):
        assert torch.equal(getattr(again, name).view(torch.uint8), getattr(packed, name).view(torch.uint8))
    assert torch.equal(matrix.dense().view(torch.int16), (weight + 0.0).view(torch.int16))
    x = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(seed))
    for inputs in (x, x.to(dtype)):
        assert_within_rounding(matrix.linear(inputs, None), inputs, weight, None)


@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
def test_tokens_together_are_what_they_are_alone(kind: Kind, x_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float16
    weight = sparse(kind.rows, 1000, kind.sparsity, dtype)
    matrix = kind.make(weight)
    most = matrix.few_tokens(x_dtype)
    assert most >= 6
    x = torch.randn(most, 1000).to(x_dtype)
    alone = torch.cat([matrix.linear(token[None], None) for token in x])
    for count in range(2, most + 1):
        assert torch.equal(matrix.linear(x[:count], None), alone[:count])
    assert_within_rounding(alone, x, weight, None)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_full_row_of_very_many_columns_among_empty_ones(kind: Kind, dtype: torch.dtype) -> None:
    weight = torch.zeros(18, 131072, dtype=dtype)
    weight[16] = torch.randn(131072, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = kind.make(weight)
    assert torch.equal(matrix.dense(), weight)
    for x_dtype in (dtype, torch.float32):
        x = torch.randn(2, 131072, generator=torch.Generator().manual_seed(1)).to(x_dtype)
        assert_within_rounding(matrix.linear(x, None), x, weight, None)


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 9, 256, 511, 512, 900, 10000])
def test_more_tokens_are_multiplied_with_dense_rows(
    kind: Kind, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of strips, whole chunks of them."""
    monkeypatch.setattr(cpu_layout, "DENSE_ELEMENTS", rows_at_a_time * 30)
    for dtype in HALVES:
        weight, bias = torch.randint(-4, 5, (900, 30)).to(dtype), torch.arange(900.0)
        matrix = kind.make(weight)
        x = torch.randint(-4, 5, (2, matrix.few_tokens(torch.float32), 30)).float()
        # Small whole numbers: every sum is exact.
        assert torch.equal(matrix.linear(x, bias), x @ weight.float().T + bias)
        assert torch.equal(matrix.linear(x.double(), None), x.double() @ weight.double().T)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [1, 2, 9, 33, 65])
def test_a_token_that_is_not_finite_spoils_its_whole_product(kind: Kind, value: float, tokens: int) -> None:
    for dtype in HALVES:
        weight = torch.zeros(4, 40, dtype=dtype)
        weight[0, 3], weight[1, 35], weight[2, 3:5] = 1, 2, 3
        for x_dtype in ACTIVATIONS:
            x = torch.ones(tokens, 40, dtype=x_dtype)
            x[tokens - 1, 3] = value
            y = kind.make(weight).linear(x, torch.ones(4, dtype=x_dtype))
            assert not y[tokens - 1].isfinite().any()
            assert torch.equal(y[: tokens - 1], torch.tensor([2, 3, 7, 1], dtype=x_dtype).expand(tokens - 1, 4))


def test_inputs_at_any_address(kind: Kind) -> None:
    weight = sparse(5, 77, 0.5, torch.bfloat16)
    matrix = kind.make(weight)
    for dtype in (torch.bfloat16, torch.float32):
        memory = torch.randn(3 * 77 + 5).to(dtype)
        for at in range(5):
            x = memory[at : at + 3 * 77].view(3, 77)
            assert torch.equal(matrix.linear(x, None), matrix.linear(x.clone(), None))
        turned = torch.randn(77, 2).to(dtype).t()
        assert_within_rounding(matrix.linear(turned, None), turned, weight, None)


def test_a_matrix_without_values(kind: Kind) -> None:
    zeros = kind.make(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert torch.equal(zeros.linear(torch.ones(1, 5).bfloat16(), torch.ones(3).bfloat16()), torch.ones(1, 3).bfloat16())


def test_a_matrix_without_rows(kind: Kind) -> None:
    """A few tokens, many, and with a gradient."""
    nothing = kind.make(torch.zeros(0, 5, dtype=torch.float16))
    assert nothing.dense().shape == (0, 5)
    assert nothing.linear(torch.ones(2, 3, 5), None).shape == (2, 3, 0)
    assert nothing.linear(torch.ones(100, 5), torch.ones(0)).shape == (100, 0)
    assert nothing.linear(torch.ones(2, 5).double(), None).shape == (2, 0)
    x, bias = torch.ones(3, 5, requires_grad=True), torch.ones(0, requires_grad=True)
    nothing.linear(x, bias).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))
    assert bias.grad.shape == (0,)


# Numbers that instructions may round away


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_float", [False, True])
def test_every_value_is_multiplied_exactly(kind: Kind, dtype: torch.dtype, is_float: bool) -> None:
    values = every_half(dtype)
    values = values[values.isfinite()]
    x = torch.ones(1, 1, dtype=torch.float32 if is_float else dtype)
    assert_same(kind.make(values[:, None]).linear(x, None)[0], values.to(x.dtype))
    ones = kind.make(torch.ones(1, 1, dtype=dtype))
    # One token at a time: the smallest of all decides for all.
    for token in values[:: len(values) // 200, None, None]:
        assert_same(ones.linear(token, None), token)


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_inputs_keep_all_their_bits(kind: Kind, dtype: torch.dtype) -> None:
    """Of every exponent, in every column, for the first and the second entry of a row."""
    weight = torch.eye(256, dtype=dtype)
    matrix = kind.make(torch.cat([weight, weight + weight.roll(1, 1)]))
    bits = torch.randint(0, 255 << 23, (1, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)
    y = matrix.linear(x, None)
    assert torch.equal(y[:, :256], x)
    assert torch.equal(y[:, 256:], x + x.roll(-1, 1))


def test_subnormal_halves_where_subnormal_floats_are_flushed(kind: Kind) -> None:
    values = every_half(torch.float16)
    values = values[values.isfinite()]
    matrix, one = kind.make(values[:, None]), kind.make(torch.ones(1, 1, dtype=torch.float16))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    try:
        y = matrix.multiply(torch.ones(1, 1), None)[0]
        x = one.multiply(values[:, None], None)[:, 0]
    finally:
        torch.set_flush_denormal(False)
    assert_same(y, values.float())
    assert_same(x, values)


@pytest.mark.parametrize(
    ("weight", "x"),
    [
        ([2.0**-70], [2.0**-60]),  # a product that is a subnormal float32
        ([2.0**-130], [2.0**100]),
        ([2.0**100], [2.0**-130]),
        ([1 + 2**-7, -1.0], [2.0**-120, 2.0**-120]),  # two normal products whose sum is subnormal
        ([2.0**-60, -(2.0**-60)], [2.0**-66 * (1 + 2**-7), 2.0**-66]),
    ],
)
def test_bfloat16_keeps_what_is_below_the_normal_float32(kind: Kind, weight: list[float], x: list[float]) -> None:
    weights, inputs = torch.tensor([weight]).bfloat16(), torch.tensor([x]).bfloat16()
    exact = (inputs.double() @ weights.double().T).bfloat16()
    assert exact.item() != 0
    assert torch.equal(kind.make(weights).linear(inputs, None), exact)


@given(low=st.integers(-133, 10), x_low=st.integers(-133, 10), seed=st.integers(0, 2**32))
@with_fixtures
def test_bfloat16_of_any_size(kind: Kind, low: int, x_low: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        (torch.randn(*shape, generator=generator).double() * 2.0 ** torch.randint(at, 11, shape, generator=generator))
        for shape, at in (((5, 70), low), ((1, 70), x_low))
    )
    weight, x = weight.bfloat16(), x.bfloat16()
    assert_within_rounding(kind.make(weight).linear(x, None), x, weight, None)


# Memory and threads


def test_threads_change_no_byte(kind: Kind) -> None:
    weight, x = sparse(2049, 1000, 0.5, torch.float16), torch.randn(2, 1000)
    packed = canonical.pack(weight)
    assert packed.row_offsets[-1] // 2**18 >= 3  # enough for three threads of their own (csrc/cpu/parallel.h)
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            matrix = kind.arrange(packed)
            results.append([matrix.data, matrix.dense(), matrix.linear(x, None), torch.tensor(matrix.numbers)])
    for together in results[1:]:
        for one, other in zip(results[0], together, strict=True):
            assert torch.equal(one, other)


def test_the_threads_are_those_of_the_runtime_that_torch_uses(kind: Kind) -> None:
    """As many as torch is told to use; and if the runtime grants only one, that one does all of it."""
    asked = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team_of_one(function: Callable, data: int, threads: int, flags: int) -> None:
        asked.append((threads, flags))
        function(data)

    weight, x = sparse(2049, 1000, 0.5, torch.bfloat16), torch.randn(1, 1000)
    expected = kind.make(weight).linear(x, None)
    try:
        with threads(3):
            for team in (ctypes.cast(team_of_one, ctypes.c_void_p), None):
                native.library().macko_cpu_use_openmp(team)
                matrix = kind.make(weight)
                assert torch.equal(matrix.linear(x, None), expected)
                assert torch.equal(matrix.dense(), weight)
    finally:
        native.library().macko_cpu_use_openmp(native._threads_of_torch())
    assert set(asked) == {(3, 0)}
    assert len(asked) >= 4  # two to make it, product, dense


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_copies_have_a_struct_of_their_own(kind: Kind, remake: Callable[[CpuLayout], CpuLayout]) -> None:
    matrix = kind.make(sparse(5, 77, kind.sparsity, torch.float16))
    x = torch.randn(1, 77)
    expected = matrix.linear(x, None)
    assert matrix.struct.rows == 5  # fills the cache
    twin = remake(matrix)
    matrix.data.zero_()
    assert twin.numbers == matrix.numbers
    assert torch.equal(twin.linear(x, None), expected)


def test_the_library_refuses_instructions_that_are_not_there(kind: Kind) -> None:
    weight = torch.ones(2, 3, dtype=torch.float16)
    packed = canonical.pack(weight)
    bits, matrix = bitmap.arrange(packed), kind.make(weight)
    for number in (-1, native.library().macko_cpu_instructions() + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "cpu_instructions", lambda number=number: number)
            with pytest.raises(NativeError, match="refused its arguments"):
                matrix.multiply(torch.ones(1, 3), None)
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_bitmap_unpack(bits.struct, torch.ones(2, 3).half())
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_bitmap_fill(packed, bits.struct)
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_pack(weight)


# What torch sees


@whatever_instructions
@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(kind: Kind, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    matrix = kind.make(sparse(6, 40, kind.sparsity, dtype))
    x, bias = torch.randn(3, 40).to(x_dtype), torch.randn(6).to(x_dtype)
    for values in (bias, None):
        torch.library.opcheck(matrix._op("spmv").default, (x, matrix.data, values, dtype, matrix.numbers))
        torch.library.opcheck(matrix._op("dense_product").default, (x, matrix.data, values, dtype, matrix.numbers))
    torch.library.opcheck(matrix._op("unpack").default, (matrix.data, dtype, matrix.numbers))


@whatever_instructions
def test_a_gradient_keeps_the_layout_and_not_the_dense_weight(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(6, 40, 0.5, torch.float16)
    layer = arranged_layer(kind, weight, torch.randn(6).half(), monkeypatch)
    x = torch.randn(3, 40, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    upstream = torch.randn(3, 6)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream @ weight.float())
    assert any(tensor.data_ptr() == layer.weight_layout.data_ptr() for tensor in saved)
    assert all(tensor.shape != weight.shape for tensor in saved)


@whatever_instructions
def test_an_arranged_layer_compiles_into_one_graph(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    layer = arranged_layer(kind, sparse(6, 40, 0.5, torch.float16), None, monkeypatch)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3, 17, 65):
        x = torch.randn(tokens, 40)
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))


def test_the_state_of_an_arranged_layer_is_canonical(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(6, 400, 0.95, torch.bfloat16)
    packed = canonical.pack(weight)
    layer = arranged_layer(kind, weight, None, monkeypatch)
    assert not list(layer.parameters())
    state = layer.state_dict()
    for name, array in zip(ARRAY_NAMES, (packed.values, packed.deltas, packed.row_offsets), strict=True):
        assert torch.equal(state[name], array)


class _Counting(TorchDispatchMode):
    """Counts the ops of this package that pass through torch's dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.calls += "macko" in str(func)
        return func(*args, **(kwargs or {}))


def test_whoever_wants_to_see_the_op_sees_it(kind: Kind) -> None:
    """Calls go past torch's dispatcher, with the same result, where nothing watches: modes and tracers do."""
    matrix = kind.make(every_half(torch.float16)[:2048].reshape(32, 64).nan_to_num(0, 0, 0))
    x, other = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half().split(1)
    assert matrix._is_plain(x, None)
    plain = matrix.linear(x, None)
    with _Counting() as mode:
        assert torch.equal(matrix.linear(x, None), plain)
    assert mode.calls == 1
    with torch.profiler.profile() as profiler:
        matrix.linear(x, None)
    assert any(event.name == f"macko::{matrix.name}_spmv" for event in profiler.events())
    traced = torch.jit.trace(lambda x: matrix.linear(x, None), (x,))
    assert torch.equal(traced(other), matrix.linear(other, None))
    assert not torch.equal(traced(other), plain)
