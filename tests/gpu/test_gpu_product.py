"""The op that vLLM's layers multiply with, in the layouts of a GPU: alone, compiled, and captured in CUDA graphs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import format as spec
from macko_llm.linear import MackoLinear
from macko_llm.vllm_plugin.product import Description, describe, multiply

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")

ROWS, COLS = 512, 1024


@pytest.fixture(params=["sliced", "tiled"])
def layout(request: pytest.FixtureRequest, cuda: torch.device) -> tuple[Description, list[Tensor], Tensor]:
    """How a matrix is laid out, its arrays, and the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=generator)
    weight = weight.masked_fill(torch.rand(ROWS, COLS, generator=generator) < 0.5, 0).half()
    layer = MackoLinear.from_matrix(spec.pack(weight.to(cuda)))
    layer.layout = request.param
    layer.arrange()
    description, arrays = describe(layer.packed)
    assert description.layout == request.param
    return description, list(arrays.values()), weight.to(cuda)


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.testing.assert_close(y.float(), F.linear(x.float(), weight.float()), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 8, 64, 200])
def test_a_cuda_graph_holds_the_product_of_its_number_of_tokens(
    tokens: int, layout: tuple[Description, list[Tensor], Tensor]
) -> None:
    description, arrays, weight = layout
    x = torch.randn(tokens, COLS, dtype=torch.float16, device=weight.device)
    with torch.inference_mode():
        check(multiply(x, arrays, description, None), x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multiply(x, arrays, description, None)
        x.normal_()
        graph.replay()
        check(y, x, weight)


def test_what_is_compiled_once_multiplies_any_number_of_tokens(
    layout: tuple[Description, list[Tensor], Tensor],
) -> None:
    description, arrays, weight = layout
    torch._dynamo.reset()
    forward = torch.compile(lambda x: multiply(x * 2, arrays, description, None), fullgraph=True, dynamic=True)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (200, 8, 2):
            x = torch.randn(tokens, COLS, dtype=torch.float16, device=weight.device)
            check(forward(x), x * 2, weight)
