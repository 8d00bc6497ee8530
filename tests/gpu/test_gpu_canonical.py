"""The CUDA kernels that work on the canonical arrays: format.py's bytes, float64's products, and good manners on a GPU."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ops import assert_same, assert_within_rounding, every_half, one_column, sparse
from torch import Tensor

from macko_llm import format as spec
from macko_llm import native
from macko_llm.cli.doctor import _facts
from macko_llm.errors import FormatError, NativeError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear

GPU = torch.device("cuda", 0)
HALVES = [torch.float16, torch.bfloat16]
LONG_ROW = 16384
"""Rows with more entries are shared by the warps of a block: kLongRow of csrc/cuda/spmv_rows.cu."""


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if not native.has_cuda():
        pytest.skip("the native library was built without CUDA")


def moved(matrix: MackoMatrix, device: torch.device | str = GPU) -> canonical.Canonical:
    return canonical.Canonical(*(array.to(device) for array in arrays(matrix)), matrix.shape)


def arrays(matrix: MackoMatrix) -> tuple[Tensor, Tensor, Tensor]:
    return matrix.values, matrix.deltas, matrix.row_offsets


def signs(rows: int, cols: int, dtype: torch.dtype, sparsity: float = 0.5) -> Tensor:
    """Random -1, 0, 1: products with whole numbers are whole numbers, and exact in float32 in any order."""
    return sparse(rows, cols, sparsity, dtype).sign()


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0))


def some_rows(rows: int, cols: int, full: list[int]) -> Tensor:
    weight = torch.zeros(rows, cols)
    weight[full] = signs(len(full), cols, torch.float32, 0.0) + 2.0
    return weight


def columns(rows: int, cols: int, chosen: slice) -> Tensor:
    weight = torch.zeros(rows, cols)
    weight[:, chosen] = 1.5
    return weight


MATRICES = {
    "one element": torch.ones(1, 1),
    "no rows": torch.ones(0, 5),
    "all zero": torch.zeros(33, 172),
    "negative zeros": torch.full((3, 40), -0.0),
    "full": signs(33, 172, torch.float32, 0.0).abs() + 1,
    "half": signs(33, 172, torch.float32),
    "one column": signs(1000, 1, torch.float32),
    "very wide": signs(7, 131072, torch.float32),
    "wide, one in a hundred": signs(7, 131072, torch.float32, 0.99),
    "the last column": columns(5, 131072, slice(-1, None)),
    "gaps of 15": columns(3, 997, slice(15, None, 16)),
    "gaps of 16": columns(3, 997, slice(16, None, 17)),
    "gaps of 32": columns(3, 997, slice(32, None, 33)),
    "a full row among empty ones": some_rows(300, 4096, [137]),
    "long rows among empty ones": some_rows(21, LONG_ROW + 301, [0, 9, 10, 20]),
    "a row of the limit": some_rows(3, LONG_ROW, [1]),
    "a row beyond the limit": some_rows(3, LONG_ROW + 1, [1]),
}


def assert_packs_like_the_spec(weight: Tensor) -> None:
    """Pack, spans, validation and unpack of a matrix on the CPU against format.py, byte for byte."""
    expected = spec.pack(weight)
    matrix = canonical.pack(weight.to(GPU))
    for array, other in zip(arrays(matrix), arrays(expected), strict=True):
        assert (array.device, array.dtype) == (GPU, other.dtype)
        assert torch.equal(array.view(torch.uint8).cpu(), other.view(torch.uint8))
    spans = native.cuda_row_spans(matrix.deltas, matrix.row_offsets)
    assert torch.equal(spans.cpu(), spec.row_spans(expected.deltas, expected.row_offsets))
    canonical.validate(matrix, "layer")
    unpacked = canonical.unpack(matrix)
    assert (unpacked.device, unpacked.dtype) == (GPU, weight.dtype)
    assert torch.equal(unpacked.cpu().view(torch.int16), spec.unpack(expected).view(torch.int16))
    assert torch.equal(unpacked.cpu(), weight)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MATRICES)
def test_bytes_are_those_of_the_spec(name: str, dtype: torch.dtype) -> None:
    assert_packs_like_the_spec(MATRICES[name].to(dtype))


@given(
    rows=st.integers(0, 70),
    cols=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 172, 1023, 1024, 1025]) | st.integers(1, 3000),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.97, 0.999, 1.0]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
@example(rows=33, cols=172, sparsity=0.5, dtype=torch.bfloat16, seed=0)
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_matrix_are_those_of_the_spec(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    assert_packs_like_the_spec(sparse(rows, cols, sparsity, dtype, seed))


def test_packs_a_matrix_that_is_not_contiguous() -> None:
    weight = sparse(172, 33, 0.5, torch.float16)
    expected, actual = spec.pack(weight.t()), canonical.pack(weight.to(GPU).t())
    assert all(torch.equal(*pair) for pair in zip(arrays(moved(expected)), arrays(actual), strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MATRICES)
def test_whole_numbers_multiply_exactly(name: str, dtype: torch.dtype) -> None:
    """Every sum is exact in float32, so that y is the exact product rounded once."""
    weight = MATRICES[name].to(dtype)
    rows, cols = weight.shape
    matrix = moved(spec.pack(weight))
    for tokens in (0, 1, 2, 3, 7):
        x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
        exact = x.double() @ weight.double().T
        for x_dtype in (dtype, torch.float32):
            y = torch.ops.macko.spmv(x.to(GPU, x_dtype), *arrays(matrix), None)
            assert (y.shape, y.dtype, y.device) == ((tokens, rows), x_dtype, GPU)
            assert torch.equal(y.cpu(), exact.to(x_dtype))
            y = torch.ops.macko.spmv(x.to(GPU, x_dtype), *arrays(matrix), bias.to(GPU, x_dtype))
            assert torch.equal(y.cpu(), (exact + bias).to(x_dtype))


@given(
    rows=st.integers(1, 60),
    cols=st.sampled_from([1, 2, 172, 4096]) | st.integers(1, 3000),
    tokens=st.integers(0, 9),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    wide=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_spmv_is_within_rounding_of_float64(
    rows: int, cols: int, tokens: int, sparsity: float, dtype: torch.dtype, wide: bool, with_bias: bool, seed: int
) -> None:
    weight = sparse(rows, cols, sparsity, dtype, seed)
    x_dtype = torch.float32 if wide else dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator).to(x_dtype)
    bias = torch.randn(rows, generator=generator).to(x_dtype) if with_bias else None
    y = torch.ops.macko.spmv(x.to(GPU), *arrays(moved(spec.pack(weight))), None if bias is None else bias.to(GPU))
    assert y.shape == (tokens, rows)
    assert_within_rounding(y.cpu(), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 3])
def test_long_rows_are_within_rounding_of_float64_and_the_same_each_time(tokens: int) -> None:
    weight = sparse(11, 50000, 0.2, torch.float16)
    assert ((weight != 0).sum(dim=1) > LONG_ROW).any()
    matrix = moved(spec.pack(weight))
    x = torch.randn(tokens, 50000)
    y = torch.ops.macko.spmv(x.to(GPU), *arrays(matrix), None)
    assert_within_rounding(y.cpu(), x, weight, None)
    assert all(torch.equal(torch.ops.macko.spmv(x.to(GPU), *arrays(matrix), None), y) for _ in range(5))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_goes_in_and_out_unchanged(dtype: torch.dtype) -> None:
    """Also NaN, infinity and the smallest numbers, as values and, unless they are not finite, as activations."""
    numbers = every_half(dtype)
    column = arrays(moved(one_column(numbers)))
    assert_same(torch.ops.macko.spmv(torch.ones(1, 1, device=GPU), *column, None)[0].cpu(), numbers.float())
    one = arrays(moved(spec.pack(torch.ones(1, 1, dtype=dtype))))
    spoilt = numbers.where(numbers.isfinite(), torch.nan)
    assert_same(torch.ops.macko.spmv(numbers[:, None].to(GPU), *one, None)[:, 0].cpu(), spoilt)
    finite = numbers.clone()
    finite[~finite.isfinite()] = 0
    x = torch.tensor([[0.5], [1.5], [3.0], [-(2.0**-9)]], dtype=dtype)
    y = torch.ops.macko.spmv(x.to(GPU), *arrays(moved(one_column(finite))), None)
    assert_same(y.cpu(), (x.float() * finite.float()).to(dtype))


def test_a_row_does_not_multiply_what_lies_beyond_its_entries() -> None:
    weight = torch.zeros(4, 300, dtype=torch.float16)
    weight[:, 3] = 1
    matrix = arrays(moved(spec.pack(weight)))
    for column in (0, 2, 4, 299):
        x = torch.zeros(1, 300)
        x[0, column] = 1e38
        x[0, 3] = 5
        assert torch.ops.macko.spmv(x.to(GPU), *matrix, None).tolist() == [[5.0] * 4]


def test_arrays_that_begin_anywhere_in_memory() -> None:
    """Slices of larger tensors are not aligned for vector loads."""
    weight = signs(33, 172, torch.float16)
    matrix = moved(spec.pack(weight))
    shifted = []
    for array in arrays(matrix):
        larger = torch.empty(len(array) + 1, dtype=array.dtype, device=GPU)
        larger[1:] = array
        shifted.append(larger[1:])
    assert all(array.data_ptr() % 16 for array in shifted)
    slices = canonical.Canonical(*shifted, matrix.shape)
    canonical.validate(slices, "layer")
    assert torch.equal(canonical.unpack(slices).cpu(), weight)
    x = whole_numbers(2, 172)
    x_slice = torch.empty(2 * 172 + 1, dtype=torch.float16, device=GPU)[1:].view(2, 172).copy_(x)
    y = slices.linear(x_slice, None)
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)


def test_activations_of_any_shape_and_stride() -> None:
    weight = signs(33, 172, torch.float16)
    matrix = moved(spec.pack(weight))
    x = whole_numbers(172, 2).to(GPU, torch.float16)
    bias = whole_numbers(66).to(GPU, torch.float16)[::2]
    assert not x.t().is_contiguous()
    assert not bias.is_contiguous()
    exact = x.t().double() @ weight.to(GPU).double().T + bias
    assert torch.equal(matrix.linear(x.t(), bias).double(), exact)
    assert torch.equal(torch.ops.macko.spmv(x.t(), *arrays(matrix), bias).double(), exact)
    assert torch.equal(matrix.linear(x.t()[:, None, None], bias).double(), exact[:, None, None])
    assert matrix.linear(x.t()[0], bias).shape == (33,)


def test_gradients_of_the_input() -> None:
    weight = signs(33, 172, torch.float16)
    x = whole_numbers(1, 172).to(GPU, torch.float32).requires_grad_()
    y = moved(spec.pack(weight)).linear(x, None)
    y.sum().backward()
    assert torch.equal(x.grad.cpu(), weight.float().sum(dim=0, keepdim=True))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_work_follows_the_current_stream(tokens: int) -> None:
    """Inputs are written late on a side stream: work on another stream would read what was there before."""
    weight = signs(64, 300, torch.float16)
    matrix = moved(spec.pack(weight))
    x = whole_numbers(tokens, 300)
    weight_there, x_there = weight.to(GPU), x.to(GPU, torch.float16)
    late_weight, late_x = torch.zeros_like(weight_there), torch.zeros_like(x_there)
    late_values = torch.zeros_like(matrix.values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(50_000_000)
        late_x.copy_(x_there)
        late_values.copy_(matrix.values)
        y = torch.ops.macko.spmv(late_x, late_values, matrix.deltas, matrix.row_offsets, None)
        unpacked = torch.ops.macko.unpack(late_values, matrix.deltas, matrix.row_offsets, 300)
        late_x.zero_()
        late_values.zero_()
        torch.cuda._sleep(50_000_000)
        late_weight.copy_(weight_there)
        values, deltas, row_offsets = torch.ops.macko.pack(late_weight)
        late_weight.zero_()
    stream.synchronize()
    assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)
    assert torch.equal(unpacked.cpu(), weight)
    assert all(torch.equal(*pair) for pair in zip(arrays(matrix), (values, deltas, row_offsets), strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_cuda_graphs_replay_with_new_activations(tokens: int) -> None:
    weight = signs(257, 1000, torch.float16)
    matrix = moved(spec.pack(weight))
    bias = whole_numbers(257).to(GPU, torch.float16)
    x = torch.zeros(tokens, 1000, dtype=torch.float16, device=GPU)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():  # cuBLAS, of other tests, wants a warm-up
        torch.ops.macko.spmv(x, *arrays(matrix), bias)
        torch.ops.macko.unpack(*arrays(matrix), 1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        y = torch.ops.macko.spmv(x, *arrays(matrix), bias)
        unpacked = torch.ops.macko.unpack(*arrays(matrix), 1000)
    for round_ in range(3):
        new = whole_numbers(tokens, 1000).roll(round_, dims=1)
        x.copy_(new)
        with torch.inference_mode():
            unpacked.zero_()
        graph.replay()
        exact = new.double() @ weight.double().T + bias.double().cpu()
        assert torch.equal(y.double().cpu(), exact)
        assert torch.equal(unpacked.cpu(), weight)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype: torch.dtype, wide: bool) -> None:
    weight = sparse(6, 40, 0.5, dtype).to(GPU)
    matrix = arrays(canonical.pack(weight))
    x_dtype = torch.float32 if wide else dtype
    x, bias = torch.randn(3, 40).to(GPU, x_dtype), torch.randn(6).to(GPU, x_dtype)
    torch.library.opcheck(torch.ops.macko.spmv, (x, *matrix, bias))
    torch.library.opcheck(torch.ops.macko.spmv, (x, *matrix, None))
    torch.library.opcheck(torch.ops.macko.unpack, (*matrix, 40))
    torch.library.opcheck(torch.ops.macko.pack, (weight,))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    if backend == "inductor":
        pytest.importorskip("triton")
    weight = signs(33, 172, torch.float16)
    bias = whole_numbers(33).half()
    layer = MackoLinear.from_matrix(moved(spec.pack(weight)), bias.to(GPU))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (1, 2, 5):
        x = whole_numbers(1, tokens, 172)
        with torch.inference_mode():
            y = compiled(x.to(GPU, torch.float16))
        assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + bias)


def test_refuses_tensors_that_lie_apart() -> None:
    matrix = spec.pack(signs(33, 172, torch.float16))
    x = torch.ones(1, 172, device=GPU, dtype=torch.float16)
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; move them to one device\.$"):
        torch.ops.macko.spmv(x, *arrays(matrix), None)
    with pytest.raises(NativeError, match=r"^The tensors lie on cpu and cuda:0; "):
        torch.ops.macko.unpack(matrix.values.to(GPU), matrix.deltas, matrix.row_offsets.to(GPU), 172)


def test_refuses_activations_of_another_type() -> None:
    matrix = moved(spec.pack(signs(33, 172, torch.float16)))
    x = torch.ones(1, 172, device=GPU, dtype=torch.bfloat16)
    with pytest.raises(NativeError, match="it refused its arguments"):
        torch.ops.macko.spmv(x, *arrays(matrix), None)


def test_a_gpu_that_is_not_there_is_an_error_and_harms_nothing_after() -> None:
    weight = torch.ones(1, 8, dtype=torch.float16, device=GPU)
    counts = torch.zeros(1, dtype=torch.int32, device=GPU)
    arguments = (weight.data_ptr(), 1, 8, counts.data_ptr())
    with pytest.raises(NativeError, match=r'CUDA says "invalid device ordinal"; `macko doctor` shows'):
        native._call("macko_cuda_row_entries", *arguments, 1000, None)
    native._call("macko_cuda_row_entries", *arguments, 0, None)
    assert torch.cuda.current_device() == 0
    assert counts.tolist() == [8]


def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    weight = signs(33, 172, torch.float16)
    x = whole_numbers(2, 172)
    for current, other in ((0, 1), (1, 0)):
        device = torch.device("cuda", other)
        with torch.cuda.device(current):
            matrix = canonical.pack(weight.to(device))
            canonical.validate(matrix, "layer")
            unpacked = canonical.unpack(matrix)
            y = matrix.linear(x.to(device, torch.float16), None)
            assert torch.cuda.current_device() == current
            assert torch.ones(1, device="cuda").device.index == current
        assert {tensor.device for tensor in (*arrays(matrix), unpacked, y)} == {device}
        assert torch.equal(unpacked.cpu(), weight)
        assert torch.equal(y.double().cpu(), x.double() @ weight.double().T)
    with pytest.raises(NativeError, match=r"^The tensors lie on cuda:0 and cuda:1; move them to one device\.$"):
        torch.ops.macko.spmv(x.to("cuda:1", torch.float16), *arrays(moved(spec.pack(weight))), None)


def needs_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def test_a_matrix_of_more_than_two_billion_elements() -> None:
    needs_memory(30)
    rows, cols = 40000, 65536
    weight = torch.zeros(rows, cols, dtype=torch.float16, device=GPU)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1], device=GPU)
    weight[chosen] = torch.arange(cols, device=GPU).remainder(3).half()
    matrix = canonical.pack(weight)
    assert matrix.row_offsets[-1] == 4 * (cols - cols // 3 - 1)
    assert torch.equal(canonical.unpack(matrix)[chosen], weight[chosen])
    assert canonical.unpack(matrix).count_nonzero() == matrix.row_offsets[-1]
    y = torch.ops.macko.spmv(torch.ones(1, cols, device=GPU), *arrays(matrix), None)
    assert torch.equal(y[0, chosen], weight[chosen].float().sum(dim=1))
    assert y.count_nonzero() == 4


def test_refuses_more_entries_than_int32_offsets_hold() -> None:
    needs_memory(16)
    weight = torch.ones(32768, 65536, dtype=torch.float16, device=GPU)
    sentence = r"^a 32768 x 65536 matrix with 2147483648 entries does not fit int32 offsets; keep it dense\.$"
    with pytest.raises(FormatError, match=sentence):
        canonical.pack(weight)


def test_the_doctor_misses_nothing() -> None:
    facts = _facts()
    assert facts["kernels"] == ["cpu", "cuda"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert not any("CUDA" in advice for advice in facts["advice"])
