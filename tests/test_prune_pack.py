"""`macko prune --pack` writes what `macko prune` and then `macko pack` write."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, build, make_tokenizer, save_model
from helpers import assert_plain, edit_config, quiet_transformers, weights
from safetensors.torch import save_file
from transformers import LlamaConfig
from typer.testing import CliRunner

import macko_llm
from macko_llm import inspecting, pruned_packing
from macko_llm.cli.main import app
from macko_llm.errors import NonFiniteError, UsageError
from macko_llm.packing import pack_checkpoint
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import prune_checkpoint, sinks
from macko_llm.recipe import PruneRecipe

RECIPE = {"nsamples": 4, "seqlen": 24, "sparsity": 0.6}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in each dtype, under its name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("float16", "bfloat16", "float32"):
        save_model(folder / name, "llama", getattr(torch, name))
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _both(source: Path, folder: Path, recipe: PruneRecipe, **pack: Any) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of `prune --pack`, and those of the two commands; the reports are alike, too."""
    pruned, packed = prune_packed(source, folder / "at-once", recipe, device="cpu")
    before = prune_checkpoint(source, folder / "pruned", recipe, device="cpu")
    after = pack_checkpoint(folder / "pruned", folder / "in-two", device="cpu", **pack)
    assert replace(pruned, seconds=0.0) == replace(before, seconds=0.0)
    assert replace(packed, seconds=0.0) == replace(after, seconds=0.0)
    return _files(folder / "at-once"), _files(folder / "in-two")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"method": "sparsegpt", "update": "admm", "allocation": "owl"}])
def test_a_model_of_16_bits_is_packed_as_the_two_commands_pack_it(
    name: str, settings: dict[str, Any], llamas: Path, tmp_path: Path, text: str
) -> None:
    at_once, in_two = _both(llamas / name, tmp_path, PruneRecipe(calibration=text, **RECIPE, **settings))
    record = json.loads(at_once["macko.json"])
    # "auto" is the dtype that is packed, and the record names it; so does the recipe on the card.
    assert (record["prune"].pop("dtype"), record["pack"]["value_dtype"]) == (name, name)
    other = json.loads(in_two["macko.json"])
    assert other["prune"].pop("dtype") == "auto"
    assert record == other
    card = in_two["README.md"].replace(b'dtype = "auto"', f'dtype = "{name}"'.encode())
    assert {**at_once, "macko.json": b""} == {**in_two, "macko.json": b"", "README.md": card}


@pytest.mark.parametrize(("dtype", "config"), [("auto", {}), ("auto", {"dtype": "bfloat16"}), ("bfloat16", {})])
def test_a_model_of_32_bits_is_pruned_in_the_dtype_that_is_packed(
    dtype: str, config: dict[str, str], llamas: Path, tmp_path: Path, text: str
) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for name, content in _files(llamas / "float32").items():
        (source / name).write_bytes(content)
    edit_config(source, **config)
    packed_in = config.get("dtype", "float16") if dtype == "auto" else dtype
    report = prune_packed(source, tmp_path / "at-once", PruneRecipe(calibration=text, dtype=dtype, **RECIPE))[1]
    prune_checkpoint(source, tmp_path / "pruned", PruneRecipe(calibration=text, dtype=packed_in, **RECIPE))
    pack_checkpoint(tmp_path / "pruned", tmp_path / "in-two")
    assert report.value_dtype == packed_in
    assert _files(tmp_path / "at-once") == _files(tmp_path / "in-two")
    assert json.loads((tmp_path / "at-once" / "macko.json").read_text()).keys() >= {"prune", "pack", "files"}


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "opt", "phi3"])
def test_other_families(family: str, tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", family, torch.bfloat16)
    at_once, in_two = _both(source, tmp_path, PruneRecipe(calibration=text, dtype="bfloat16", **RECIPE))
    assert at_once == in_two


@pytest.mark.parametrize("tied", [False, True])
def test_several_shards(tied: bool, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks, which names alone would put into another order."""
    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=64, num_hidden_layers=12, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    build(config).to(torch.float16).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(pruned_packing, "MAX_SHARD_SIZE", "30KB")
    monkeypatch.setattr(sinks, "MAX_SHARD_SIZE", "50KB")
    recipe = PruneRecipe(calibration=text, dtype="float16", **RECIPE)
    at_once, in_two = _both(tmp_path / "dense", tmp_path, recipe, max_shard_size="30KB")
    assert sum(name.endswith(".safetensors") for name in at_once) > 4
    assert at_once == in_two


def test_layers_that_packing_would_make_larger_stay_dense(llamas: Path, tmp_path: Path, text: str) -> None:
    recipe = PruneRecipe(calibration=text, dtype="float16", ignore=("up_proj", "k_proj"), **RECIPE)
    at_once, in_two = _both(llamas / "float16", tmp_path, recipe)
    assert at_once == in_two
    tensors = weights(tmp_path / "at-once")
    dense = [name for name in tensors if name.endswith("proj.weight")]
    assert sorted({name.split(".")[-2] for name in dense}) == ["k_proj", "up_proj"]
    assert not any(name.endswith("q_proj.weight") for name in tensors)


def test_values_of_32_bits_are_refused(llamas: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="float32 cannot be packed; use float16 or bfloat16") as caught:
        prune_packed(llamas / "float32", tmp_path / "out", PruneRecipe(calibration=text, dtype="float32"))
    assert_plain(str(caught.value))
    assert not [*tmp_path.iterdir()]


def test_weights_that_overflow_leave_nothing(llamas: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for name, content in _files(llamas / "float32").items():
        (source / name).write_bytes(content)
    tensors = weights(source)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        prune_packed(source, tmp_path / "out", PruneRecipe(method="magnitude"), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def _macko(*words: object) -> str:
    with quiet_transformers():
        result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_packs_and_the_other_commands_take_the_result(llamas: Path, tmp_path: Path, text: str) -> None:
    call = ("prune", llamas / "float16", "--calibration", text, "--nsamples", 4, "--seqlen", 24, "--sparsity", 0.6)
    out = tmp_path / "out"
    said = _macko(*call, "-o", out, "--pack")
    sizes = inspecting.inspect_checkpoint(out)
    assert said.startswith(f"Pruned 14 layers to {sizes.sparsity:.1%}")
    assert (
        f" sparsity with wanda, packed {sizes.bytes_dense / 1e3:.2f} kB into {sizes.bytes_packed / 1e3:.2f} kB, in "
        in said
    )
    assert said.endswith(f" s: {out}\n")
    shown = json.loads(_macko(*call, "-o", tmp_path / "json", "--pack", "--json"))
    assert (shown["output"], shown["sparsity"]) == (str(tmp_path / "json"), pytest.approx(0.6, abs=0.01))
    assert (shown["pack"]["value_dtype"], shown["pack"]["bytes_packed"]) == ("float16", sizes.bytes_packed)
    assert set(shown["pack"]["layers"]) == set(shown["layers"])
    plain = json.loads(_macko(*call, "-o", tmp_path / "plain", "--json"))
    assert "pack" not in plain
    assert _files(out) == _files(tmp_path / "json")

    report = json.loads(_macko("inspect", out, "--json"))
    assert report["valid"] is True
    assert report["layers"].keys() == asdict(sizes)["layers"].keys()
    text_of = [
        _macko("generate", folder, "--prompt", "the fox", "--max-new-tokens", 5, "--device", "cpu")
        for folder in (out, tmp_path / "plain")
    ]
    assert text_of[0] == text_of[1]
    macko_llm.load(out, device="cpu")
