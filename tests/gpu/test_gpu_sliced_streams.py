"""Good manners of the layouts of GPUs: streams, early starts, graphs, torch.compile, opcheck, a second GPU."""

from collections.abc import Callable

import pytest
import torch
from sliced_helpers import COLS, LAYOUTS, certainly_cut, large_matrix, linear, make_layer
from sliced_reference import random_matrix
from test_gpu_canonical import GPU, HALVES, arrays, whole_numbers
from tiled_helpers import Kind, kinds
from torch import Tensor

from macko_llm.errors import NativeError
from macko_llm.layouts import canonical
from macko_llm.layouts.layout import Layout
from macko_llm.linear import MackoLinear

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")


@kinds
@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
def test_work_follows_the_current_stream(kind: Kind, tokens: int) -> None:
    """Activations are written late on a side stream: work on another stream would read what was there before."""
    weight = random_matrix(64, 300, 0.5, torch.float16).sign()
    matrix = kind.make(weight)
    x = whole_numbers(tokens, 300)
    there = x.to(GPU, torch.float16)
    late = torch.zeros_like(there)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(50_000_000)
        late.copy_(there)
        y = matrix.linear(late, None)
        late.zero_()
        through_the_op = kind.product(late.copy_(there), matrix, None)
        late.zero_()
    stream.synchronize()
    exact = x.double() @ weight.double().T
    assert torch.equal(y.double().cpu(), exact)
    assert torch.equal(through_the_op.double().cpu(), exact)


def chain(layers: list[Layout], x: Tensor, *, wait: bool, between: Callable[[Tensor], Tensor]) -> Tensor:
    for layer in layers:
        x = between(layer.linear(x, None))
        if wait:
            torch.cuda.synchronize()
    return x


CHAINS = {
    "few rows": [512],
    "a slice a multiprocessor": [4096],
    "three slices a multiprocessor": [8192],
    "small and large by turns": [512, 8192],
}


@kinds
@pytest.mark.parametrize("tokens", [1, 2, 4, 12])
@pytest.mark.parametrize("sizes", CHAINS.values(), ids=CHAINS)
def test_kernels_that_start_early_wait_for_what_they_read(sizes: list[int], tokens: int, kind: Kind) -> None:
    """Programmatic dependent launch: each layer reads what the one before wrote, 50 times on, with no pause between."""
    layers: list[Layout] = []
    shapes = list(zip(sizes[1:] + sizes[:1], sizes, strict=True))
    for seed in range(2):
        for rows, cols in shapes:
            weight = large_matrix(rows, cols, 0.5, torch.float16, seed) / (cols / 2) ** 0.5
            layers.append(kind.spread(weight))
    layers = [layers[i % len(layers)] for i in range(50)]
    stored = canonical.pack(torch.eye(sizes[0], dtype=torch.float16, device=GPU))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda y: y,
        lambda y: y * 1.0,  # a kernel of torch's in between
        lambda y: stored.linear(y, None) if tokens < 3 and y.shape[-1] == sizes[0] else y.clone(),
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


@kinds
def test_a_bias_that_the_kernel_before_wrote(kind: Kind) -> None:
    """It is not a weight: it may be as new as the activations."""
    size = 4096
    first, second = (kind.arranged(large_matrix(size, size, 0.5, torch.float16, seed) / 45) for seed in range(2))
    xs = torch.randn(40, 1, size, generator=torch.Generator().manual_seed(0)).to(GPU, torch.float16)
    wide = torch.randn(40, size, generator=torch.Generator().manual_seed(1)).to(GPU)
    results: dict[bool, list[Tensor]] = {False: [], True: []}
    with torch.inference_mode():
        for wait, found in results.items():
            for x, other in zip(xs, wide, strict=True):
                torch.cuda.synchronize()
                bias = first.linear(x, None)[0]
                if wait:
                    torch.cuda.synchronize()
                found.append(second.linear(x, bias))
                rounded = other.half()  # as a layer does with a bias of another dtype
                if wait:
                    torch.cuda.synchronize()
                found.append(second.linear(x, rounded))
                del bias, rounded
    assert all(torch.equal(*pair) for pair in zip(results[False], results[True], strict=True))


