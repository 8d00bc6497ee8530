"""The CPU's layout against float64, canonical bytes and a naive reader, with every set of instructions that this CPU has."""

import copy
import ctypes
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import ACTIVATIONS, HALVES, assert_same, assert_within_rounding, every_half, products, sparse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.layouts import bitmap, canonical, cpu_layout
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.linear import ARRAY_NAMES, MackoLinear

with_fixtures = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, params=native.INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if native.INSTRUCTIONS.index(request.param) > native.library().macko_cpu_instructions():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("MACKO_CPU", request.param)
    native.cpu_instructions.cache_clear()
    yield
    native.cpu_instructions.cache_clear()


def arrange(weight: Tensor) -> BitmapMatrix:
    return bitmap.arrange(canonical.pack(weight))


@given(products())
@with_fixtures
def test_products_are_within_rounding_of_float64(product: tuple[Tensor, Tensor, Tensor | None]) -> None:
    x, weight, bias = product
    matrix = arrange(weight)
    y = torch.ops.macko.bitmap_spmv(x, matrix.data, bias, matrix.dtype, matrix.numbers)
    assert y.shape == (len(x), len(weight))
    assert_within_rounding(y, x, weight, bias)
    if x.dtype in (weight.dtype, torch.float32):
        assert_within_rounding(matrix.linear(x, bias), x, weight, bias)


