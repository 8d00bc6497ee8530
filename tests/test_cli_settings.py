"""The settings of `macko prune`: flags, recipes, defaults, and macko.json, which says what was used."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from cli_helpers import calibrated, macko, macko_json, write_models_and_texts
from families import SENTENCES
from helpers import quiet_transformers, weights
from transformers import AutoTokenizer

from macko_llm.calibration import calibration_tokens, tokens_sha256
from macko_llm.cli.main import app
from macko_llm.recipe import PruneRecipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models_and_texts(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


def _planned(*arguments: object) -> dict[str, Any]:
    return macko_json("prune", "dense", "-o", "unused", "--dry-run", *arguments)["recipe"]


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('method = "magnitude"\nsparsity = 0.3\nseed = 7\n')
    defaults = _planned()
    assert (defaults["method"], defaults["sparsity"], defaults["nsamples"]) == ("wanda", 0.5, 128)
    from_file = _planned("--recipe", file)
    assert from_file == {**defaults, "method": "magnitude", "sparsity": 0.3, "seed": 7, "seqlen": None}
    both = _planned("--recipe", file, "--sparsity", 0.6, "--method", "wanda", "--nsamples", 9, "--dtype", "float32")
    assert both == {**defaults, "sparsity": 0.6, "seed": 7, "nsamples": 9, "dtype": "float32"}
    assert _planned("--pattern", "2:4")["sparsity"] == 0.5


FLAGS: dict[str, tuple[list[object], object]] = {
    "method": (["--method", "ria"], "ria"),
    "sparsity": (["--sparsity", 0.25], 0.25),
    "pattern": (["--pattern", "2:4"], "2:4"),
    "update": (["--update", "admm"], "admm"),
    "allocation": (["--allocation", "owl"], "owl"),
    "targets": (["--targets", "up_proj", "--targets", "down_proj"], ["up_proj", "down_proj"]),
    "ignore": (["--ignore", "up_proj"], ["up_proj"]),
    "layers": (
        ["--layers", "down_proj=0.4", "--layers", "re:.*(?=up_proj).* = 0"],
        [["down_proj", 0.4], ["re:.*(?=up_proj).*", 0.0]],
    ),
    "calibration": (["--calibration", "text.txt"], "text.txt"),
    "split": (["--calibration", "dataset", "--split", "test"], "test"),
    "text_column": (["--calibration", "dataset", "--text-column", "body"], "body"),
    "chat_template": (["--calibration", "text.txt", "--chat-template"], True),
    "nsamples": (["--nsamples", 3], 3),
    "seqlen": (["--seqlen", 12], 12),
    "seed": (["--seed", 5], 5),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
}


def test_every_setting_of_a_recipe_is_a_flag_of_that_name(folder: Path) -> None:
    settings = {field.name for field in fields(PruneRecipe)}
    command = typer.main.get_command(app).commands["prune"]  # type: ignore[attr-defined]
    flags = {parameter.opts[0].removeprefix("--").replace("-", "_") for parameter in command.params}
    assert settings <= flags
    assert set(FLAGS) == settings
    template = folder / "dense" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    try:
        for name, (call, value) in FLAGS.items():
            assert getattr(PruneRecipe(), name) != value
            assert _planned(*call)[name] == value, name
    finally:
        template.unlink()


def test_what_was_used_is_what_macko_json_says(tmp_path: Path) -> None:
    """Flags win over the file, a table of layers as a whole."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        'method = "magnitude"\nsparsity = 0.3\nseed = 7\nignore = ["o_proj"]\n[layers]\ndown_proj = 0.8\nup_proj = 0.7\n'
    )
    more = ["--sparsity", 0.6, "--layers", "up_proj=0.4", "--method", "wanda", *calibrated()]
    for name, flags, used, shares in (
        ("by-file", [], {"method": "magnitude", "sparsity": 0.3}, {"down_proj": 0.8, "up_proj": 0.7}),
        ("by-flags", more, {"method": "wanda", "sparsity": 0.6, "nsamples": 4, "seed": 7}, {"up_proj": 0.4}),
    ):
        macko("prune", "dense", "-o", tmp_path / name, "--recipe", file, *flags)
        record = json.loads((tmp_path / name / "macko.json").read_text())["prune"]
        assert {**record, **used, "ignore": ["o_proj"], "layer_sparsities": shares} == record
        layers = {"q_proj": used["sparsity"], "o_proj": 0.0, **shares}
        for weight, tensor in weights(tmp_path / name).items():
            share = next((share for layer, share in layers.items() if weight.endswith(f"{layer}.weight")), None)
            if share is not None:
                assert (tensor == 0).float().mean().item() == pytest.approx(share, abs=0.02), weight


