"""Packed layers on a GPU as people use them: casts, arrays from outside, gradients, state dicts, what is not finite."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from families import make_tokenizer, random_tokens
from sliced_helpers import arranged, certainly_cut, random_matrix, whole_numbers
from test_gpu_canonical import GPU
from tiled_helpers import tile
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import macko_llm
from macko_llm import checkpoint, models, native
from macko_llm.errors import FormatError, MackoWarning
from macko_llm.layouts import canonical, gpu_layout, layout
from macko_llm.layouts.sliced import SLICED_SPMV_MAX_TOKENS
from macko_llm.layouts.sliced_plan import Shape
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.transformers_integration import layer_groups

pytestmark = pytest.mark.usefixtures("kernels")

ROWS, COLS = 700, 1024


def make(dtype: torch.dtype = torch.float16) -> tuple[MackoLinear, Tensor]:
    """An arranged layer with a bias, and its dense weight on the CPU."""
    weight = random_matrix(ROWS, COLS, 0.5, dtype)
    layer = MackoLinear.from_matrix(canonical.pack(weight.to(GPU)), torch.randn(ROWS).to(GPU, dtype))
    layer.arrange()
    assert layer.is_arranged
    return layer, weight


def reference(x: Tensor, layer: MackoLinear, weight: Tensor) -> Tensor:
    """In float64, on the CPU."""
    return F.linear(x.double().cpu(), weight.double(), layer.bias.double().cpu())


def slack(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What roundings of relative size eps amount to."""
    return 8 * eps * (x.double().abs().cpu() @ weight.double().abs().T + 8)


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_keep_their_dtype_when_a_model_is_cast(dtype: torch.dtype, to: torch.dtype) -> None:
    layer, weight = make(dtype)
    layer.to(to)
    assert layer.is_arranged
    assert layer.packed.dtype == dtype
    assert layer.bias.dtype == to
    assert torch.equal(layer.packed.dense().cpu(), weight)
    for tokens in (1, 2, 5, 40):
        x = torch.randn(tokens, COLS, device=GPU).to(to)
        y = layer(x)
        assert (y.dtype, y.device) == (to, GPU)
        assert ((y.double().cpu() - reference(x, layer, weight)).abs() <= slack(x, weight, torch.finfo(to).eps)).all()


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_it_does_around_a_dense_layer(to: torch.dtype) -> None:
    layer, weight = make()
    twin = nn.Linear(COLS, ROWS, device=GPU)
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens in (1, 40):
            x = torch.randn(tokens, COLS, device=GPU).to(x_dtype)
            with torch.autocast("cuda", to):
                y = layer(x)
                assert y.dtype == twin(x).dtype == to
            assert (
                (y.double().cpu() - reference(x, layer, weight)).abs() <= slack(x, weight, torch.finfo(to).eps)
            ).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("warps", [8, 12, 16, 20, 24, 32])
def test_float32_inputs_are_multiplied_by_spmv_exactly(dtype: torch.dtype, bits: int, warps: int) -> None:
    for rows, cols in ((1, 1), (57, 171), (70, 2056), (33, 172)):
        weight = random_matrix(rows, cols, 0.5, dtype).sign()
        matrix = certainly_cut(weight, Shape(28, warps), bits)
        for tokens in (1, 2, 3, SLICED_SPMV_MAX_TOKENS):
            # Whole numbers that no 16-bit float holds.
            x = (whole_numbers(tokens, cols) * 1001 + 1).to(GPU, torch.float32)
            bias = (whole_numbers(rows) * 70001).to(GPU, torch.float32)
            expected = (x.double().cpu() @ weight.double().T + bias.double().cpu()).float()
            y = torch.ops.macko.sliced_spmv(x, matrix.data, bias, dtype, matrix.numbers)
            assert y.dtype == torch.float32
            assert torch.equal(y.cpu(), expected)
            assert torch.equal(matrix.linear(x, bias), y)
            assert torch.equal(matrix.linear(x, None).cpu(), (x.double().cpu() @ weight.double().T).float())
    assert matrix.few_tokens(torch.float32) == SLICED_SPMV_MAX_TOKENS
    x = torch.ones(1, 172, device=GPU)
    torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, None, dtype, matrix.numbers))
    torch.library.opcheck(torch.ops.macko.sliced_linear, (x.requires_grad_(), matrix.data, None, dtype, matrix.numbers))


