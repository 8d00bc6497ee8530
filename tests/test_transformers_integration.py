"""Packed checkpoints in plain transformers: loading, saving, generating, and imports in either order."""

import functools
import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_tokens, save_model
from helpers import assert_plain, copy_model, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import macko_llm
from macko_llm import checkpoint, models
from macko_llm.errors import FormatError, MackoError, UsageError
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.transformers_integration import MackoConfig, fuse_projections

TOKENS = random_tokens(2, 11)
MANY = random_tokens(2, 35)
"""Packed layers multiply so many as dense ones do; fewer they add up in an order of their own."""


def _make_packed(folder: Path, family: str, dtype: torch.dtype = torch.float16) -> Path:
    save_model(folder / "dense", family, dtype)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_packed(tmp_path_factory.mktemp("llama"), "llama")


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


def _bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def _python(code: str, *arguments: object) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# Imports

LOAD = """
import sys, inspect, torch
from safetensors.torch import save_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[3])
modeling_utils = sys.modules["transformers.modeling_utils"]
print(type(modeling_utils.__spec__.loader).__name__, type(modeling_utils.__loader__).__name__)
assert "class PreTrainedModel" in inspect.getsource(modeling_utils)
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import macko_llm\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM, PreTrainedModel\nimport macko_llm",
    ],
    ids=["macko first", "transformers first"],
)
def test_plain_from_pretrained_in_a_new_process(imports: str, packed: Path, tmp_path: Path) -> None:
    tokens = ",".join(map(str, TOKENS[0].tolist()))
    loaders = _python(imports + LOAD, packed, tokens, tmp_path / "logits").split()
    logits = load_file(tmp_path / "logits")["logits"]
    assert torch.equal(logits, _logits(macko_llm.load(packed, device="cpu"), TOKENS[:1]))
    assert loaders == [importlib.machinery.SourceFileLoader.__name__] * 2  # the hook leaves no trace


def test_import_is_cheap() -> None:
    heavy = _python(
        "import sys, macko_llm, macko_llm.cli.main\n"
        "print(*({'torch', 'transformers', 'datasets', 'safetensors', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    assert heavy.split() == []


# Loading


def test_from_pretrained_is_load(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(isinstance(module, MackoLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(_logits(model), _logits(macko_llm.load(str(packed), device="cpu")))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: object, packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, max_memory={"cpu": "1GB"})
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(_logits(model), _logits(AutoModelForCausalLM.from_pretrained(packed)))


def test_packed_arrays_take_no_gradients(packed: Path) -> None:
    for model in (AutoModelForCausalLM.from_pretrained(packed), macko_llm.load(packed, dtype="float32", device="cpu")):
        layers = [module for module in model.modules() if isinstance(module, MackoLinear)]
        assert layers
        assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt_neox"])  # biases, a tied head, a renamed head
def test_float32_activations_on_float16_values(family: str, tmp_path: Path) -> None:
    folder = _make_packed(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if not name.endswith(ARRAY_NAMES)}
    assert dtypes == {torch.float32}
    for module in model.modules():
        if isinstance(module, MackoLinear):
            assert module.is_arranged
            assert module.packed.dtype == torch.float16
    assert (_logits(model) - _logits(dense)).abs().max() < 1e-3
    assert (_logits(model, TOKENS[:1, :1]) - _logits(dense, TOKENS[:1, :1])).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("values", "asked"), [(torch.float16, "bfloat16"), (torch.bfloat16, "float16")], ids=["float16", "bfloat16"]
)
def test_the_other_16_bit_dtype_is_that_of_the_rest(values: torch.dtype, asked: str, tmp_path: Path) -> None:
    """Activations and dense weights have it; packed values keep theirs, and are saved and loaded again so.

    Only `macko_llm.load` reads them as bfloat16 on a CPU, where that is asked for.
    """
    folder = _make_packed(tmp_path, "llama", values)
    dtype = getattr(torch, asked)
    for load, held in (
        (lambda folder: macko_llm.load(folder, device="cpu").to(dtype), values),
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), values),
        (lambda folder: macko_llm.load(folder, dtype=asked, device="cpu"), torch.bfloat16),
    ):
        model, dense = load(folder), load(tmp_path / "pruned")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {module.packed.dtype for module in model.modules() if isinstance(module, MackoLinear)} == {held}
        for tokens in (TOKENS, TOKENS[:1, :1]):
            logits = _logits(model, tokens)
            assert logits.dtype == getattr(torch, asked)
            expected = _logits(dense, tokens)
            assert (logits - expected).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    again = macko_llm.load(tmp_path / "again", device="cpu")
    assert torch.equal(_logits(again), _logits(model))


def test_a_loaded_model_keeps_no_dense_weight_for_gradients(tmp_path: Path) -> None:
    """Outside no_grad, where embeddings would want gradients: nothing of a packed model does."""
    for load in (macko_llm.load, AutoModelForCausalLM.from_pretrained):
        model = load(_make_packed(tmp_path, "llama") if load is macko_llm.load else tmp_path / "packed")
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(TOKENS).logits.requires_grad


def test_who_overwrites_the_file_does_not_change_the_model(tmp_path: Path) -> None:
    folder = _make_packed(tmp_path, "llama")
    for load in (lambda: macko_llm.load(folder, device="cpu"), lambda: AutoModelForCausalLM.from_pretrained(folder)):
        model = load()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(ARRAY_NAMES)}
        (file,) = folder.glob("*.safetensors")
        content = file.read_bytes()
        with file.open("r+b") as stream:
            stream.seek(len(content) // 2)
            stream.write(b"\xff" * (len(content) - len(content) // 2))
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        file.write_bytes(content)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_damage_in_offloaded_layers_is_found_when_they_load(place: str, tmp_path: Path) -> None:
    folder = _make_packed(tmp_path, "llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"} if place == "disk" else {"model.layers": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    expected = _logits(macko_llm.load(folder, device="cpu"), MANY)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(folder, **options), MANY), expected)
    info = next(
        info
        for file in folder.glob("*.safetensors")
        for name, info in checkpoint.tensor_infos([file]).items()
        if name == "model.layers.1.mlp.up_proj.weight_deltas"
    )
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\xff" * 200)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj is not valid MACKO data \(row 0 reaches column"):
        AutoModelForCausalLM.from_pretrained(folder, **options)


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_layer_with_a_forward_of_its_own_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _make_packed(tmp_path, "llama")
    create = LlamaMLP.__init__

    def create_doubled(self: LlamaMLP, config: LlamaConfig) -> None:
        create(self, config)
        self.down_proj.__class__ = Doubled

    monkeypatch.setattr(LlamaMLP, "__init__", create_doubled)
    with pytest.raises(FormatError, match=r"packs model\.layers\.0\.mlp\.down_proj"):
        macko_llm.load(folder, device="cpu")
    assert not any(name.endswith("down_proj") for name in models.prunable_linears(models.skeleton(folder)))


@pytest.mark.parametrize(("family", "tied"), [("gemma2", True), ("llama", False)])
def test_the_head_stays_dense_tied_or_not(family: str, tied: bool, tmp_path: Path) -> None:
    model = macko_llm.load(_make_packed(tmp_path, family), device="cpu")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear
    assert (head.weight is embedding.weight) == tied
    assert ("lm_head.weight" in weights(tmp_path / "packed")) != tied
    dense = macko_llm.load(tmp_path / "pruned", device="cpu")
    assert torch.equal(_logits(model, MANY), _logits(dense, MANY))
    assert models.memory_bytes(model) < models.memory_bytes(dense)


def test_state_dict_loads_into_another_copy(packed: Path) -> None:
    one, other = (AutoModelForCausalLM.from_pretrained(packed) for _ in range(2))
    layer = other.model.layers[0].mlp.up_proj
    layer.restore()
    with torch.no_grad():
        layer.weight_values.zero_()
    assert not torch.equal(_logits(one), _logits(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(_logits(one), _logits(other))


# Saving


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_save_pretrained_gives_the_same_bytes(family: str, shards: str, tmp_path: Path) -> None:
    packed = _make_packed(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shards)
    assert (len(checkpoint.weight_files(tmp_path / "saved")) > 1) == (shards == "40KB")
    assert _bits(weights(tmp_path / "saved")) == _bits(weights(packed))
    if shards == "5GB":
        saved = tmp_path / "saved" / "model.safetensors"
        assert saved.read_bytes() == (packed / "model.safetensors").read_bytes()
    assert checkpoint.read_config(tmp_path / "saved") == checkpoint.read_config(packed)
    assert inspect_checkpoint(tmp_path / "saved").layers == inspect_checkpoint(packed).layers
    assert torch.equal(_logits(macko_llm.load(tmp_path / "saved", device="cpu")), _logits(model))


def test_a_model_loaded_as_float32_saves_its_packed_values_as_they_were(packed: Path, tmp_path: Path) -> None:
    model = macko_llm.load(packed, dtype="float32", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    stored, saved = _bits(weights(packed)), _bits(weights(tmp_path / "saved"))
    arrays = [name for name in stored if name.endswith(ARRAY_NAMES)]
    assert len(arrays) == 3 * 14
    assert {name: saved[name] for name in arrays} == {name: stored[name] for name in arrays}
    assert torch.equal(_logits(macko_llm.load(tmp_path / "saved", device="cpu")), _logits(model))


def test_grouping_changes_nothing_on_a_cpu(packed: Path) -> None:
    model = macko_llm.load(packed, device="cpu")
    before = _bits(model.state_dict())
    fuse_projections(model)
    fuse_projections(
        macko_llm.load(packed.parent / "pruned", device="cpu")
    )  # of a dense model there is nothing to group
    assert _bits(model.state_dict()) == before
    assert all(module.is_arranged for module in model.modules() if isinstance(module, MackoLinear))


# Generating


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_the_dense_model(cache: str, packed: Path) -> None:
    texts = []
    for folder in (packed, packed.parent / "pruned"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        options = {} if cache == "dynamic" else {"cache_implementation": cache, "disable_compile": True}
        texts.append(model.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options))
    assert texts[0].shape == (2, 11 + 8)
    assert torch.equal(texts[0], texts[1])


def test_what_the_quantizer_says_of_itself(packed: Path) -> None:
    quantizer = AutoModelForCausalLM.from_pretrained(packed).hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert quantizer.is_trainable  # through adapters, tests/test_peft_integration.py


# Errors reach the user through plain transformers too


def test_a_newer_format_version(packed: Path, tmp_path: Path) -> None:
    quantization = {**checkpoint.read_config(packed)["quantization_config"], "format_version": 2}
    folder = copy_model(packed, tmp_path / "model", quantization_config=quantization)
    with pytest.raises(FormatError, match=r"format version 2 .* update macko-llm") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert_plain(str(caught.value))


def test_unknown_keys_of_a_later_minor_version_are_ignored(packed: Path, tmp_path: Path) -> None:
    quantization = {**checkpoint.read_config(packed)["quantization_config"], "made_on": "a Tuesday"}
    folder = copy_model(packed, tmp_path / "model", quantization_config=quantization)
    assert torch.equal(
        _logits(AutoModelForCausalLM.from_pretrained(folder)), _logits(macko_llm.load(packed, device="cpu"))
    )


def test_a_state_dict_in_place_of_files_is_refused(packed: Path) -> None:
    with pytest.raises(MackoError, match="pass from_pretrained its folder") as caught:
        LlamaForCausalLM.from_pretrained(
            None,
            config=models.load_config(packed),
            state_dict=AutoModelForCausalLM.from_pretrained(packed).state_dict(),
        )
    assert_plain(str(caught.value))


# How a model is held


def _held(model: PreTrainedModel) -> set[tuple[str, int]]:
    return {(module.layout, module.tokens) for module in model.modules() if isinstance(module, MackoLinear)}


@pytest.mark.filterwarnings("error")
def test_every_packed_layer_is_told_the_layout_and_the_tokens(packed: Path) -> None:
    config = MackoConfig(value_dtype="bfloat16", layout="tiled", tokens=8)  # the checkpoint's is float16, and stays
    given = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    assert _held(given) == {("tiled", 8)}
    assert given.config.quantization_config.value_dtype == "float16"
    assert _held(macko_llm.load(packed, device="cpu", layout="sliced", tokens=3)) == {("sliced", 3)}
    assert _held(macko_llm.load(packed, device="cpu")) == _held(AutoModelForCausalLM.from_pretrained(packed))
    assert _held(AutoModelForCausalLM.from_pretrained(packed)) == {("auto", 1)}
    assert torch.equal(_logits(given), _logits(macko_llm.load(packed, device="cpu")))


def test_the_method_is_registered_where_transformers_lacks_the_function_that_is_wrapped() -> None:
    script = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer\n"
        "del AutoHfQuantizer.merge_quantization_configs\n"
        "import macko_llm.transformers_integration\n"
        "print('macko' in AUTO_QUANTIZER_MAPPING, hasattr(AutoHfQuantizer, 'merge_quantization_configs'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "True False\n", run.stderr


def test_no_file_holds_the_layout(packed: Path, tmp_path: Path) -> None:
    macko_llm.load(packed, device="cpu").save_pretrained(tmp_path / "auto")
    macko_llm.load(packed, device="cpu", layout="tiled", tokens=8).save_pretrained(tmp_path / "tiled")
    names = sorted(path.name for path in (tmp_path / "auto").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "tiled").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "tiled" / name).read_bytes()
    config = MackoConfig(layout="tiled", tokens=8)
    assert config.to_dict() == config.to_diff_dict() == MackoConfig().to_dict()


def test_what_a_file_says_of_a_layout_is_ignored(packed: Path, tmp_path: Path) -> None:
    copy_model(packed, tmp_path / "copy")
    config = checkpoint.read_config(tmp_path / "copy")
    config["quantization_config"] |= {"layout": "spiral", "tokens": 0}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert _held(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")) == {("auto", 1)}
    assert _held(macko_llm.load(tmp_path / "copy", device="cpu", tokens=4)) == {("auto", 4)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "spiral"}, "There is no layout 'spiral'; use auto, sliced or tiled"),
        ({"tokens": 0}, "0 tokens at a time; use tokens=1 or more"),
    ],
)
def test_how_a_model_cannot_be_held(options: dict[str, Any], words: str, packed: Path) -> None:
    for call in (MackoConfig, functools.partial(macko_llm.load, packed, device="cpu")):
        with pytest.raises(UsageError, match=words) as caught:
            call(**options)
        assert_plain(str(caught.value))


def test_a_layout_is_of_a_packed_model(packed: Path) -> None:
    dense = packed.parent / "dense"
    with pytest.raises(UsageError, match=r"dense is not packed; make a packed checkpoint") as caught:
        macko_llm.load(dense, device="cpu", layout="tiled")
    assert_plain(str(caught.value))
    macko_llm.load(dense, device="cpu", tokens=8)  # a dense model serves as many as there are
    config = models.load_config(dense)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="passing a MackoConfig config"):
        LlamaForCausalLM.from_pretrained(dense, config=config, quantization_config=MackoConfig())
