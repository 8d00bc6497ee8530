"""The op that vLLM's layers multiply with, on a CPU and without vLLM, against a dense product."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import format as spec
from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import bitmap, canonical, strips
from macko_llm.layouts.layout import Layout
from macko_llm.vllm_plugin.product import _OF_ONE_BUFFER, describe, multiply


def make_strips(matrix: MackoMatrix) -> Layout:
    return strips.make(bitmap.arrange(matrix))


ARRANGE = {"canonical": canonical.Canonical.of, "bitmap": bitmap.arrange, "strips": make_strips}


def weight_of(rows: int = 24, cols: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    return weight.masked_fill(torch.rand(rows, cols, generator=generator) < 0.5, 0).to(torch.bfloat16)


def layout_of(name: str, weight: Tensor) -> Layout:
    return ARRANGE[name](spec.pack(weight))


@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
@pytest.mark.parametrize("name", ARRANGE)
def test_the_op_multiplies_as_the_dense_matrix_does(name: str, tokens: int) -> None:
    weight = weight_of()
    x, bias = torch.randn(tokens, 40), torch.randn(24)
    description, arrays = describe(layout_of(name, weight))
    y = multiply(x, list(arrays.values()), description, bias)
    torch.testing.assert_close(y, F.linear(x, weight.float(), bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARRANGE)
def test_what_is_compiled_for_any_number_of_tokens_still_chooses_by_their_number(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of()
    layout = layout_of(name, weight)
    description, arrays = describe(layout)
    products: list[int] = []
    kind = type(layout)
    few = kind._spmv
    monkeypatch.setattr(kind, "_spmv", lambda self, x, bias: products.append(len(x)) or few(self, x, bias))
    monkeypatch.setattr(kind, "_is_plain", lambda *_: False, raising=False)

    torch._dynamo.reset()  # it knows functions by their lines

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def forward(x: Tensor) -> Tensor:
        return multiply(x * 2, list(arrays.values()), description, None)

    many = layout.few_tokens(torch.float32) + 3
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (many, 2, many + 1):
            x = torch.randn(tokens, 40)
            torch.testing.assert_close(forward(x), F.linear(x * 2, weight.float()), rtol=1e-4, atol=1e-4)
    assert products == [2]


@pytest.mark.parametrize("name", ARRANGE)
def test_an_input_that_wants_a_gradient_is_multiplied_as_any(name: str) -> None:
    description, arrays = describe(layout_of(name, weight_of()))
    x = torch.randn(2, 40)
    expected = multiply(x, list(arrays.values()), description, None)
    assert torch.equal(multiply(x.requires_grad_(), list(arrays.values()), description, None), expected)


@pytest.mark.parametrize("name", ARRANGE)
def test_torch_s_own_check_of_an_op_passes(name: str) -> None:
    about, arrays = describe(layout_of(name, weight_of()))
    arguments = (torch.randn(3, 40), list(arrays.values()), torch.randn(24), *about)
    torch.library.opcheck(torch.ops.macko.product.default, arguments)


def test_an_input_of_another_width_is_refused() -> None:
    description, arrays = describe(layout_of("bitmap", weight_of()))
    with pytest.raises(FormatError, match="39 features and the matrix 40 columns"):
        multiply(torch.randn(3, 39), list(arrays.values()), description, None)


def test_the_op_can_carry_every_layout_there_is() -> None:
    def concrete(kind: type) -> set[type]:
        below = set().union(*map(concrete, kind.__subclasses__()))
        return below if inspect.isabstract(kind) else {kind, *below}

    assert concrete(Layout) == {canonical.Canonical, *_OF_ONE_BUFFER.values()}


def test_a_layout_that_no_op_can_carry_is_named() -> None:
    with pytest.raises(TypeError, match="object is no layout"):
        describe(object())  # type: ignore[arg-type]
