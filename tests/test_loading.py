"""Loading by streaming: the model that from_pretrained gives, of every family, and nothing that stays mapped to a file."""

import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, make_tokenizer, random_tokens
from helpers import assert_plain, copy_model, edit_weights, truncate, weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, PreTrainedModel

from macko_llm import checkpoint, loading, models, streaming
from macko_llm.dtypes import HEADERS, MODEL_DTYPES
from macko_llm.errors import CheckpointError, MackoError
from macko_llm.linear import MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.shards import ShardWriter

TOKENS = random_tokens(2, 11)
RENAMED = "gpt_neox"
"""Its head has another name on disk, which only transformers translates."""


def _save(folder: Path, model: PreTrainedModel) -> Path:
    """A dense checkpoint in float16, half of its weights zero, and a generation config that is not the default."""
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(linear.weight.abs() < linear.weight.abs().median(dim=1, keepdim=True).values, 0)
    model.generation_config = GenerationConfig(temperature=0.625, top_k=7, do_sample=True, eos_token_id=[1, 5])
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _folders(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _folders(tmp_path_factory.mktemp("models"), "llama")


def _folders(parent: Path, family: str) -> dict[str, Path]:
    dense = _save(parent / "dense", FAMILIES[family]())
    pack_checkpoint(dense, parent / "packed")
    return {"dense": dense, "packed": parent / "packed"}


def _assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(model) is type(expected)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in expected.named_modules()
    }
    for kind in ("named_parameters", "named_buffers"):
        tensors = [dict(getattr(each, kind)(remove_duplicate=False)) for each in (model, expected)]
        assert list(tensors[0]) == list(tensors[1])
        for name, tensor in tensors[0].items():
            other = tensors[1][name]
            assert (tensor.dtype, tensor.device, tensor.shape) == (other.dtype, other.device, other.shape), name
            assert tensor.requires_grad == other.requires_grad, name
            assert torch.equal(tensor, other), name
        assert len({id(tensor) for tensor in tensors[0].values()}) == len(
            {id(tensor) for tensor in tensors[1].values()}
        )
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert models.memory_bytes(model) == models.memory_bytes(expected)
    for attribute in ("training", "name_or_path", "is_quantized", "quantization_method", "hf_device_map"):
        assert getattr(model, attribute, None) == getattr(expected, attribute, None), attribute
    assert type(getattr(model, "hf_quantizer", None)) is type(getattr(expected, "hf_quantizer", None))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def _mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The same model


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dense", dtype) for dtype in ("auto", *MODEL_DTYPES)] + [("packed", dtype) for dtype in ("auto", "float32")],
)
def test_it_is_the_model_of_from_pretrained(kind: str, dtype: str, family: str, folders: dict[str, Path]) -> None:
    folder = folders[kind]
    model = loading.load(folder, dtype=dtype, device="cpu")
    assert family == RENAMED or not _mapped(folder)
    expected: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=models.resolve_dtype(dtype))
    _assert_same(model, expected)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_it_saves_what_from_pretrained_saves(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loading.load(folders[kind], device="cpu").save_pretrained(tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(folders[kind]).save_pretrained(tmp_path / "theirs")
    assert _files(tmp_path / "ours") == _files(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert name in _files(tmp_path / "ours")


def test_shards(llama: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in llama.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / kind, max_shard_size="40KB")
        assert len(checkpoint.weight_files(tmp_path / kind)) > 3
        sharded = loading.load(tmp_path / kind, device="cpu")
        assert not _mapped(tmp_path / kind)
        sharded.config.name_or_path = sharded.name_or_path = model.name_or_path
        _assert_same(sharded, model)


def test_a_folder_without_a_generation_config(llama: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_model(llama["packed"], tmp_path / "model")
    (folder / "generation_config.json").unlink()
    _assert_same(loading.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))


def test_packed_layers_that_stay_dense_in_part(llama: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint may pack some of its layers only."""
    folder = copy_model(llama["packed"], tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    arrays = [key for key in weights(folder) if key.startswith(f"{name}.")]
    assert len(arrays) == 3
    edit_weights(folder, {**dict.fromkeys(arrays), f"{name}.weight": weights(llama["dense"])[f"{name}.weight"]})
    model = loading.load(folder, device="cpu")
    assert type(model.get_submodule(name)) is nn.Linear
    assert sum(isinstance(module, MackoLinear) for module in model.modules()) == 13
    _assert_same(model, AutoModelForCausalLM.from_pretrained(folder))


def test_tensors_that_the_model_does_not_know_are_ignored(llama: dict[str, Path], tmp_path: Path) -> None:
    """Old checkpoints store the frequencies of their rotary embeddings."""
    folder = copy_model(llama["dense"], tmp_path / "model")
    edit_weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    model = loading.load(folder, device="cpu")
    assert not _mapped(folder)
    _assert_same(model, AutoModelForCausalLM.from_pretrained(folder))


# What transformers must load itself


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_stored(equal: bool, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", FAMILIES["gemma2"]())
    head = weights(folder)["model.embed_tokens.weight"]
    edit_weights(folder, {"lm_head.weight": head if equal else head + 1})
    _assert_same(loading.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))


def test_tied_weights_of_which_only_the_head_is_stored(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", FAMILIES["gemma2"]())
    edit_weights(
        folder, {"model.embed_tokens.weight": None, "lm_head.weight": weights(folder)["model.embed_tokens.weight"]}
    )
    _assert_same(loading.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))


def test_names_that_transformers_translates(llama: dict[str, Path], tmp_path: Path) -> None:
    """A base model, whose names lack their first part, with a head that is there."""
    folder = copy_model(llama["dense"], tmp_path / "model")
    edit_weights(
        folder,
        {
            new: tensor
            for name, tensor in weights(folder).items()
            for new, tensor in ((name, None), (name.removeprefix("model."), tensor))
            if name.startswith("model.")
        },
    )
    assert "layers.0.mlp.up_proj.weight" in weights(folder)
    _assert_same(loading.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))


def test_experts_that_transformers_merges(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_local_experts=2,
    )
    build(config).save_pretrained(tmp_path)
    assert any(".experts.1." in name for name in weights(tmp_path))
    _assert_same(loading.load(tmp_path, device="cpu"), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_file_beside_an_index(llama: dict[str, Path], tmp_path: Path) -> None:
    """Transformers reads the file and not the index, so that must not be guessed."""
    folder = tmp_path / "model"
    FAMILIES["llama"]().half().save_pretrained(folder, max_shard_size="40KB")
    shutil.copy(llama["dense"] / "model.safetensors", folder)
    _assert_same(loading.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))


def test_a_model_with_code_of_its_own(llama: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnModel"}
    for kind, source in llama.items():
        folder = copy_model(source, tmp_path / kind, model_type="own", auto_map=own, architectures=["OwnModel"])
        (folder / "own_llama.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        model = loading.load(folder, device="cpu", trust_remote_code=True)
        assert not _mapped(folder)
        _assert_same(model, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))


# Files


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_file_that_is_overwritten_does_not_change_the_model(
    kind: str, llama: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_model(llama[kind], tmp_path / "model")
    model = loading.load(folder, device="cpu")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.write(bytes((folder / "model.safetensors").stat().st_size))
    expected = AutoModelForCausalLM.from_pretrained(llama[kind])
    model.config.name_or_path = model.name_or_path = expected.name_or_path
    _assert_same(model, expected)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_truncated_files(kind: str, llama: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_model(llama[kind], tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in [0, 4, 8, 100, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 8)]:
        file.write_bytes(whole[:length])
        with pytest.raises(MackoError, match="corrupt or truncated") as caught:
            loading.load(folder, device="cpu")
        assert_plain(str(caught.value))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = _write(tmp_path, {"a": torch.zeros(100)})
    info = checkpoint.tensor_infos([file])["a"]
    for damage in (lambda: truncate(file, 4), file.unlink):
        damage()
        with streaming.TensorReader(torch.device("cpu")) as reader, pytest.raises(CheckpointError) as caught:
            streaming.wait(reader.read(info, torch.empty(100)))
        assert_plain(str(caught.value))


# Reading tensors


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = folder / "model.safetensors"
    writer = ShardWriter(folder, 10**9)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return file


@pytest.mark.parametrize("chunk", [16, 1000, 1 << 20])
def test_every_dtype_is_read_and_converted(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in many chunks, and with a chunk at the end that is not full."""
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2 if name == "BOOL" else 100, (17, 13), generator=generator).to(dtype)
        for name, dtype in HEADERS.items()
    }
    shapes = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "vector": torch.arange(5, dtype=torch.int16)}
    infos = checkpoint.tensor_infos([_write(tmp_path, {**tensors, **shapes})])
    with streaming.TensorReader(torch.device("cpu")) as reader:
        for name, stored in {**tensors, **shapes}.items():
            for dtype in (stored.dtype, torch.float32, torch.bfloat16):
                target = torch.full(stored.shape, 77, dtype=dtype)
                streaming.wait(reader.read(infos[name], target))
                assert torch.equal(target, stored.to(dtype)), (name, dtype)


def test_all_tensors_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are used over and over by several threads, and each byte arrives where it belongs."""
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 512)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{index}": torch.randn(50 + index, 40, generator=generator).half() for index in range(20)}
    infos = checkpoint.tensor_infos([_write(tmp_path, tensors)])
    targets = {name: torch.empty(tensor.shape, dtype=torch.float32) for name, tensor in tensors.items()}
    with streaming.TensorReader(torch.device("cpu")) as reader:
        streaming.wait([future for name, info in infos.items() for future in reader.read(info, targets[name])])
    assert all(torch.equal(targets[name], tensor.float()) for name, tensor in tensors.items())


def test_threads_that_load_at_once_get_whole_models(llama: dict[str, Path]) -> None:
    folders = [llama["packed"], llama["dense"]] * 4
    expected = {folder: loading.load(folder, device="cpu")(TOKENS).logits for folder in set(folders)}
    with ThreadPoolExecutor(len(folders)) as threads:
        found = threads.map(lambda folder: loading.load(folder, device="cpu"), folders)
        for folder, model in zip(folders, found, strict=True):
            assert torch.equal(model(TOKENS).logits, expected[folder])
