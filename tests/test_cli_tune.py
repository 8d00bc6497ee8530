"""`macko tune` as its user meets it: what it prints, what it refuses, and as a process of its own."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import SENTENCES, VOCABULARY, save_model
from helpers import assert_plain, edit_weights, quiet_transformers, weights
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from macko_llm.cli.main import app
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

UP = "model.layers.1.mlp.up_proj.weight"
SHORT = "--steps 3 --batch-size 2 --seqlen 24 --device cpu"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts under the names that the calls below use."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    for name in ("nan", "truncated", "mute"):
        shutil.copytree(folder / "pruned", folder / name)
    weight = weights(folder / "nan")[UP]
    weight[3, 4] = float("nan")
    edit_weights(folder / "nan", {UP: weight})
    file = folder / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    (folder / "short.txt").write_text("the fox")
    save_file({"tokens": torch.full((2, 16), VOCABULARY)}, folder / "foreign.safetensors")
    save_file({"tokens": torch.ones(2, 1, dtype=torch.int64)}, folder / "single.safetensors")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    yield folder
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def _tune(call: str) -> Result:
    return CliRunner().invoke(app, ["tune", *call.split()])


def test_tune_says_what_it_did(here: Path) -> None:
    result = _tune(f"pruned -o out --dataset text.txt {SHORT}")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Tuned 14 layers, 50.0% of their weights zero as before, in 3 steps and ")
    assert result.stdout.endswith(": out\n")
    before, after = weights(here / "pruned"), weights(here / "out")
    assert all((after[name][weight == 0] == 0).all() for name, weight in before.items())
    assert not torch.equal(before[UP], after[UP])


def test_tune_json_is_one_object(here: Path) -> None:
    result = _tune(f"pruned -o out --dataset text.txt {SHORT} --accumulation 2 --json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    entry = json.loads((here / "out" / "macko.json").read_text())["tune"][0]
    assert content["output"] == "out"
    assert (content["steps"], content["tokens"]) == (3, 3 * 2 * 2 * 24)
    assert content["layers"] == entry["layers"]
    assert (entry["accumulation"], entry["seqlen"], entry["dataset"]) == (2, 24, "text.txt")


@pytest.mark.parametrize(
    ("call", "code", "sentence"),
    [
        ("dense -o out --dataset text.txt", 2, "no zeros to keep; prune it first with `macko prune`"),
        ("packed -o out --dataset text.txt", 2, "packed is packed; unpack it first with `macko unpack`"),
        ("pruned -o pruned --dataset text.txt --overwrite", 2, "pruned holds the input model"),
        ("pruned -o text.txt --dataset text.txt", 2, "text.txt is a file"),
        ("nan -o out --dataset text.txt", 1, "layers.1.mlp.up_proj hold NaN or infinity"),
        ("truncated -o out --dataset text.txt", 1, "download or write the model again"),
        ("mute -o out --dataset text.txt", 1, "mute has no tokenizer"),
        ("pruned -o out --dataset short.txt", 1, "too few for sequences of 24"),
        ("pruned -o out --dataset text.txt --seqlen 65", 2, "the model takes at most 64 tokens"),
        ("pruned -o out --dataset text.txt --text-column story", 2, "text.txt has no columns"),
        ("pruned -o out --dataset text.txt --learning-rate 1e30 --warmup 0", 1, "use a lower learning rate"),
        ("pruned -o out --dataset foreign.safetensors", 1, "the model knows only 320"),
        ("pruned -o out --dataset single.safetensors", 2, "seqlen is 1; use 2 or more"),
        ("pruned -o out --dataset foreign.safetensors --seqlen 8", 2, "leave seqlen out"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(call: str, code: int, sentence: str, here: Path) -> None:
    short = "--steps 3 --batch-size 2 --device cpu" + (
        "" if "seqlen" in call or ".safetensors" in call else " --seqlen 24"
    )
    result = _tune(f"{call} {short} --json")
    assert result.exit_code == code, result.output
    message = json.loads(result.stdout)["error"]
    assert sentence in message
    assert_plain(message)
    assert not (here / "out").exists()


def _start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "macko_llm", "tune", *arguments, "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_of_its_own_tunes_and_says_how_far_it_is(here: Path) -> None:
    process = _start(here, "pruned", "-o", "out", "--dataset", "text.txt", "--steps", "3", "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 3
    assert set(err.splitlines()) >= {"loading the model: 0/1", "drawing tokens: 0/1", "tuning: 0/3", "saving: 0/1"}
    assert all(
        line.split(": ")[0] in ("loading the model", "drawing tokens", "tuning", "saving") for line in err.splitlines()
    )


def test_an_interrupted_process_leaves_nothing(here: Path) -> None:
    process = _start(here, "pruned", "-o", "out", "--dataset", "text.txt", "--steps", "100000", "--batch-size", "1")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tuning"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Interrupted; nothing unfinished was left behind." in err
    # `here` sees that no folder stayed
