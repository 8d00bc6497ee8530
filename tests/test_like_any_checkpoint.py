"""A packed checkpoint in what people do with any checkpoint of Hugging Face: device maps, dtypes, pipelines, drafts, saving."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from families import SENTENCES, build, random_tokens, save_model
from helpers import assert_plain, edit_weights, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from macko_llm import checkpoint
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.errors import MackoError
from macko_llm.linear import MackoLinear
from macko_llm.models import prunable_linears
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.transformers_integration import MackoConfig

TOKENS = random_tokens(2, 11)
MANY = random_tokens(2, 35)
"""Packed layers multiply so many as dense ones do; fewer they add up in an order of their own."""
UNTIED, TIED = "llama", "gemma2"
PACKED_LAYERS = 14


def _make(folder: Path, family: str, dtype: torch.dtype, shards: str = "5GB") -> Path:
    """A folder with a model as "dense", "pruned" to half and "packed"."""
    save_model(folder / "dense", family, dtype)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed", max_shard_size=shards)
    return folder


def _save_pruned(model: PreTrainedModel, folder: Path) -> None:
    for linear in prunable_linears(model).values():
        linear.weight.data.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=[(UNTIED, torch.float16), (TIED, torch.bfloat16)], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("model"), *request.param)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


def _packed_layers(model: PreTrainedModel) -> list[MackoLinear]:
    return [module for module in model.modules() if isinstance(module, MackoLinear)]


# Loading


@pytest.mark.parametrize("dtype", [None, "auto", "float16", "bfloat16", "float32", "float64"])
def test_every_dtype_is_that_of_the_dense_model(dtype: str | None, model: Path) -> None:
    """Of all that is not packed, and of what the model computes."""
    given = {} if dtype is None else {"dtype": dtype}
    packed, dense = (AutoModelForCausalLM.from_pretrained(model / kind, **given) for kind in ("packed", "pruned"))
    assert packed.dtype == dense.dtype
    assert {parameter.dtype for parameter in packed.parameters()} == {dense.dtype}
    stored = AutoModelForCausalLM.from_pretrained(model / "packed").dtype
    assert {layer.packed.dtype for layer in _packed_layers(packed)} == {stored}
    assert dense.dtype == (stored if dtype in (None, "auto") else getattr(torch, str(dtype)))
    found, expected = _logits(packed), _logits(dense)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 8 * torch.finfo(expected.dtype).eps * expected.abs().max()


def _nbytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, packed as they are stored, and of all buffers that are not packed weights."""
    for layer in _packed_layers(model):
        layer.restore()
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _in_blocks(first: str, second: str) -> dict[str, str]:
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(rest, "cpu"), "model.layers.0": first, "model.layers.1": second}


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize(
    "device_map",
    [{"": "disk"}, _in_blocks("disk", "cpu"), _in_blocks("cpu", "disk"), _in_blocks("disk", "disk")],
    ids=["all", "first block", "last block", "blocks"],
)
def test_layers_on_disk_compute_the_same(device_map: dict[str, str], shards: str, model: Path, tmp_path: Path) -> None:
    pack_checkpoint(model / "pruned", tmp_path / "packed", max_shard_size=shards)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    for _ in range(2):  # each time they are read again
        assert torch.equal(_logits(loaded, MANY), _logits(whole, MANY))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **options), whole.generate(TOKENS, **options))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_device_map_counts_packed_bytes_to_the_last(dtype: str, model: Path, tmp_path: Path) -> None:
    options = {"dtype": dtype, "device_map": "auto", "offload_folder": tmp_path}
    nbytes = _nbytes(AutoModelForCausalLM.from_pretrained(model / "packed", dtype=dtype))
    fits = AutoModelForCausalLM.from_pretrained(model / "packed", max_memory={"cpu": nbytes}, **options)
    assert not any(parameter.is_meta for parameter in fits.parameters())
    one_byte_less = AutoModelForCausalLM.from_pretrained(model / "packed", max_memory={"cpu": nbytes - 1}, **options)
    assert any(parameter.is_meta for parameter in one_byte_less.parameters())
    assert torch.equal(_logits(one_byte_less), _logits(fits))
    dense = AutoModelForCausalLM.from_pretrained(model / "pruned", max_memory={"cpu": nbytes}, **options)
    assert any(parameter.is_meta for parameter in dense.parameters())  # packed is what fits


# Packing on loading


def test_a_pruned_model_that_is_packed_on_loading_is_the_packed_one(model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model / "pruned", quantization_config=MackoConfig(tokens=4))
    packed = AutoModelForCausalLM.from_pretrained(model / "packed")
    assert len(_packed_layers(loaded)) == PACKED_LAYERS
    assert {layer.tokens for layer in _packed_layers(loaded)} == {4}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(_logits(loaded), _logits(packed))
    loaded.save_pretrained(tmp_path)
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (model / "packed" / name).read_bytes()
    assert not {"macko.json", "README.md"} & {
        path.name for path in tmp_path.iterdir()
    }  # it came with no record of packing
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.to_dict() == {
        **packed.config.to_dict(),
        "_name_or_path": str(tmp_path),
    }


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16"])
def test_a_float32_model_is_packed_in_the_dtype_that_is_asked_for(value_dtype: str, model: Path) -> None:
    config = MackoConfig(value_dtype=value_dtype)
    loaded = AutoModelForCausalLM.from_pretrained(model / "pruned", dtype=torch.float32, quantization_config=config)
    values = getattr(torch, value_dtype)
    assert {layer.packed.dtype for layer in _packed_layers(loaded)} == {values}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(model / "pruned", dtype=torch.float32)
    for name, module in dense.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.to(values).float()
            assert torch.equal(loaded.model.layers.get_submodule(name).packed.dense().float(), module.weight)
    assert (_logits(loaded) - _logits(dense)).abs().max() < 1e-3


