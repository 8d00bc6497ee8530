"""What a pruning job that was cut off goes on with: the same model, text and settings; all else is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES
from helpers import assert_plain, edit_config, edit_weights, weights
from resume_helpers import (
    BLOCKS,
    cut_off,
    files,
    partial_folder,
    quick_recipe,
    run_job,
    with_settings,
    write_model_and_text,
)

from macko_llm.errors import MackoWarning, UsageError
from macko_llm.pruning import pipeline
from macko_llm.pruning.journal import JOURNAL_FILE
from macko_llm.recipe import PruneRecipe


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def recipe(here: Path) -> PruneRecipe:
    return quick_recipe(here)


# What has changed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 0.6}, "begun with sparsity = 0.5, not 0.6"),
        ({"method": "sparsegpt"}, "begun with method = wanda, not sparsegpt"),
        ({"update": "admm"}, "begun with update = none, not admm"),
        ({"dtype": "bfloat16"}, "begun with dtype = auto, not bfloat16"),
        ({"pattern": "2:4"}, "begun with pattern = unstructured, not 2:4"),
        ({"seed": 1}, "begun with seed = 0, not 1"),
        ({"nsamples": 3}, "begun with nsamples = 4, not 3"),
        ({"ignore": ("up_proj",)}, "begun with ignore = None, not ['up_proj']"),
        ({"layers": (("up_proj", 0.25),)}, "begun with layers = None, not {'up_proj': 0.25}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_setting_is_refused_by_name(
    settings: dict[str, Any], words: str, here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    cut_off(here, tmp_path / "out", recipe)
    kept = files(partial_folder(tmp_path / "out"))
    with pytest.raises(UsageError) as caught:
        run_job(here, tmp_path / "out", with_settings(recipe, **settings), resume=True)
    assert words in str(caught.value)
    assert_plain(str(caught.value))
    assert not hasattr(caught.value, "__notes__"), "the same command does not go on"
    assert files(partial_folder(tmp_path / "out")) == kept


def test_lists_and_own_sparsities_are_the_same_settings_when_they_were_read_back(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = with_settings(recipe, targets=("*_proj",), ignore=("up_proj",), layers=(("q_proj", 0.25), ("down_proj", 0.7)))
    cut_off(here, tmp_path / "out", how)
    run_job(here, tmp_path / "out", how, resume=True)
    run_job(here, tmp_path / "whole", how)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def _other_weights(folder: Path) -> None:
    name = "model.layers.5.mlp.up_proj.weight"
    edit_weights(folder, {name: weights(folder)[name].mul(1.5)})


def _other_norm(folder: Path) -> None:
    edit_weights(folder, {"model.norm.weight": weights(folder)["model.norm.weight"] + 1})


@pytest.mark.parametrize("change", [_other_weights, _other_norm, lambda folder: edit_config(folder, rms_norm_eps=1e-3)])
def test_another_model_is_refused(
    change: Callable[[Path], None], here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    shutil.copytree(here / "dense", tmp_path / "dense")
    cut_off(tmp_path, tmp_path / "out", recipe)
    change(tmp_path / "dense")
    with pytest.raises(UsageError, match="was begun with another model; give what it was begun with") as caught:
        run_job(tmp_path, tmp_path / "out", recipe, resume=True)
    assert_plain(str(caught.value))


def test_a_model_that_has_been_copied_is_the_same(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    shutil.copytree(here / "dense", tmp_path / "dense")
    cut_off(tmp_path, tmp_path / "out", recipe)
    shutil.rmtree(tmp_path / "dense")
    shutil.copytree(here / "dense", tmp_path / "dense", copy_function=shutil.copyfile)
    run_job(tmp_path, tmp_path / "out", recipe, resume=True)


def test_another_text_in_the_same_file_is_refused(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(recipe.calibration).read_text())
    how = with_settings(recipe, calibration=str(text))
    cut_off(here, tmp_path / "out", how)
    text.write_text(" ".join(SENTENCES[::-1] * 4))
    with pytest.raises(UsageError, match="was begun with other calibration tokens"):
        run_job(here, tmp_path / "out", how, resume=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_other_kind_of_checkpoint_is_refused(packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    cut_off(here, tmp_path / "out", recipe, packed=packed)
    kinds = ("packed", "dense") if packed else ("dense", "packed")
    with pytest.raises(UsageError, match="was begun to write a {} checkpoint, not a {} one".format(*kinds)):
        run_job(here, tmp_path / "out", recipe, not packed, resume=True)


def test_a_model_that_does_not_stream_is_not_mixed_with_another_job(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(here, tmp_path / "out", recipe)
    monkeypatch.setattr(pipeline, "find_homes", lambda *_: None)
    with pytest.raises(UsageError, match="begun with sparsity"):
        run_job(here, tmp_path / "out", with_settings(recipe, sparsity=0.6), resume=True)
    run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_release_of_torch_goes_on_with_a_warning(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(here, tmp_path / "out", recipe)
    now = torch.__version__
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        with pytest.warns(MackoWarning, match=rf"begun with torch {now.replace('+', '.')} and goes on with 9\.9\.9"):
            run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "whole").keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# Beginning anew, and nothing to go on with


def test_without_resume_the_job_begins_anew(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    cut_off(here, tmp_path / "out", with_settings(recipe, sparsity=0.75))
    (partial_folder(tmp_path / "out") / "leftover").write_text("old")
    seen: list[tuple[str, int]] = []
    run_job(here, tmp_path / "out", recipe, progress=lambda what, done, _: seen.append((what, done)))
    assert ("pruning blocks", 0) in seen
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_finished_output_is_refused_as_usual(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    run_job(here, tmp_path / "out", recipe)
    with pytest.raises(UsageError, match="is not empty; choose another or add --overwrite"):
        run_job(here, tmp_path / "out", recipe, resume=True)


def test_with_nothing_to_resume_the_job_just_runs(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_a_job_without_a_journal_left_is_no_part_of_the_result(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    partial_folder(tmp_path / "out").mkdir()
    (partial_folder(tmp_path / "out") / "model-00001-of-00003.safetensors").write_bytes(b"of another job")
    run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_a_killed_process_could_not_remove_is_no_part_of_the_result(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    cut_off(here, tmp_path / "out", recipe, BLOCKS)
    for name in (f"{JOURNAL_FILE}.new", "hidden-states.part"):
        (partial_folder(tmp_path / "out") / name).write_bytes(b"half")
    run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
