"""Arranged layers on a GPU: they move, load, copy and save as if their arrays were canonical."""

import copy
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import build, make_tokenizer, random_tokens
from sliced_helpers import COLS, ROWS, large_matrix, make_layer
from test_gpu_canonical import GPU, HALVES, whole_numbers
from tiled_helpers import KINDS, skip_without_tensor_cores
from torch import Tensor
from transformers import LlamaConfig

import macko_llm
from macko_llm import checkpoint, models
from macko_llm.errors import FormatError
from macko_llm.layouts import canonical, choice
from macko_llm.layouts.sliced_plan import MAX_OVERHEAD
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.packing import pack_checkpoint

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")


@pytest.fixture(autouse=True, params=["sliced", "tiled"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which every layer of these tests is arranged."""
    if request.param == "tiled":
        skip_without_tensor_cores()
    monkeypatch.setattr(choice, "choose", lambda *_: request.param)
    return request.param


def assert_state(layer: MackoLinear, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8))


def assert_layer_multiplies(layer: MackoLinear, weight: Tensor) -> None:
    device = next(iter((*layer.parameters(), *layer.buffers()))).device
    for tokens in (1, 2, 9):
        x = whole_numbers(1, tokens, COLS)
        exact = x.double() @ weight.double().T
        if layer.bias is not None:
            exact += layer.bias.double().cpu()
        for dtype in (weight.dtype, torch.float32):
            y = layer(x.to(device, dtype))
            assert (y.dtype, y.device) == (dtype, device)
            assert torch.equal(y.cpu(), exact.to(dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_layer_arranges_and_restores(dtype: torch.dtype, bias: bool, layout: str) -> None:
    layer, weight, state = make_layer(dtype, bias=bias)
    assert layer.weight_layout is not None
    assert layer.weight_layout.is_cuda
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * bias
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    layer.arrange()  # once more is nothing more
    assert_state(layer, state)
    layer.restore()
    assert not layer.is_arranged
    assert layer.weight_layout is None
    assert {name for name, _ in layer.named_parameters()} == state.keys()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    layer.restore()
    layer.arrange()
    assert layer.is_arranged
    assert_state(layer, state)
    assert_layer_multiplies(layer, weight)
    assert {"sliced": "delta_bits=2", "tiled": "strips="}[layout] in str(layer)
    assert "entries=" not in str(layer)


def test_a_layer_moves_to_the_cpu_and_back() -> None:
    layer, weight, state = make_layer()
    for move in (layer.cpu, layer.cuda, lambda: layer.to("cpu"), lambda: layer.to(GPU), layer.cuda, layer.half):
        assert move() is layer
        assert layer.is_arranged
        assert layer.weight_layout.device == layer.bias.device
        assert_state(layer, state)
        assert_layer_multiplies(layer, weight)


def test_a_layer_of_another_dtype_and_back() -> None:
    layer, weight, state = make_layer()
    for cast in (layer.float, layer.bfloat16, layer.half):
        cast()
        assert layer.is_arranged
        assert layer.packed.dtype == torch.float16
        assert_layer_multiplies(layer, weight)
    assert_state(layer, state)


def test_a_model_of_layers_moves_as_one() -> None:
    layer, weight, state = make_layer()
    model = torch.nn.Sequential(layer.cpu(), torch.nn.Linear(ROWS, 3, dtype=torch.float16))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.cuda()[0].is_arranged
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    assert_state(model[0], state)
    model.load_state_dict(saved)
    assert model[0].is_arranged
    assert_layer_multiplies(model[0], weight)


def test_loading_a_state_into_an_arranged_layer() -> None:
    layer, weight, state = make_layer()
    twin, _, _ = make_layer()
    assert twin.is_arranged
    values = state["weight_values"]
    sign = {**state, "weight_values": values.where(values == 0, -values), "bias": state["bias"] + 1}
    twin.load_state_dict(sign)
    assert twin.is_arranged
    assert_state(twin, sign)
    assert_layer_multiplies(twin, -weight)
    twin.load_state_dict(layer.state_dict())
    assert twin.is_arranged
    assert_state(twin, state)
    assert_layer_multiplies(twin, weight)
    empty = MackoLinear(COLS, ROWS, len(state["weight_values"]), bias=True, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert not empty.weight_layout.is_cuda  # the state lies on the CPU
    empty.cuda()
    assert empty.weight_layout.is_cuda
    assert_layer_multiplies(empty, weight)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        twin.load_state_dict({**state, "weight_values": state["weight_values"][:-8]})


def test_copies_of_a_layer() -> None:
    layer, weight, state = make_layer()
    x = whole_numbers(1, COLS).to(GPU, torch.float16)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)  # at once: its weights have only just been queued for copying
    assert twin.is_arranged
    assert twin.weight_layout.data_ptr() != layer.weight_layout.data_ptr()
    assert twin._arranged.data is twin.weight_layout
    layer.weight_layout.zero_()  # the twin must not read the first one's memory
    assert_state(twin, state)
    assert_layer_multiplies(twin, weight)


def test_a_layer_that_is_emptied() -> None:
    layer, weight, state = make_layer()
    layer.to_empty(device="cuda")  # anything at all in the arrays
    layer.load_state_dict(state)
    layer.arrange()
    assert layer.is_arranged
    assert_layer_multiplies(layer, weight)
    placeholder = MackoLinear(COLS, ROWS, 8, bias=True, device="meta").to_empty(device="cuda")
    assert not placeholder.is_arranged
    placeholder.to("meta")
    assert placeholder.weight_values.is_meta


def test_arranging_frees_the_canonical_arrays(layout: str) -> None:
    weight = large_matrix(4096, 4096, 0.5, torch.float16)
    KINDS[layout].arranged(weight).linear(
        torch.ones(1, 4096, device=GPU, dtype=torch.float16), None
    )  # all that is ever loaded
    gc.collect()
    before = torch.cuda.memory_allocated()
    layer = MackoLinear.from_matrix(canonical.pack(weight))
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    assert stored > 20_000_000
    slack = 2**22  # the allocator's rounding, at most 1 MiB a tensor
    assert stored <= torch.cuda.memory_allocated() - before < stored + slack
    layer.arrange()
    nbytes = layer.weight_layout.nbytes
    assert nbytes <= MAX_OVERHEAD * stored
    assert nbytes <= torch.cuda.memory_allocated() - before < nbytes + slack
    layer.restore()
    assert stored <= torch.cuda.memory_allocated() - before < stored + slack
    del layer
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_layer_refuses_another_width_or_dtype() -> None:
    layer, _, _ = make_layer()
    for tokens in (1, 9):
        with pytest.raises(FormatError, match="2047 features and the matrix 2048 columns"):
            layer(torch.ones(tokens, COLS - 1, device=GPU).half())
        with pytest.raises(FormatError, match=r"input is torch\.int64; convert it to float16"):
            layer(torch.ones(tokens, COLS, device=GPU, dtype=torch.int64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_without_gradients(mode: Callable) -> None:
    layer, weight, state = make_layer()
    with mode():
        assert_layer_multiplies(layer, weight)
        made_inside, _, _ = make_layer()
        assert_layer_multiplies(made_inside, weight)
    assert_state(made_inside, state)
    with torch.no_grad():
        assert_layer_multiplies(made_inside, weight)


@pytest.fixture(scope="module", params=HALVES, ids=["float16", "bfloat16"])
def packed_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of one layer, half of its weights zero, wide enough that its matrices are arranged."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 1280, "num_hidden_layers": 1, "vocab_size": 320}
    model = build(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64))
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    model.to(request.param).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    pack_checkpoint(folder / "dense", folder / "packed")
    yield folder / "packed"
    shutil.rmtree(folder)


def layers_of(model: torch.nn.Module) -> list[MackoLinear]:
    return [module for module in model.modules() if isinstance(module, MackoLinear)]


def test_an_arranged_llama_saves_the_files_that_it_came_from(packed_llama: Path, tmp_path: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    assert len(layers_of(model)) == 7
    assert all(layer.is_arranged for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    assert all(layer.is_arranged for layer in layers_of(model))
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(packed_llama)
    files, saved = checkpoint.weight_files(packed_llama), checkpoint.weight_files(tmp_path)
    assert [file.name for file in files] == [file.name for file in saved]
    for file, twin in zip(files, saved, strict=True):
        assert file.read_bytes() == twin.read_bytes()


def test_an_arranged_llama_gives_the_logits_of_the_canonical_one(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    exact = macko_llm.load(packed_llama, dtype="float32", device="cuda")
    stored = macko_llm.load(packed_llama, device="cuda")
    for layer in layers_of(stored):
        layer.restore()
    for tokens in (random_tokens(1, 1), random_tokens(1, 3), random_tokens(2, 20)):
        with torch.inference_mode():
            expected = exact(tokens.to(GPU)).logits.double()
            rounding = (stored(tokens.to(GPU)).logits.double() - expected).abs().max()
            assert (model(tokens.to(GPU)).logits.double() - expected).abs().max() < 2 * rounding + 1e-3


def test_state_of_an_arranged_llama_has_the_canonical_names(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    stored = macko_llm.load(packed_llama, device="cpu").state_dict()
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert sum(name.endswith(ARRAY_NAMES) for name in state) == 3 * 7
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in state.items())