def test_a_config_that_is_given_stays_as_it_was(tmp_path: Path) -> None:
    """So that it may serve for several models; `AutoModelForCausalLM` copies it, the model's own class does not."""
    given = MackoConfig()
    folder = _make(tmp_path, UNTIED, torch.bfloat16)
    loaded = LlamaForCausalLM.from_pretrained(folder / "pruned", quantization_config=given)
    assert loaded.config.quantization_config.value_dtype == "bfloat16"
    assert vars(given) == vars(MackoConfig())


def _refused(folder: Path, words: str, **options: object) -> None:
    with pytest.raises(MackoError, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=MackoConfig(), **options)
    assert_plain(str(caught.value))


def test_what_is_not_packed_on_loading(tmp_path: Path) -> None:
    folder = _make(tmp_path, UNTIED, torch.float32)
    _refused(folder / "dense", "No layer has enough zeros .* prune the model first with `macko prune`")
    offloaded = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    _refused(folder / "pruned", "offloaded model .* pack it first", **offloaded)
    name = "model.layers.1.mlp.up_proj.weight"
    for value, words in (
        (1e6, "overflows float16; load the model with dtype=torch.bfloat16"),
        (float("nan"), "NaN or infinity"),
    ):
        weight = weights(folder / "pruned")[name]
        weight[3, 5] = value
        edit_weights(folder / "pruned", {name: weight})
        _refused(folder / "pruned", f"{name} .*{words}")


# Saving


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_save_pretrained_gives_the_folder_back_byte_for_byte(model: Path, shards: str, tmp_path: Path) -> None:
    """But for the index of transformers, which counts parameters, of which packed are none."""
    pack_checkpoint(model / "pruned", tmp_path / "packed", max_shard_size=shards)
    AutoTokenizer.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved", max_shard_size=shards)
    packed, saved = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("packed", "saved")
    )
    assert set(packed) == set(saved)
    assert sum(name.endswith(".safetensors") for name in saved) > 3 or shards == "5GB"
    indices = [json.loads(files.pop(checkpoint.INDEX_FILE, b"{}")) for files in (packed, saved)]
    assert indices[0].get("weight_map") == indices[1].get("weight_map")
    assert indices[0].get("metadata", {}).get("total_size") == indices[1].get("metadata", {}).get("total_size")
    for name in set(saved) - {"tokenizer_config.json"}:  # transformers adds to that, packed or not
        assert saved[name] == packed[name], name


def test_shards_are_cut_alike_from_ten_blocks_on(tmp_path: Path) -> None:
    """Where the order of names is not that of numbers."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    _save_pruned(build(config).half(), tmp_path / "pruned")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "packed", max_shard_size="30KB")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}
        for name in ("packed", "saved")
    ]
    assert len(files[0]) > 4
    assert files[0] == files[1]


# Generating


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block, as compiling takes seconds for each, as "pruned" and "packed"."""
    folder = tmp_path_factory.mktemp("one-block")
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    _save_pruned(build(config).half(), folder / "pruned")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler, as g++")
def test_a_static_cache_is_compiled_as_one_graph_and_gives_the_same_text(
    one_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what an earlier run has compiled
    plain = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    packed = AutoModelForCausalLM.from_pretrained(one_block / "packed", dtype=torch.float32)
    expected = packed.generate(TOKENS, **plain)
    torch._dynamo.reset()
    counters.clear()
    compiling = CompileConfig(fullgraph=True, mode=None, backend="inductor")
    compiling._compile_all_devices = True  # transformers compiles for GPUs only, unless told
    found = packed.generate(TOKENS, cache_implementation="static", compile_config=compiling, **plain)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert torch.equal(found, expected)
    dense = AutoModelForCausalLM.from_pretrained(one_block / "pruned", dtype=torch.float32)
    assert torch.equal(dense.generate(TOKENS, **plain), expected)


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"dtype": "float32"}], ids=str)
def test_a_pipeline_writes_what_the_dense_model_writes(options: dict[str, str], model: Path) -> None:
    texts = [
        pipeline("text-generation", model=str(model / kind), **options)(
            SENTENCES[:2], max_new_tokens=12, do_sample=False
        )
        for kind in ("packed", "pruned")
    ]
    assert texts[0] == texts[1]
    assert all(text[0]["generated_text"].startswith(prompt) for text, prompt in zip(texts[0], SENTENCES, strict=False))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model "packed" at 40 %, and as a "draft", at 60 %."""
    folder = tmp_path_factory.mktemp("stories")
    for name, sparsity in (("packed", 0.4), ("draft", 0.6)):
        recipe = PruneRecipe(method="magnitude", sparsity=sparsity)
        prune_checkpoint(MODEL_FOLDER, folder / f"{name}-pruned", recipe, device="cpu")
        pack_checkpoint(folder / f"{name}-pruned", folder / name)
    return folder


@pytest.mark.parametrize(("target", "draft"), [("packed", "packed"), ("packed", "dense"), ("dense", "packed")])
def test_a_draft_changes_nothing_of_the_text(target: str, draft: str, stories: Path) -> None:
    """It is what greedy decoding writes alone, in fewer steps."""
    folders = {
        "target": {"packed": stories / "packed", "dense": MODEL_FOLDER}[target],
        "draft": {"packed": stories / "draft", "dense": MODEL_FOLDER}[draft],
    }
    model, assistant = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders.values()
    )
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = AutoTokenizer.from_pretrained(MODEL_FOLDER)("Once upon a time", return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, **options)
    alone = len(calls)
    found = model.generate(**inputs, assistant_model=assistant, **options)
    assert torch.equal(found, expected)
    assert len(calls) - alone < alone  # the draft was right at times
