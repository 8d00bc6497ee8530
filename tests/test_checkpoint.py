"""Folders of files: finding them, replacing them without loss, writing shards, and what is damaged or missing."""

import json
import re
from pathlib import Path

import pytest
import torch
from families import save_model
from helpers import assert_plain, truncate
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import macko_llm
from macko_llm import __version__, checkpoint, models
from macko_llm.errors import CheckpointError, UsageError
from macko_llm.packing import pack_checkpoint
from macko_llm.shards import ShardWriter


def _model_folder(path: Path, content: str = "{}") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(content)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_locate_finds_a_folder(tmp_path: Path) -> None:
    folder = _model_folder(tmp_path / "model")
    assert checkpoint.locate(folder) == checkpoint.locate(str(folder)) == folder


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../nowhere/model", "a/b/c", "/nowhere/at/all", "", "a b/c"])
def test_locate_says_that_there_is_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.locate(name or tmp_path)
    assert_plain(str(caught.value))


def test_locate_refuses_a_folder_without_config_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoint.locate(tmp_path)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; name the folder that holds it"):
        checkpoint.locate(file)


def test_locate_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever keeps a download from working (here: an empty cache, offline) is one plain sentence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no folder nobody/nothing, and the hub did not give") as caught:
        checkpoint.locate("nobody/nothing")
    assert_plain(str(caught.value))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "macko"}}, "macko"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "an unknown method"),
        ({"quantization_config": "macko"}, "an unknown method"),
    ],
)
def test_how_a_checkpoint_is_stored(config: dict[str, object], method: str | None, tmp_path: Path) -> None:
    folder = _model_folder(tmp_path, json.dumps(config))
    assert checkpoint.quantization_method(folder) == method
    assert checkpoint.is_packed(folder) == (method == "macko")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        checkpoint.read_config(tmp_path)
    assert_plain(str(caught.value))


def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    folder = _model_folder(tmp_path / "model")
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    for read in (
        lambda: checkpoint.read_config(folder),
        lambda: checkpoint.tensor_infos([folder / "model.safetensors"]),
    ):
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); check its rights") as caught:
            read()
        assert_plain(str(caught.value))


def test_provenance_is_stamped_and_read_back(tmp_path: Path) -> None:
    assert checkpoint.read_provenance(tmp_path) == {}
    checkpoint.write_provenance(tmp_path, {"prune": {"method": "wanda"}, "macko_version": "0.0.1"})
    assert checkpoint.read_provenance(tmp_path) == {"macko_version": __version__, "prune": {"method": "wanda"}}


def test_side_files_are_everything_but_weights_and_what_is_written_anew(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    kept = {"tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja", "modeling_own.py"}
    left = {"config.json", "macko.json", "README.md", "model.safetensors", "model.safetensors.index.json", ".cache"}
    left |= {"pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.gguf"}
    source.mkdir()
    for name in kept | left:
        (source / name).write_text(name)
    (source / "original").mkdir()
    checkpoint.copy_side_files(source, target)
    assert _files(target) == {name: name.encode() for name in kept}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2kb", 2000),
        ("1GiB", 2**30),
        ("1.5 GB", 15 * 10**8),
        ("3T", 3 * 10**12),
        ("123", 123),
        (" 7 B ", 7),
    ],
)
def test_parse_size(text: str, count: int) -> None:
    assert checkpoint.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "five", "-1GB", "0GB", "0.1B", "1EB", "1e9", "5GBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        checkpoint.parse_size(text)
    assert_plain(str(caught.value))


# Damage


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(100)}, file)
    whole = file.read_bytes()
    for content in (
        b"",
        whole[:4],
        whole[:-1],
        whole[: len(whole) // 2],
        b"\xff" * 200,
        b"\x10" + b"\0" * 7 + b"{" * 16,
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt or truncated") as caught:
            checkpoint.tensor_infos(checkpoint.weight_files(tmp_path))
        assert_plain(str(caught.value))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write_shards(folder: Path, sizes: dict[str, int], max_shard_bytes: int) -> None:
    writer = ShardWriter(folder, max_shard_bytes)
    for name, size in sizes.items():
        writer.add(name, torch.zeros(size, dtype=torch.uint8))
    writer.close()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no safetensors weights") as caught:
        checkpoint.weight_files(tmp_path)
    assert_plain(str(caught.value))
    _write_shards(tmp_path, {"a": 10, "b": 20}, 15)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors") as caught:
        checkpoint.weight_files(tmp_path)
    assert_plain(str(caught.value))
    for index in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match="lacks its shards"):
            checkpoint.weight_files(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    """Files outside of the folder are not read, though they are there; in it and below they may be links."""
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    _write_shards(_made(folder), {"a": 10}, 15)
    _write_shards(_made(elsewhere), {"a": 10}, 15)
    (folder / "below").mkdir()
    (folder / "below" / "link.safetensors").symlink_to(elsewhere / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "own.safetensors")

    def name(file: str) -> None:
        index = {"metadata": {}, "weight_map": {"a": "own.safetensors", "b": file}}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)

    for file in (
        "../elsewhere/model.safetensors",
        str(elsewhere / "model.safetensors"),
        "below/../../model",
        "..",
        ".",
    ):
        name(file)
        with pytest.raises(CheckpointError, match=rf" names {re.escape(file)}, which is outside") as caught:
            checkpoint.weight_files(folder)
        assert_plain(str(caught.value))
    for file in ("below/link.safetensors", str(folder / "own.safetensors"), "below/../own.safetensors"):
        name(file)
        assert folder / file in checkpoint.weight_files(folder)


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}])
def test_an_index_without_metadata_is_refused_as_transformers_refuses_it(
    metadata: dict[str, object], tmp_path: Path
) -> None:
    dense = save_model(tmp_path / "dense", "llama", torch.float16)
    (dense / "model.safetensors").rename(dense / "own.safetensors")
    weight_map = dict.fromkeys(checkpoint.tensor_infos([dense / "own.safetensors"]), "own.safetensors")
    index = dense / "model.safetensors.index.json"
    checkpoint.write_json(index, {**metadata, "weight_map": weight_map})
    with pytest.raises((KeyError, TypeError)):
        AutoModelForCausalLM.from_pretrained(dense)
    for read in (
        lambda: checkpoint.weight_files(dense),
        lambda: pack_checkpoint(dense, tmp_path / "packed"),
        lambda: macko_llm.load(dense, device="cpu"),
        lambda: models.load_model(dense, device="cpu"),
    ):
        with pytest.raises(
            CheckpointError, match=r"index\.json has no metadata, .*; add \"metadata\": \{\} to it"
        ) as caught:
            read()
        assert_plain(str(caught.value))
    checkpoint.write_json(index, {"metadata": {}, "weight_map": weight_map})  # as the sentence says
    macko_llm.load(dense, device="cpu")
    AutoModelForCausalLM.from_pretrained(dense)


def test_a_truncated_shard_among_whole_ones(tmp_path: Path) -> None:
    _write_shards(tmp_path, {"a": 300, "b": 300}, 400)
    truncate(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        checkpoint.tensor_infos(checkpoint.weight_files(tmp_path))
