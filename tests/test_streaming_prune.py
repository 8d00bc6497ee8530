"""Pruning with one block in memory at a time gives the bytes that pruning the whole model in memory gives."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SENTENCES, build, make_tokenizer, save_model
from helpers import assert_plain, weights
from torch import nn
from transformers import LlamaConfig

from macko_llm import calibration, models
from macko_llm.errors import CheckpointError
from macko_llm.models import load_tokenizer
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import hidden_states, observing, pipeline, prune_checkpoint, prune_model, sinks
from macko_llm.pruning.hidden_states import STATES_FILE
from macko_llm.pruning.weights import StreamedWeights
from macko_llm.recipe import PruneRecipe

BLOCKS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def recipe(text: str) -> PruneRecipe:
    return PruneRecipe(calibration=text, nsamples=4, seqlen=24)


def _llama(folder: Path, shard_size: str = "5GB", **settings: Any) -> Path:
    config = {
        "vocab_size": 320, "max_position_embeddings": 64, "num_hidden_layers": BLOCKS, "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    build(LlamaConfig(**{**config, **settings})).save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llama(tmp_path_factory.mktemp("models") / "llama")


def _pruned_in_memory(source: Path, target: Path, recipe: PruneRecipe, shard_size: str = "5GB") -> dict[str, bytes]:
    """What transformers writes of the model when all of it was pruned in memory."""
    model = models.load_model(source, dtype=recipe.dtype, device="cpu")
    assert recipe.seqlen is not None
    tokens = calibration.calibration_tokens(
        recipe.calibration, load_tokenizer(source), recipe.nsamples, recipe.seqlen, recipe.seed
    )
    prune_model(model, tokens, recipe)
    model.save_pretrained(target, max_shard_size=shard_size)
    return _files(target)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _assert_same_model(folder: Path, expected: dict[str, bytes]) -> None:
    files = _files(folder)
    assert {name for name in files if name.startswith(("model", "config"))} <= expected.keys()
    assert {name: files[name] for name in expected} == expected
    assert not [name for name in files if name.startswith(".") or name.endswith(".part")]


def _never_in_memory(*_: Any, **__: Any) -> None:
    raise AssertionError("the whole model was loaded")


@contextmanager
def _streaming(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this lasts, loading the whole model fails."""
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", _never_in_memory)
        yield


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_neox"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_streamed_model_of_every_family_has_the_bytes_of_one_pruned_in_memory(
    family: str, dtype: str, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "dense", family)
    how = PruneRecipe(**{**recipe.__dict__, "dtype": dtype})
    expected = _pruned_in_memory(source, tmp_path / "expected", how)
    with _streaming(monkeypatch):
        prune_checkpoint(source, tmp_path / "out", how, device="cpu")
    _assert_same_model(tmp_path / "out", expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sparsegpt"},
        {"update": "admm", "allocation": "owl"},
        {"method": "magnitude"},
        {"pattern": "2:4"},
        {"layers": (("*.0.*", 0.25), ("down_proj", 0.75))},
        {"ignore": ("up_proj", "model.layers.1.*")},
        {"sparsity": 0.0},
    ],
)
def test_every_way_to_prune_streams(
    settings: dict[str, Any], llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = PruneRecipe(**{**recipe.__dict__, **settings})
    expected = _pruned_in_memory(llama, tmp_path / "expected", how)
    with _streaming(monkeypatch):
        prune_checkpoint(llama, tmp_path / "out", how, device="cpu")
    _assert_same_model(tmp_path / "out", expected)


@pytest.mark.parametrize("place", ["device", "host", "disk", "auto"])
def test_the_place_of_the_hidden_states_changes_no_byte(
    place: str, llama: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    expected = _pruned_in_memory(llama, tmp_path / "expected", recipe)
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu", hidden_states=place)
    _assert_same_model(tmp_path / "out", expected)


def test_hidden_states_of_which_the_host_has_no_room_go_to_the_disk(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **how: names.append(Path(name).name) or from_file(name, **how))
    monkeypatch.setattr(hidden_states, "_free_bytes", lambda: 1000)
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    assert names == [STATES_FILE]
    assert not (tmp_path / "out" / STATES_FILE).exists()


def test_a_disk_without_room_for_the_hidden_states_is_a_plain_error(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="no room on the disk; use another of --hidden-states") as caught:
        prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu", hidden_states="disk")
    assert_plain(str(caught.value))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("source_size", "size"), [("20KB", "5GB"), ("5GB", "60KB"), ("40KB", "90KB")])
def test_shards_of_the_source_and_of_the_output(
    source_size: str, size: str, tied: bool, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _llama(tmp_path / "dense", source_size, tie_word_embeddings=tied)
    assert (len([*source.glob("*.safetensors")]) > 1) == (source_size != "5GB")
    expected = _pruned_in_memory(source, tmp_path / "expected", recipe, size)
    assert (len([*(tmp_path / "expected").glob("*.safetensors")]) > 1) == (size != "5GB")
    monkeypatch.setattr(sinks, "MAX_SHARD_SIZE", size)
    with _streaming(monkeypatch):
        prune_checkpoint(source, tmp_path / "out", recipe, device="cpu")
    _assert_same_model(tmp_path / "out", expected)


def test_a_model_that_cannot_be_streamed_is_pruned_in_memory(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_checkpoint(llama, tmp_path / "streamed", recipe, device="cpu")
    monkeypatch.setattr(pipeline, "find_homes", lambda *_: None)
    monkeypatch.setattr(pipeline, "prune_streamed", _never_in_memory)
    prune_checkpoint(llama, tmp_path / "in-memory", recipe, device="cpu")
    assert _files(tmp_path / "streamed") == _files(tmp_path / "in-memory")
    with pytest.raises(CheckpointError, match="prune it without --pack, and pack the result") as caught:
        prune_packed(llama, tmp_path / "packed", recipe, device="cpu")
    assert_plain(str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-memory", "streamed"]


def test_gpt_neox_is_pruned_in_memory(tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "dense", "gpt_neox")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune_streamed", _never_in_memory)
        prune_checkpoint(source, tmp_path / "out", recipe, device="cpu")
    _assert_same_model(tmp_path / "out", _pruned_in_memory(source, tmp_path / "expected", recipe))
    with pytest.raises(CheckpointError, match="does not store its tensors as they are"):
        prune_packed(source, tmp_path / "packed", recipe, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"allocation": "owl"}, {"method": "magnitude"}])
def test_never_more_than_one_block_is_in_memory(
    settings: dict[str, Any], llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeletons: list[nn.Module] = []
    load_empty, block = models.load_empty, StreamedWeights.block
    real: list[set[str]] = []

    def remembered(*args: Any, **options: Any) -> Any:
        skeletons.append(load_empty(*args, **options))
        return skeletons[-1]

    @contextmanager
    def watched(self: StreamedWeights, name: str) -> Iterator[None]:
        with block(self, name):
            real.append({key for key, weight in skeletons[0].named_parameters() if not weight.is_meta})
            yield

    monkeypatch.setattr(models, "load_empty", remembered)
    monkeypatch.setattr(StreamedWeights, "block", watched)
    prune_checkpoint(llama, tmp_path / "out", PruneRecipe(**{**recipe.__dict__, **settings}), device="cpu")
    passes = 2 if "allocation" in settings else 1
    names = {key for key, _ in skeletons[0].named_parameters()}
    assert (
        real
        == [{key for key in names if key.startswith(f"model.layers.{number}.")} for number in range(BLOCKS)] * passes
    )
    assert all(weight.is_meta for weight in skeletons[0].parameters())


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_a_block_that_changes_the_kind_of_its_hidden_states_is_refused(
    change: str, llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = observing.run_block

    def other(*args: Any) -> torch.Tensor:
        made = run(*args)
        return made.double() if change == "dtype" else made[:, :-1]

    monkeypatch.setattr(observing, "run_block", other)
    with pytest.raises(CheckpointError, match=r"A block makes torch\.float") as caught:
        prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    assert_plain(str(caught.value))


def test_weights_outside_the_blocks_are_untouched(llama: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    report = prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    before, after = weights(llama), weights(tmp_path / "out")
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.layers)