@given(
    rows=st.integers(0, 9),
    cols=st.sampled_from([1, 31, 32, 33, 64]) | st.integers(1, 3000),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
@with_fixtures
def test_the_dense_matrix_and_the_canonical_bytes_come_back(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    """With the zeros that bridge gaps of 16 columns and more, and no others."""
    weight = sparse(rows, cols, sparsity, dtype, seed)
    packed = canonical.pack(weight)
    matrix = bitmap.arrange(packed)
    again = matrix.canonical()
    for name in ("values", "deltas", "row_offsets"):
        assert torch.equal(getattr(again, name).view(torch.uint8), getattr(packed, name).view(torch.uint8))
    assert torch.equal(matrix.dense().view(torch.int16), (weight + 0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_bytes_are_values_bits_and_starts(dtype: torch.dtype) -> None:
    weight = sparse(7, 45, 0.5, dtype)
    weight[2, 44], weight[3] = 1, 0
    matrix = arrange(weight)
    data, kept = matrix.data.numpy(), weight != 0
    count = int(kept.sum())
    ends = [64 * -(-nbytes // 64) for nbytes in ((count + 32) * 2, 7 * 2 * 4, 8 * 4)]
    assert len(data) == sum(ends)
    assert np.array_equal(data[: 2 * count].view(np.int16), weight[kept].view(torch.int16).numpy())
    bits = np.unpackbits(data[ends[0] : ends[0] + 7 * 8].reshape(7, 8), axis=1, bitorder="little")
    assert np.array_equal(bits[:, :45], kept.numpy())
    assert not bits[:, 45:].any()
    starts = data[ends[0] + ends[1] :][: 8 * 4].view(np.int32)
    assert starts.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert (matrix.count, matrix.smallest) == (count, int(weight[kept].abs().view(torch.int16).min()))


def test_zeros_that_bridge_nothing_are_left_out() -> None:
    """They are valid, though `pack` writes none."""
    packed = canonical.pack(torch.ones(2, 8, dtype=torch.float16))
    packed.values[3], packed.values[9] = 0.0, -0.0
    matrix = bitmap.arrange(canonical.validate(packed, "it"))
    assert matrix.count == 14
    assert torch.equal(matrix.dense(), packed.dense())


@pytest.mark.parametrize("x_dtype", ACTIVATIONS)
def test_tokens_together_are_what_they_are_alone(x_dtype: torch.dtype) -> None:
    weight = sparse(9, 1000, 0.5, torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float16)
    matrix = arrange(weight)
    most = matrix.few_tokens(x_dtype)
    assert most >= 6
    x = torch.randn(most, 1000).to(x_dtype)
    alone = torch.cat([matrix.linear(token[None], None) for token in x])
    for count in range(2, most + 1):
        assert torch.equal(matrix.linear(x[:count], None), alone[:count])
    assert_within_rounding(alone, x, weight, None)


def test_full_words_of_rows_that_are_else_empty() -> None:
    weight = torch.zeros(5, 1000, dtype=torch.bfloat16)
    for row, count in enumerate([16, 17, 24, 31, 32]):
        weight[row, 480 : 480 + count] = torch.randn(count).bfloat16()
    x = torch.randn(1, 1000).bfloat16()
    assert_within_rounding(arrange(weight).linear(x, None), x, weight, None)


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 9, 100])
def test_more_tokens_are_multiplied_with_dense_rows(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layout, "DENSE_ELEMENTS", rows_at_a_time * 100)
    for dtype in HALVES:
        weight, bias = torch.randint(-4, 5, (9, 100)).to(dtype), torch.arange(9.0)
        x = torch.randint(-4, 5, (2, 16, 100)).float()
        # Small whole numbers: every sum is exact.
        assert torch.equal(arrange(weight).linear(x, bias), x @ weight.float().T + bias)
        assert torch.equal(arrange(weight).linear(x.double(), None), x.double() @ weight.double().T)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [1, 2, 9, 33])
def test_a_token_that_is_not_finite_spoils_its_whole_product(value: float, tokens: int) -> None:
    for dtype in HALVES:
        weight = torch.zeros(4, 40, dtype=dtype)
        weight[0, 3], weight[1, 35], weight[2, 3:5] = 1, 2, 3
        for x_dtype in (dtype, torch.float32):
            x = torch.ones(tokens, 40, dtype=x_dtype)
            x[tokens - 1, 3] = value
            y = arrange(weight).linear(x, torch.ones(4, dtype=x_dtype))
            assert not y[tokens - 1].isfinite().any()
            assert torch.equal(y[: tokens - 1], torch.tensor([2, 3, 7, 1], dtype=x_dtype).expand(tokens - 1, 4))


# Numbers that instructions may round away


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_float", [False, True])
def test_every_value_is_multiplied_exactly(dtype: torch.dtype, is_float: bool) -> None:
    values = every_half(dtype)
    values = values[values.isfinite()]
    x = torch.ones(1, 1, dtype=torch.float32 if is_float else dtype)
    assert_same(arrange(values[:, None]).linear(x, None)[0], values.to(x.dtype))
    ones = arrange(torch.ones(1, 1, dtype=dtype))
    # One token at a time: the smallest of all decides for all.
    for token in values[:: len(values) // 200, None, None]:
        assert_same(ones.linear(token, None), token)


def test_subnormal_halves_where_subnormal_floats_are_flushed() -> None:
    values = every_half(torch.float16)
    values = values[values.isfinite()]
    matrix, one = arrange(values[:, None]), arrange(torch.ones(1, 1, dtype=torch.float16))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    try:
        y = native.cpu_bitmap_spmv(matrix.struct, torch.ones(1, 1), None)[0]
        x = native.cpu_bitmap_spmv(one.struct, values[:, None], None)[:, 0]
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
def test_bfloat16_keeps_what_is_below_the_normal_float32(weight: list[float], x: list[float]) -> None:
    weights, inputs = torch.tensor([weight]).bfloat16(), torch.tensor([x]).bfloat16()
    exact = (inputs.double() @ weights.double().T).bfloat16()
    assert exact.item() != 0
    assert torch.equal(arrange(weights).linear(inputs, None), exact)


@given(low=st.integers(-133, 10), x_low=st.integers(-133, 10), seed=st.integers(0, 2**32))
@with_fixtures
def test_bfloat16_of_any_size(low: int, x_low: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        (torch.randn(*shape, generator=generator).double() * 2.0 ** torch.randint(at, 11, shape, generator=generator))
        for shape, at in (((5, 70), low), ((1, 70), x_low))
    )
    weight, x = weight.bfloat16(), x.bfloat16()
    assert_within_rounding(arrange(weight).linear(x, None), x, weight, None)


# Memory and threads


def test_threads_change_no_byte() -> None:
    weight, x = sparse(2049, 1000, 0.5, torch.float16), torch.randn(2, 1000)
    packed = canonical.pack(weight)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            matrix = bitmap.arrange(packed)
            results.append([matrix.data, matrix.dense(), matrix.linear(x, None), torch.tensor(matrix.smallest)])
    finally:
        torch.set_num_threads(before)
    assert packed.row_offsets[-1] // 2**18 >= 3  # enough for three threads (csrc/cpu/parallel.h)
    for together in results[1:]:
        for one, other in zip(results[0], together, strict=True):
            assert torch.equal(one, other)


def test_the_threads_are_those_of_the_runtime_that_torch_uses() -> None:
    """As many as torch is told to use; and if the runtime grants only one, that one does all of it."""
    asked = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team_of_one(function: Callable, data: int, threads: int, flags: int) -> None:
        asked.append((threads, flags))
        function(data)

    weight, x = sparse(2049, 1000, 0.5, torch.bfloat16), torch.randn(1, 1000)
    expected = arrange(weight).linear(x, None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for team in (ctypes.cast(team_of_one, ctypes.c_void_p), None):
            native.library().macko_cpu_use_openmp(team)
            matrix = arrange(weight)
            assert torch.equal(matrix.linear(x, None), expected)
            assert torch.equal(matrix.dense(), weight)
    finally:
        torch.set_num_threads(before)
        native.library().macko_cpu_use_openmp(native._threads_of_torch())
    assert set(asked) == {(3, 0)}
    assert len(asked) >= 4  # starts, fill, product, dense


def test_inputs_at_any_address() -> None:
    weight = sparse(5, 77, 0.5, torch.bfloat16)
    matrix = arrange(weight)
    for dtype in (torch.bfloat16, torch.float32):
        memory = torch.randn(3 * 77 + 5).to(dtype)
        for at in range(5):
            x = memory[at : at + 3 * 77].view(3, 77)
            assert torch.equal(matrix.linear(x, None), matrix.linear(x.clone(), None))
        turned = torch.randn(77, 2).to(dtype).t()
        assert_within_rounding(matrix.linear(turned, None), turned, weight, None)


def test_a_matrix_without_rows_and_one_without_values() -> None:
    nothing = arrange(torch.zeros(0, 5, dtype=torch.float16))
    assert nothing.linear(torch.ones(2, 3, 5), None).shape == (2, 3, 0)
    assert nothing.dense().shape == (0, 5)
    zeros = arrange(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert torch.equal(zeros.linear(torch.ones(1, 5).bfloat16(), torch.ones(3).bfloat16()), torch.ones(1, 3).bfloat16())


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_copies_have_a_struct_of_their_own(remake: Callable[[BitmapMatrix], BitmapMatrix]) -> None:
    matrix = arrange(sparse(5, 77, 0.5, torch.float16))
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
    matrix = arrange(sparse(6, 40, 0.5, dtype))
    x, bias = torch.randn(3, 40).to(x_dtype), torch.randn(6).to(x_dtype)
    for values in (bias, None):
        torch.library.opcheck(torch.ops.macko.bitmap_spmv, (x, matrix.data, values, dtype, matrix.numbers))
        torch.library.opcheck(torch.ops.macko.bitmap_dense_product, (x, matrix.data, values, dtype, matrix.numbers))
    torch.library.opcheck(torch.ops.macko.bitmap_unpack, (matrix.data, dtype, matrix.numbers))


def test_a_gradient_keeps_the_layout_and_not_the_dense_weight() -> None:
    weight = sparse(6, 40, 0.5, torch.float16)
    layer = MackoLinear.from_matrix(canonical.pack(weight), torch.randn(6).half())
    layer.arrange()
    x = torch.randn(3, 40, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    upstream = torch.randn(3, 6)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream @ weight.float())
    assert any(tensor.data_ptr() == layer.weight_layout.data_ptr() for tensor in saved)
    assert all(tensor.shape != weight.shape for tensor in saved)


def test_an_arranged_layer_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    layer = MackoLinear.from_matrix(canonical.pack(sparse(6, 40, 0.5, torch.float16)))
    layer.arrange()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, 40)
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))


def test_the_state_of_an_arranged_layer_is_canonical() -> None:
    packed = canonical.pack(sparse(6, 400, 0.95, torch.bfloat16))
    layer = MackoLinear.from_matrix(packed)
    layer.arrange()
    assert not list(layer.parameters())
    state = layer.state_dict()
    for name, array in zip(ARRAY_NAMES, (packed.values, packed.deltas, packed.row_offsets), strict=True):
        assert torch.equal(state[name], array)


# Which instructions


def test_the_environment_names_instructions_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(macko_cpu_instructions=lambda: 1))
    monkeypatch.setattr(native, "INSTRUCTIONS", ("portable", "avx2", "avx512"))
    for name, number in (("portable", 0), ("avx2", 1), ("", 1)):
        monkeypatch.setenv("MACKO_CPU", name)
        native.cpu_instructions.cache_clear()
        assert native.cpu_instructions() == number
    for name in ("avx512", "AVX2", "neon"):
        monkeypatch.setenv("MACKO_CPU", name)
        native.cpu_instructions.cache_clear()
        with pytest.raises(NativeError, match=f"^MACKO_CPU is '{name}'; here it can be portable or avx2, or unset\\.$"):
            native.cpu_instructions()


def test_the_library_refuses_instructions_that_are_not_there() -> None:
    weight = torch.ones(2, 3, dtype=torch.float16)
    packed = canonical.pack(weight)
    matrix = bitmap.arrange(packed)
    for number in (-1, native.library().macko_cpu_instructions() + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "cpu_instructions", lambda number=number: number)
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_bitmap_spmv(matrix.struct, torch.ones(1, 3), None)
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_bitmap_unpack(matrix.struct, torch.ones(2, 3).half())
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_bitmap_fill(packed, matrix.struct)
            with pytest.raises(NativeError, match="refused its arguments"):
                native.cpu_pack(weight)


class _Counting(TorchDispatchMode):
    """Counts the ops of this package that pass through torch's dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.calls += "macko" in str(func)
        return func(*args, **(kwargs or {}))


def test_whoever_wants_to_see_the_op_sees_it() -> None:
    """Calls go past torch's dispatcher, with the same result, where nothing watches: modes and tracers do."""
    matrix = arrange(every_half(torch.float16)[:2048].reshape(32, 64).nan_to_num(0, 0, 0))
    x, other = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half().split(1)
    assert matrix._is_plain(x, None)
    plain = matrix.linear(x, None)
    with _Counting() as mode:
        assert torch.equal(matrix.linear(x, None), plain)
    assert mode.calls == 1
    with torch.profiler.profile() as profiler:
        matrix.linear(x, None)
    assert any(event.name == "macko::bitmap_spmv" for event in profiler.events())
    traced = torch.jit.trace(lambda x: matrix.linear(x, None), (x,))
    assert torch.equal(traced(other), matrix.linear(other, None))
    assert not torch.equal(traced(other), plain)