@kinds
def test_activations_written_right_before_and_overwritten_right_after(kind: Kind) -> None:
    """Also the other way round: what comes after a kernel must not overtake its reads."""
    size = 4096
    matrix = kind.arranged(large_matrix(size, size, 0.5, torch.float16).sign())
    dense = kind.unpack(matrix).double()
    xs = torch.randint(-1, 2, (40, 1, size), generator=torch.Generator().manual_seed(1)).to(GPU, torch.float16)
    x, results = torch.empty_like(xs[0]), []
    with torch.inference_mode():
        torch.cuda.synchronize()
        for new in xs:
            x.copy_(new)
            results.append(matrix.linear(x, None))
            x.fill_(torch.nan)
    for new, y in zip(xs, results, strict=True):
        assert torch.equal(y, (new.double() @ dense.T).half())


@kinds
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_cuda_graphs_replay_with_new_activations(tokens: int, kind: Kind) -> None:
    weights = [random_matrix(700, 700, 0.5, torch.float16, seed).sign() for seed in range(2)]
    first, second = kind.make(weights[0]), kind.spread(weights[1])
    bias = whole_numbers(700).to(GPU, torch.float16)
    x = torch.zeros(tokens, 700, dtype=torch.float16, device=GPU)

    def layers(through: Callable) -> Tensor:
        return through(through(x, first, bias).clamp(-1, 1), second, None)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        layers(linear)
    torch.cuda.synchronize()
    for through in (linear, kind.product):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            y = layers(through)
            unpacked = kind.unpack(first)
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
        x, bias = torch.randn(3, 40).to(GPU, dtype), torch.randn(6).to(GPU, dtype)
        torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, bias, matrix.dtype, matrix.numbers))
        torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, None, matrix.dtype, matrix.numbers))
        torch.library.opcheck(torch.ops.macko.sliced_unpack, (matrix.data, dtype, matrix.numbers))
        assert torch.equal(torch.ops.macko.sliced_unpack(matrix.data, dtype, matrix.numbers).cpu(), weight)


@kinds
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["as it comes", "dynamic"])
def test_compiles_as_one_graph(backend: str, dynamic: bool | None, kind: Kind) -> None:
    if backend == "inductor":
        pytest.importorskip("triton")
    layer, weight, _ = make_layer(layout=kind.name)
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


@kinds
def test_another_gpu_than_the_current_one(kind: Kind) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    weight = random_matrix(64, 2048, 0.5, torch.float16).sign()
    x = whole_numbers(2, 2048)
    for current, other in ((0, 1), (1, 0)):
        device = torch.device("cuda", other)
        with torch.cuda.device(current):
            matrix = kind.arrange(canonical.pack(weight.to(device)))
            assert matrix is not None
            restored = matrix.canonical()
            products = [matrix.linear(x.to(device, dtype), None) for dtype in (torch.float16, torch.float32)]
            assert torch.cuda.current_device() == current
            assert torch.ones(1, device="cuda").device.index == current
        assert {tensor.device for tensor in (matrix.data, *arrays(restored), *products)} == {device}
        assert torch.equal(canonical.unpack(restored).cpu(), weight)
        assert all(torch.equal(y.double().cpu(), x.double() @ weight.double().T) for y in products)
    with pytest.raises(NativeError, match=r"^The tensors lie on cuda:0 and cuda:1; move them to one device\.$"):
        kind.arranged(weight).linear(x.to("cuda:1", torch.float16), None)
    layer = MackoLinear.from_matrix(canonical.pack(weight))
    layer.layout = kind.name
    layer.to("cuda:0").to("cuda:1")
    assert layer.is_arranged
    assert {tensor.device.index for tensor in (*layer.parameters(), *layer.buffers())} == {1}
    assert torch.equal(layer(x.to("cuda:1", torch.float16)), products[0].to("cuda:1"))
