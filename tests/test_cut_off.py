"""A pruning job that is cut off anywhere goes on and gives the same bytes; of one that would fail again nothing is kept."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_plain, edit_weights, weights
from resume_helpers import (
    BLOCKS,
    SLOW,
    Stop,
    cut_off,
    files,
    journal,
    partial_folder,
    quick_recipe,
    run_job,
    with_settings,
    write_model_and_text,
)

from macko_llm import outputs, shards
from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError
from macko_llm.pruning import blocks
from macko_llm.pruning.journal import JOURNAL_FILE
from macko_llm.recipe import PruneRecipe


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def recipe(here: Path) -> PruneRecipe:
    return quick_recipe(here)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing is cleaned up, as after a SIGKILL."""

    def kill() -> None:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)

    return kill


# Cut off at every moment there is


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("settings", [{}, SLOW, {"method": "magnitude"}], ids=["wanda", "slow", "magnitude"])
def test_a_job_that_is_cut_off_at_every_report_ends_with_the_same_bytes(
    settings: dict[str, Any], packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe, killed: Callable[[], None]
) -> None:
    """Each process gets one report further than the one before, from where that one was cut off."""
    how, target = with_settings(recipe, **settings), tmp_path / "out"
    run_job(here, tmp_path / "whole", how, packed)
    killed()
    seen: list[tuple[str, int]] = []

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) not in seen and what != "loading the model":
            seen.append((what, number))
            raise Stop

    while not target.exists():
        before = len(seen)
        try:
            run_job(here, target, how, packed, resume=True, progress=progress)
        except Stop:
            assert len(seen) == before + 1
    assert ("pruning blocks", BLOCKS) in seen
    assert seen[-1] == ("saving", 1)
    assert files(target) == files(tmp_path / "whole")


def _dying_at(monkeypatch: pytest.MonkeyPatch, call: int, events: list[str]) -> None:
    """The `call`th step that changes the folder ends the process, before or after it is done."""

    def watch(owner: Any, name: str) -> None:
        step = getattr(owner, name)

        def dying(*args: Any, **options: Any) -> Any:
            events.append(f"before {name}")
            if len(events) >= call:
                raise Stop
            done = step(*args, **options)
            events.append(f"after {name}")
            if len(events) >= call:
                raise Stop
            return done

        monkeypatch.setattr(owner, name, dying)

    watch(os, "replace")
    watch(shards.ShardWriter, "add")
    watch(shards.ShardWriter, "_put_in_order")
    watch(shards.ShardWriter, "close")
    watch(Path, "unlink")
    watch(Path, "write_text")
    watch(outputs, "_list_files")
    watch(outputs, "_open_to_readers")
    watch(outputs, "_rename")


@pytest.mark.parametrize(("packed", "size"), [(False, "5GB"), (True, "40KB")], ids=["one shard", "packed shards"])
def test_a_job_that_is_killed_at_any_step_ends_with_the_same_bytes(
    packed: bool, size: str, here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("macko_llm.pruned_packing.MAX_SHARD_SIZE", size)
    monkeypatch.setattr("macko_llm.pruning.sinks.MAX_SHARD_SIZE", size)
    how, target = with_settings(recipe, method="magnitude"), tmp_path / "out"
    events: list[str] = []
    with monkeypatch.context() as patch:
        _dying_at(patch, 10**9, events)
        run_job(here, tmp_path / "whole", how, packed)
    whole, steps = files(tmp_path / "whole"), len(events)
    assert events[-1] == "after _rename"
    assert (len([name for name in whole if name.endswith(".safetensors")]) > 1) == (size != "5GB")
    closing = events.index("before close") - 6
    for call in [*range(1, closing, 47), *range(closing, steps)]:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            _dying_at(patch, call, [])
            with pytest.raises(Stop):
                run_job(here, target, how, packed, resume=True)
        assert not target.exists() or call == steps
        run_job(here, target, how, packed, resume=True)
        assert files(target) == whole, events[:call][-3:]
        assert not partial_folder(target).exists()
        shutil.rmtree(target)


def test_blocks_that_are_done_are_not_pruned_again(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(here, tmp_path / "out", recipe, 4)
    pruned: list[str] = []
    prune_blocks = blocks.prune_blocks

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for name, zeros in prune_blocks(*args, **options):
            pruned.append(name)
            yield name, zeros

    monkeypatch.setattr("macko_llm.pruning.streamed.prune_blocks", watched)
    run_job(here, tmp_path / "out", recipe, resume=True)
    assert pruned == ["model.layers.4", "model.layers.5"]


def test_the_sparsities_that_a_pass_measured_are_not_measured_again(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = with_settings(recipe, allocation="owl")
    cut_off(here, tmp_path / "out", how)
    said: list[str] = []
    run_job(here, tmp_path / "out", how, resume=True, progress=lambda what, *_: said.append(what))
    assert "measuring blocks" not in said
    assert "pruning blocks" in said


def test_a_model_that_is_replaced_is_resumed_too(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    target = tmp_path / "out"
    run_job(here, target, with_settings(recipe, sparsity=0.25))
    old = files(target)

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise Stop

    with pytest.raises(Stop):
        run_job(here, target, recipe, overwrite=True, progress=progress)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == old
    run_job(here, target, recipe, overwrite=True, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(target) == files(tmp_path / "whole")


# A full disk


def test_a_disk_that_is_full_for_the_journal_leaves_the_one_before(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_text, []

    def full(self: Path, text: str, **options: Any) -> int:
        if self.name.startswith(JOURNAL_FILE):
            calls.append(self)
            if len(calls) == 3:
                write(self, text[:40], **options)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match="free some space") as caught:
            run_job(here, tmp_path / "out", recipe)
    assert_plain(str(caught.value))
    assert journal(tmp_path / "out")["blocks"] == 2
    run_job(here, tmp_path / "out", recipe, resume=True)
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_very_end_costs_nothing(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_list_files", full)
        with pytest.raises(CheckpointError, match="free some space"):
            run_job(here, tmp_path / "out", recipe)
    said: list[tuple[str, int]] = []
    run_job(here, tmp_path / "out", recipe, resume=True, progress=lambda what, done, _: said.append((what, done)))
    assert not [what for what, _ in said if what == "pruning blocks"]
    run_job(here, tmp_path / "whole", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# Errors that would come again


def test_weights_that_are_not_finite_leave_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    shutil.copytree(here / "dense", tmp_path / "dense")
    name = "model.layers.4.mlp.up_proj.weight"
    broken = weights(tmp_path / "dense")[name]
    broken[0, 0] = torch.inf
    edit_weights(tmp_path / "dense", {name: broken})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.4") as caught:
        run_job(tmp_path, tmp_path / "out", recipe)
    assert not hasattr(caught.value, "__notes__")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_text_that_cannot_serve_leaves_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise CalibrationError("No calibration token reached it; use more text.")

    with pytest.raises(CalibrationError):
        run_job(here, tmp_path / "out", recipe, progress=progress)
    assert not [*tmp_path.iterdir()]


def test_a_job_that_is_not_resumable_leaves_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run_job(here, tmp_path / "out", recipe, progress=progress, resumable=False)
    assert not hasattr(caught.value, "__notes__")
    assert not [*tmp_path.iterdir()]