def test_inputs_begin_anywhere_in_memory() -> None:
    weight = random_matrix(96, 512, 0.5, torch.float16).sign()
    matrix = certainly_cut(weight, Shape(32, 16), 2)
    memory = whole_numbers(2, 520).to(GPU, torch.float32).flatten()
    for start in (0, 1, 2, 3, 5):
        x = memory[start : start + 512][None]
        y = torch.ops.macko.sliced_spmv(x, matrix.data, None, matrix.dtype, matrix.numbers)
        assert torch.equal(y.cpu(), (x.double().cpu() @ weight.double().T).float())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("layout", ["canonical", "sliced", "tiled"])
def test_a_token_that_is_not_finite_spoils_its_whole_product(value: float, layout: str) -> None:
    """In rows with an entry at its column and in those without, whatever the number of tokens and their alignment."""
    for cols in (171, 1024):
        weight = random_matrix(300, cols, 0.5, torch.float16).sign()
        weight[:, (0, 100, cols - 1)] = (torch.arange(300) % 2).half()[:, None]  # half of the rows have an entry there
        makers = {
            "canonical": lambda weight: canonical.pack(weight.to(GPU)),
            "sliced": lambda weight: certainly_cut(weight, Shape(32, 8), 2),
            "tiled": tile,
        }
        matrix = makers[layout](weight)
        for dtype in (torch.float16, torch.float32):
            for tokens in (1, 2, 3, 4, 7, 40):
                for column in (0, 100, cols - 1):
                    x = whole_numbers(tokens, cols).to(GPU, dtype)
                    expected = matrix.linear(x, None)
                    x[tokens // 2, column] = value
                    y = matrix.linear(x, None)
                    assert not y[tokens // 2].isfinite().any()
                    others = [token for token in range(tokens) if token != tokens // 2]
                    assert torch.equal(y[others], expected[others])


def test_bfloat16_values_that_are_large_are_finite() -> None:
    weight = torch.ones(40, 64, dtype=torch.bfloat16)
    matrix = certainly_cut(weight, Shape(32, 8), 2)
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=GPU)
    x[0, 5] = torch.finfo(torch.bfloat16).max
    assert torch.equal(matrix.linear(x, None), x[:, 5:6].expand(1, 40))


def test_arrays_that_are_not_valid_never_reach_a_kernel() -> None:
    layer, weight = make()
    good = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    bad = {**good, "weight_deltas": torch.full_like(good["weight_deltas"], 0xFF)}
    for assign in (False, True):
        layer, _ = make()
        with pytest.raises(RuntimeError, match=r"not valid MACKO data \(.*\); download"):
            layer.load_state_dict(bad, assign=assign)
        for tokens in (1, 40):
            with pytest.raises(FormatError, match="not valid MACKO data"):
                layer.to(GPU)(torch.ones(tokens, COLS, dtype=torch.float16, device=GPU))
        layer.load_state_dict(good, assign=assign)
        layer.to(GPU)
        assert layer.is_arranged
        assert torch.equal(layer.packed.dense().cpu(), weight)
    layer.to_empty(device=GPU)
    layer.weight_deltas.fill_(0xFF)
    with pytest.raises(FormatError, match="not valid MACKO data"):
        layer(torch.ones(1, COLS, dtype=torch.float16, device=GPU))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama of 8 layers, 80 MB dense."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=768, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=320
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(torch.rand_like(linear.weight, dtype=torch.float32) < 0.5, 0)
    model.save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    pack_checkpoint(folder / "dense", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers_are_checked_whenever_they_come(place: str, packed: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    places |= {f"model.layers.{index}": 0 if index < 4 else place for index in range(8)}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=places, offload_folder=tmp_path / "offload")
    expected = macko_llm.load(packed, device="cuda")
    tokens = random_tokens(1, 8).to(GPU)
    with torch.inference_mode():
        assert (model(tokens).logits - expected(tokens).logits).abs().max() < 0.02
        before = torch.cuda.memory_allocated()
        model(tokens)
        gc.collect()
        assert torch.cuda.memory_allocated() <= before + 2**20  # nothing of them stays
    layer = model.model.layers[6].mlp.up_proj
    weights = layer._hf_hook.weights_map
    if place == "cpu":
        weights["weight_deltas"].fill_(0xFF)
        with pytest.raises(FormatError, match="not valid MACKO data"), torch.inference_mode():
            model(tokens)


def test_a_forward_that_wants_gradients_keeps_no_dense_weight(packed: Path) -> None:
    model = macko_llm.load(packed, device="cuda")
    dense_bytes = sum(
        module.in_features * module.out_features * 2 for module in model.modules() if isinstance(module, MackoLinear)
    )
    tokens = random_tokens(1, 64).to(GPU)
    model(tokens)  # nothing wants a gradient
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    gc.collect()
    before = torch.cuda.memory_allocated()
    logits = model(inputs_embeds=embeddings).logits
    kept = torch.cuda.memory_allocated() - before
    assert kept < 0.5 * dense_bytes
    logits.float().square().mean().backward()
    dense = macko_llm.load(packed.parent / "dense", device="cuda")
    twin = embeddings.detach().clone().requires_grad_()
    dense(inputs_embeds=twin).logits.float().square().mean().backward()
    assert F.cosine_similarity(embeddings.grad.flatten().float(), twin.grad.flatten().float(), dim=0) > 0.999


def test_a_state_dict_comes_on_the_cpu_one_layer_at_a_time(packed: Path, tmp_path: Path) -> None:
    model = macko_llm.load(packed, device="cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state = model.state_dict()
    arrays = {name: tensor for name, tensor in state.items() if name.endswith(ARRAY_NAMES)}
    assert {tensor.device.type for tensor in arrays.values()} == {"cpu"}
    largest = max(tensor.nbytes for name, tensor in arrays.items() if name.endswith("values"))
    assert torch.cuda.max_memory_allocated() - before < 8 * largest + 2**21
    stored = {}
    for file in packed.glob("*.safetensors"):
        for name in checkpoint.tensor_infos([file]):
            with checkpoint.open_tensors(file) as reader:
                stored[name] = reader.get_tensor(name)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in arrays.items())
    model.save_pretrained(tmp_path / "again")
    again = macko_llm.load(tmp_path / "again", device="cuda")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_where_the_kernels_do_not_run_plain_torch_does(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is too old, or a GPU that the library was not compiled for: one warning, the same text."""
    expected = macko_llm.load(packed, device="cuda")
    tokens = random_tokens(1, 8).to(GPU)
    native._probe.cache_clear()
    monkeypatch.setattr(native, "why_not_on", lambda _: "no kernel image is available for execution on the device")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = macko_llm.load(packed, device="cuda")
            with torch.inference_mode():
                logits = model(tokens).logits
                one = model(tokens[:, :1]).logits
        said = [str(warning.message) for warning in caught if issubclass(warning.category, MackoWarning)]
        assert len(said) == 1
        assert "no kernel image is available" in said[0]
        assert not any(layer.is_arranged for group in layer_groups(model) for layer in group.values())
    finally:
        native._probe.cache_clear()
    with torch.inference_mode():
        assert (logits - expected(tokens).logits).abs().max() < 0.02
        assert (one - expected(tokens[:, :1]).logits).abs().max() < 0.02


def test_the_probe_finds_the_kernels_at_work() -> None:
    native.why_not_on.cache_clear()
    assert native.why_not_on(0) is None
    assert native.runs_on(torch.device("cuda"))
    assert not native.runs_on(torch.device("cpu"))


def test_a_torch_without_its_private_names_takes_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make()
    x = torch.randn(1, COLS, device=GPU).half()
    with torch.inference_mode():
        expected = layer(x)
        monkeypatch.setattr(native, "_short_way", None)
        assert torch.equal(layer(x), expected)
        monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
        monkeypatch.setattr(gpu_layout, "_python_modes", layout.modes_counter())
        assert not layer.packed._is_plain(x, layer.bias)
        assert torch.equal(layer(x), expected)


def test_wide_matrices_of_float32_inputs() -> None:
    """Where x as float32 does not fit beside the sums, the product is dense."""
    cols = native.sliced_max_cols(GPU) - 1
    matrix = arranged(random_matrix(40, cols, 0.5, torch.float16).sign())
    x = whole_numbers(1, cols).to(GPU, torch.float32)
    assert matrix.few_tokens(torch.float16) > matrix.few_tokens(torch.float32) == 0
    expected = x.double().cpu() @ matrix.dense().double().cpu().T
    assert torch.equal(matrix.linear(x, None).double().cpu(), expected)
