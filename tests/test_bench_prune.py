"""`macko bench prune` on the CPU: what it says, that its figures agree with each other, what it leaves behind."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import MAX_POSITIONS, save_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from macko_llm.benchmarks import machine, prune
from macko_llm.benchmarks.prune import Cost, write_random_checkpoint
from macko_llm.benchmarks.shapes import SHAPES, shape_config
from macko_llm.cli.main import app
from macko_llm.progress import no_progress
from macko_llm.stages import Stage

CPU = torch.device("cpu")
FEW = ["--nsamples", "3", "--seqlen", "32"]
DENSE_STAGES = {"drawing", "recording", "reading", "observing", "choosing", "running", "writing", "saving", "other"}
PACK_STAGES = {"reading", "packing", "writing", "saving", "other"}


def macko(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["bench", "prune", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command writes."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    content = json.loads(macko("--config", "tiny", "--random-weights", *FEW, "--folder", folder, "--json").stdout)
    assert isinstance(content, dict)
    return content


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run here: `report` shows them in processes of their own, whose imports take seconds."""
    monkeypatch.setattr(prune, "in_fresh_process", lambda work, *args, progress: work(*args, progress=progress))
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)


# What it says


def test_every_stage_is_there(report: dict[str, Any]) -> None:
    assert set(report["prune"]["stages"]) == DENSE_STAGES
    assert set(report["pack"]["stages"]) == PACK_STAGES
    assert set(get_args(Stage)) == DENSE_STAGES | PACK_STAGES


@pytest.mark.parametrize("job", ["prune", "pack"])
def test_figures_agree_with_each_other(report: dict[str, Any], job: str) -> None:
    cost = report[job]
    assert sum(cost["stages"].values()) == pytest.approx(cost["seconds"], abs=0.05)
    assert all(seconds > 0 for seconds in cost["stages"].values())
    assert cost["process_seconds"] > cost["seconds"]
    assert (cost["peak_gpu_bytes"], cost["peak_gpu_reserved_bytes"]) == (None, None)
    assert cost["peak_host_bytes"] >= cost["host_bytes_before"] > 0
    assert (cost["all_stages"], cost["all_seconds"]) == (None, None)


def test_json_names_the_conditions(report: dict[str, Any], folder: Path) -> None:
    assert report["command"] == (
        "macko bench prune --config tiny --random-weights --method wanda --update none --allocation uniform --sparsity 0.5"
        f" --nsamples 3 --seqlen 32 --hidden-states auto --folder {folder} --device cpu"
    )
    assert (report["model"], report["blocks"], report["blocks_measured"], report["packed"]) == ("tiny", 2, 2, False)
    assert (report["recipe"]["nsamples"], report["recipe"]["seqlen"]) == (3, 32)
    assert report["machine"]["device"] == "cpu"
    parameters = sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_config(shape_config("tiny")).parameters()
    )
    assert report["weight_bytes"] == pytest.approx(2 * parameters, abs=4096)  # a header


def test_nothing_stays(report: dict[str, Any], folder: Path) -> None:
    assert report
    assert not any(folder.iterdir())


@pytest.mark.usefixtures("in_this_process")
def test_pruning_that_packs_is_one_job() -> None:
    arguments = ["--config", "tiny", "--pack", "--update", "admm", "--hidden-states", "host", *FEW]
    content = json.loads(macko(*arguments, "--json").stdout)
    assert set(content["prune"]["stages"]) == set(get_args(Stage))
    assert (content["packed"], content["pack"], content["hidden_states"]) == (True, None, "host")
    assert "--update admm" in content["command"]
    assert content["command"].endswith("--hidden-states host --pack --device cpu")


@pytest.mark.usefixtures("in_this_process")
def test_few_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["tiny"], "num_hidden_layers": 4})
    said = macko("--config", "tiny", "--blocks", "2", *FEW).stdout
    assert "Only 2 of 4 blocks were there; the seconds of all are reckoned from theirs." in said
    assert "prune, all blocks" in said
    assert "pack, all blocks" in said
    for name in (*get_args(Stage), "total", "process", "peak GPU", "peak host", "host before"):
        assert re.search(rf"^ *{name}  ", said, re.MULTILINE), name
    assert "tiny" in said
    assert "3 x 32 random tokens" in said


def test_stages_grow_with_what_they_depend_on() -> None:
    """The reference counts the parameters of both models itself; all but the last block run again."""
    few, many = shape_config("tiny"), shape_config("tiny")
    few.num_hidden_layers, many.num_hidden_layers = 3, 10
    small, large = AutoModelForCausalLM.from_config(few), AutoModelForCausalLM.from_config(many)
    cost = Cost(10, 11, dict.fromkeys(get_args(Stage), 1.0), 5, 6, 7, 8)
    grown = prune._of_all(cost, small, 10)
    weights = large.num_parameters() / small.num_parameters()
    assert grown.all_stages == {
        "drawing": 1, "recording": 1, "other": 1, "observing": 10 / 3, "choosing": 10 / 3, "running": 9 / 2,
        **dict.fromkeys(("reading", "packing", "writing", "saving"), pytest.approx(weights)),
    }  # fmt: skip
    assert grown.all_seconds == pytest.approx(3 + 20 / 3 + 4.5 + 4 * weights)
    assert (grown.seconds, grown.stages) == (cost.seconds, cost.stages)


# What is pruned


@pytest.mark.usefixtures("in_this_process")
def test_a_model_of_ones_own_stays_as_it_is(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", torch.float16)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    content = json.loads(macko(model, *FEW, "--method", "magnitude", "--json").stdout)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    assert content["model"] == str(model)
    assert content["weight_bytes"] == (model / "model.safetensors").stat().st_size
    assert set(content["prune"]["stages"]) == {"reading", "choosing", "writing", "saving", "other"}


@pytest.mark.usefixtures("in_this_process")
def test_random_weights_take_the_shape_of_a_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    (model / "model.safetensors").unlink()  # is not needed
    content = json.loads(macko(model, "--random-weights", "--pack", *FEW, "--json").stdout)
    assert set(content["prune"]["stages"]) == DENSE_STAGES | PACK_STAGES


def test_random_checkpoints_are_what_transformers_loads(tmp_path: Path) -> None:
    write_random_checkpoint(shape_config("tiny"), tmp_path / "dense", CPU, no_progress)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float16
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert model(torch.arange(200)[None]).logits.isfinite().all()


# What it refuses beside what tests/test_light_refusals.py has


def test_a_sequence_is_no_longer_than_the_model_takes(tmp_path: Path, folder: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    result = macko(model, "--seqlen", MAX_POSITIONS + 1, "--folder", folder, exit_code=2)
    assert f"the model takes at most {MAX_POSITIONS} tokens" in result.stderr
    assert not any(folder.iterdir())


def test_what_fails_in_its_process_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    model = save_model(tmp_path / "model", "llama", torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    loaded.save_pretrained(model)
    result = macko(model, *FEW, "--folder", folder, "--json", exit_code=1)
    sentence = "The weights of model.layers.1.mlp.up_proj hold NaN or infinity; use an undamaged checkpoint."
    assert result.stderr.splitlines()[-1] == f"macko: {sentence}"
    assert json.loads(result.stdout) == {"error": sentence}
    assert not any(folder.iterdir())


def test_help_names_every_shape() -> None:
    said = macko("--help").stdout
    assert "macko bench prune --config llama2-7b --random-weights" in said.split("Examples:")[1]
    for name in SHAPES:
        assert name in said