def test_prune_records_the_split_and_the_column_of_a_dataset(tmp_path: Path) -> None:
    call = ["prune", "dense", "-o", tmp_path / "out", "--calibration", "dataset", "--text-column", "body"]
    macko(*call, "--nsamples", 3, "--seqlen", 24)
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert (record["calibration"], record["split"], record["text_column"]) == ("dataset", "train", "body")
    (tmp_path / "recipe.toml").write_text('split = "test"\ntext_column = "body"\ncalibration = "dataset"\n')
    planned = _planned("--recipe", tmp_path / "recipe.toml", "--seqlen", 24)
    assert (planned["split"], planned["text_column"]) == ("test", "body")
    planned = _planned("--recipe", tmp_path / "recipe.toml", "--seqlen", 24, "--split", "train")
    assert (planned["split"], planned["text_column"]) == ("train", "body")


def test_prune_with_a_chat_template(folder: Path, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}] for text in SENTENCES]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    call = ["prune", "dense", "-o", tmp_path / "out", "--nsamples", 3, "--seqlen", 24]
    call += ["--calibration", tmp_path / "chats.jsonl"]
    (tmp_path / "chat.toml").write_text("chat_template = true\n")
    macko(*call, "--recipe", tmp_path / "chat.toml", exit_code=2)  # there is no template yet
    (folder / "dense" / "chat_template.jinja").write_text(template)
    try:
        macko(*call, "--recipe", tmp_path / "chat.toml")
        record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
        assert record["chat_template"] is True
        tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        tokens = calibration_tokens(str(tmp_path / "chats.jsonl"), tokenizer, 3, 24, 0, chat_template=True)
        assert record["calibration_sha256"] == tokens_sha256(tokens)
        again = [*call, "--overwrite", "--recipe", tmp_path / "chat.toml", "--no-chat-template"]
        assert 'has no field "text"' in macko(*again, exit_code=1).stderr
        report = macko_json(*call, "--overwrite", "--chat-template")
        assert report["calibration_sha256"] == tokens_sha256(tokens)
    finally:
        (folder / "dense" / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("down_proj", "'down_proj' gives layers no sparsity; write for example --layers"),
        ("down_proj=much", "'much' is not a sparsity"),
        ("down_proj=1", "outside [0, 1)"),
        ("=0.5", "The name of a layer is empty"),
    ],
)
def test_layers_that_make_no_sense(given: str, words: str) -> None:
    assert words in macko("prune", "dense", "-o", "unused", "--layers", given, exit_code=2).stderr


def test_recipes_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for content, words in (("sparsty = 0.5", "'sparsty', which is not a setting"), ("sparsity =", "is not TOML")):
        file.write_text(content)
        assert words in macko("prune", "dense", "-o", "unused", "--recipe", file, exit_code=2).stderr
    assert "cannot be read" in macko("prune", "dense", "-o", "x", "--recipe", tmp_path, exit_code=2).stderr


def test_a_dry_run_shows_the_sparsity_of_each_layer(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('sparsity = 0.6\n[layers]\n"*.mlp.*" = 0.4\ndown_proj = 0\n')
    table = macko("prune", "dense", "-o", "unused", "--dry-run", "--recipe", recipe).stdout
    for layer, share in (("self_attn.q_proj", "60.0%"), ("mlp.up_proj", "40.0%"), ("mlp.down_proj", "0.0%")):
        assert re.search(rf"layers\.0\.{layer} .* {re.escape(share)}", table)
    spread = macko("prune", "dense", "-o", "unused", "--dry-run", "--recipe", recipe, "--allocation", "owl").stdout
    assert re.search(r"layers\.0\.self_attn\.q_proj .* owl", spread)
    assert re.search(r"layers\.0\.mlp\.up_proj .* 40\.0%", spread)
