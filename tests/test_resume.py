"""A pruning job that is cut off at any moment goes on with --resume, and gives the bytes of a job that was not."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, build, make_tokenizer
from helpers import assert_plain, edit_config, edit_weights, weights
from transformers import LlamaConfig

from macko_llm import outputs, shards
from macko_llm.errors import CalibrationError, CheckpointError, MackoError, MackoWarning, NonFiniteError, UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import blocks, pipeline, prune_checkpoint
from macko_llm.pruning.journal import JOURNAL_FILE
from macko_llm.recipe import PruneRecipe

BLOCKS = 6
SLOW = {"method": "sparsegpt", "update": "admm", "allocation": "owl"}
# A process as a command runs, which waits a little wherever it reports, so that a kill finds it anywhere.
COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
from macko_llm.cli import console, prune
bars = console.progress_bars
def slowly():
    from contextlib import contextmanager
    @contextmanager
    def wrapped():
        with bars() as report:
            def slow(*words):
                print(*words, file=sys.stderr, flush=True)
                time.sleep(0.01)
                report(*words)
            yield slow
    return wrapped()
prune.progress_bars = slowly
from macko_llm.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of six blocks, and calibration text."""
    folder = tmp_path_factory.mktemp("resume")
    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=64, num_hidden_layers=BLOCKS, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    build(config).to(torch.float16).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(here: Path) -> PruneRecipe:
    return PruneRecipe(calibration=str(here / "text.txt"), nsamples=4, seqlen=24)


def _with(recipe: PruneRecipe, **settings: Any) -> PruneRecipe:
    return PruneRecipe(**{**recipe.__dict__, **settings})


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _partial(target: Path) -> Path:
    return target.parent / f".macko-partial-{target.name}"


def _journal(target: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_partial(target) / JOURNAL_FILE).read_text())
    return content


class _Stop(BaseException):
    """Stands for the end of the process: nobody catches it."""


def _job(here: Path, target: Path, recipe: PruneRecipe, packed: bool = False, **options: Any) -> None:
    job = prune_packed if packed else prune_checkpoint
    job(here / "dense", target, recipe, device="cpu", **options)


def _cut_off(here: Path, target: Path, recipe: PruneRecipe, done: int = 3, **options: Any) -> None:
    """A job that ends when so many blocks are done."""

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", done):
            raise _Stop

    with pytest.raises(_Stop):
        _job(here, target, recipe, progress=progress, **options)
    assert _journal(target)["blocks"] == done


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing is cleaned up, as after a SIGKILL."""

    def kill() -> None:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)

    return kill


# Killed at random


def _command(here: Path, out: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "prune", "dense", "-o", out, "--calibration", "text.txt", "--nsamples", "4",
         "--seqlen", "24", "--device", "cpu", *words],
        cwd=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def expected(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    """Calls `macko prune` of another name in this process, uninterrupted; what it wrote."""
    monkeypatch.chdir(here)  # so that macko.json names the same files

    def run(name: str, packed: bool = False, progress: Progress = no_progress, **settings: Any) -> dict[str, bytes]:
        how = PruneRecipe(calibration="text.txt", nsamples=4, seqlen=24, **settings)
        _job(Path(), Path(name), how, packed, progress=progress)
        return _files(here / name)

    return run


@pytest.mark.parametrize(
    ("words", "packed", "settings", "kills"),
    [
        ([], False, {}, 3),
        (["--pack", "--hidden-states", "disk"], True, {}, 2),
        (["--method", "sparsegpt", "--update", "admm", "--allocation", "owl"], False, SLOW, 2),
    ],
    ids=["dense", "packed", "slow"],
)
def test_a_job_that_is_killed_at_random_moments_ends_with_the_same_bytes(
    words: list[str],
    packed: bool,
    settings: dict[str, Any],
    kills: int,
    here: Path,
    expected: Callable[..., dict[str, bytes]],
) -> None:
    name = "-".join(["killed", *words]).replace("--", "")
    reports: list[str] = []
    whole = expected(f"{name}-whole", packed, progress=lambda what, *_: reports.append(what), **settings)
    draw = random.Random(name)
    for number in range(kills):
        process = _command(here, name, *words, *(["--resume"] if number else []))
        assert process.stderr is not None
        # The seconds that imports take are no moments of the job, so reports are counted first; a job that goes on has fewer.
        for _ in range(draw.randrange(1, len(reports) if number == 0 else len(reports) // 2)):
            process.stderr.readline()
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        if number == 0:
            assert not (here / name).exists()
    if not (here / name).exists():  # in this process, since it has nothing more to survive
        how = PruneRecipe(calibration="text.txt", nsamples=4, seqlen=24, **settings)
        _job(Path(), Path(name), how, packed, resume=True)
    assert _files(here / name) == whole
    assert not _partial(here / name).exists()


# Cut off at every moment there is


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("settings", [{}, SLOW, {"method": "magnitude"}], ids=["wanda", "slow", "magnitude"])
def test_a_job_that_is_cut_off_at_every_report_ends_with_the_same_bytes(
    settings: dict[str, Any], packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe, killed: Callable[[], None]
) -> None:
    """Each process gets one report further than the one before, from where that one was cut off."""
    how, target = _with(recipe, **settings), tmp_path / "out"
    _job(here, tmp_path / "whole", how, packed)
    killed()
    seen: list[tuple[str, int]] = []

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) not in seen and what != "loading the model":
            seen.append((what, number))
            raise _Stop

    while not target.exists():
        before = len(seen)
        try:
            _job(here, target, how, packed, resume=True, progress=progress)
        except _Stop:
            assert len(seen) == before + 1
    assert ("pruning blocks", BLOCKS) in seen
    assert seen[-1] == ("saving", 1)
    assert _files(target) == _files(tmp_path / "whole")


def _dying_at(monkeypatch: pytest.MonkeyPatch, call: int, events: list[str]) -> None:
    """The `call`th step that changes the folder ends the process, before or after it is done."""

    def watch(owner: Any, name: str) -> None:
        step = getattr(owner, name)

        def dying(*args: Any, **options: Any) -> Any:
            events.append(f"before {name}")
            if len(events) >= call:
                raise _Stop
            done = step(*args, **options)
            events.append(f"after {name}")
            if len(events) >= call:
                raise _Stop
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
    how, target = _with(recipe, method="magnitude"), tmp_path / "out"
    events: list[str] = []
    with monkeypatch.context() as patch:
        _dying_at(patch, 10**9, events)
        _job(here, tmp_path / "whole", how, packed)
    whole, steps = _files(tmp_path / "whole"), len(events)
    assert events[-1] == "after _rename"
    assert (len([name for name in whole if name.endswith(".safetensors")]) > 1) == (size != "5GB")
    closing = events.index("before close") - 6
    for call in [*range(1, closing, 47), *range(closing, steps)]:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            _dying_at(patch, call, [])
            with pytest.raises(_Stop):
                _job(here, target, how, packed, resume=True)
        assert not target.exists() or call == steps
        _job(here, target, how, packed, resume=True)
        assert _files(target) == whole, events[:call][-3:]
        assert not _partial(target).exists()
        shutil.rmtree(target)


def test_blocks_that_are_done_are_not_pruned_again(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(here, tmp_path / "out", recipe, 4)
    pruned: list[str] = []
    prune_blocks = blocks.prune_blocks

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for name, zeros in prune_blocks(*args, **options):
            pruned.append(name)
            yield name, zeros

    monkeypatch.setattr("macko_llm.pruning.streamed.prune_blocks", watched)
    _job(here, tmp_path / "out", recipe, resume=True)
    assert pruned == ["model.layers.4", "model.layers.5"]


def test_the_sparsities_that_a_pass_measured_are_not_measured_again(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = _with(recipe, allocation="owl")
    _cut_off(here, tmp_path / "out", how)
    said: list[str] = []
    _job(here, tmp_path / "out", how, resume=True, progress=lambda what, *_: said.append(what))
    assert "measuring blocks" not in said
    assert "pruning blocks" in said


def test_a_model_that_is_replaced_is_resumed_too(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    target = tmp_path / "out"
    _job(here, target, _with(recipe, sparsity=0.25))
    old = _files(target)

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise _Stop

    with pytest.raises(_Stop):
        _job(here, target, recipe, overwrite=True, progress=progress)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == old
    _job(here, target, recipe, overwrite=True, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(target) == _files(tmp_path / "whole")


# Ctrl-C, and what is said


def test_ctrl_c_keeps_the_blocks_and_says_how_to_go_on(here: Path, expected: Callable[..., dict[str, bytes]]) -> None:
    process = _command(here, "interrupted")
    assert process.stderr is not None
    while "pruning blocks 2" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == (
        "macko: Interrupted; the same command with --resume goes on after the blocks that are done, kept in "
        ".macko-partial-interrupted."
    )
    assert "nothing unfinished" not in err
    assert not (here / "interrupted").exists()
    assert _journal(here / "interrupted")["blocks"] >= 2
    again = _command(here, "interrupted", "--resume", "--json")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert json.loads(out)["output"] == "interrupted"
    assert _files(here / "interrupted") == expected("interrupted-whole")


def test_an_interrupt_before_the_first_block_leaves_nothing_and_says_so(here: Path) -> None:
    process = _command(here, "early", "--json")
    assert process.stderr is not None
    while "loading the model 1" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert not _partial(here / "early").exists()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "macko: Interrupted; nothing unfinished was left behind."
    assert json.loads(out) == {"error": "Interrupted; nothing unfinished was left behind."}


# A full disk


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_full_disk_costs_no_finished_block(
    packed: bool, here: Path, expected: Callable[..., dict[str, bytes]]
) -> None:
    name = f"full-{packed}"
    words = ["--pack"] if packed else []
    whole = expected(f"{name}-whole", packed)
    size = len(whole["model.safetensors"])

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, size * 2 // 3))

    limited = subprocess.run(
        [sys.executable, "-c", COMMAND, "prune", "dense", "-o", name, "--calibration", "text.txt", "--nsamples", "4",
         "--seqlen", "24", "--device", "cpu", *words],
        cwd=here, text=True, capture_output=True, timeout=60, check=False, preexec_fn=small_files,
    )  # fmt: skip
    assert limited.returncode == 1
    first, second = limited.stderr.splitlines()[-2:]
    assert_plain(first.removeprefix("macko: "))
    assert "free some space on the disk" in first
    assert second.startswith("macko: The same command with --resume goes on after the blocks that are done, kept in ")
    assert 1 <= _journal(here / name)["blocks"] < BLOCKS
    how = PruneRecipe(calibration="text.txt", nsamples=4, seqlen=24)
    _job(Path(), Path(name), how, packed, resume=True)
    assert _files(here / name) == whole


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
            _job(here, tmp_path / "out", recipe)
    assert_plain(str(caught.value))
    assert _journal(tmp_path / "out")["blocks"] == 2
    _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_very_end_costs_nothing(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_list_files", full)
        with pytest.raises(CheckpointError, match="free some space"):
            _job(here, tmp_path / "out", recipe)
    said: list[tuple[str, int]] = []
    _job(here, tmp_path / "out", recipe, resume=True, progress=lambda what, done, _: said.append((what, done)))
    assert not [what for what, _ in said if what == "pruning blocks"]
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


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
    _cut_off(here, tmp_path / "out", recipe)
    kept = _files(_partial(tmp_path / "out"))
    with pytest.raises(UsageError) as caught:
        _job(here, tmp_path / "out", _with(recipe, **settings), resume=True)
    assert words in str(caught.value)
    assert_plain(str(caught.value))
    assert not hasattr(caught.value, "__notes__"), "the same command does not go on"
    assert _files(_partial(tmp_path / "out")) == kept


def test_lists_and_own_sparsities_are_the_same_settings_when_they_were_read_back(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = _with(recipe, targets=("*_proj",), ignore=("up_proj",), layers=(("q_proj", 0.25), ("down_proj", 0.7)))
    _cut_off(here, tmp_path / "out", how)
    _job(here, tmp_path / "out", how, resume=True)
    _job(here, tmp_path / "whole", how)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


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
    _cut_off(tmp_path, tmp_path / "out", recipe)
    change(tmp_path / "dense")
    with pytest.raises(UsageError, match="was begun with another model; give what it was begun with") as caught:
        _job(tmp_path, tmp_path / "out", recipe, resume=True)
    assert_plain(str(caught.value))


def test_a_model_that_has_been_copied_is_the_same(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    shutil.copytree(here / "dense", tmp_path / "dense")
    _cut_off(tmp_path, tmp_path / "out", recipe)
    shutil.rmtree(tmp_path / "dense")
    shutil.copytree(here / "dense", tmp_path / "dense", copy_function=shutil.copyfile)
    _job(tmp_path, tmp_path / "out", recipe, resume=True)


def test_another_text_in_the_same_file_is_refused(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(recipe.calibration).read_text())
    how = _with(recipe, calibration=str(text))
    _cut_off(here, tmp_path / "out", how)
    text.write_text(" ".join(SENTENCES[::-1] * 4))
    with pytest.raises(UsageError, match="was begun with other calibration tokens"):
        _job(here, tmp_path / "out", how, resume=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_other_kind_of_checkpoint_is_refused(packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    _cut_off(here, tmp_path / "out", recipe, packed=packed)
    kinds = ("packed", "dense") if packed else ("dense", "packed")
    with pytest.raises(UsageError, match="was begun to write a {} checkpoint, not a {} one".format(*kinds)):
        _job(here, tmp_path / "out", recipe, not packed, resume=True)


def test_a_model_that_does_not_stream_is_not_mixed_with_another_job(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(here, tmp_path / "out", recipe)
    monkeypatch.setattr(pipeline, "find_homes", lambda *_: None)
    with pytest.raises(UsageError, match="begun with sparsity"):
        _job(here, tmp_path / "out", _with(recipe, sparsity=0.6), resume=True)
    _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_another_release_of_torch_goes_on_with_a_warning(
    here: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(here, tmp_path / "out", recipe)
    now = torch.__version__
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        with pytest.warns(MackoWarning, match=rf"begun with torch {now.replace('+', '.')} and goes on with 9\.9\.9"):
            _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "whole").keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# Beginning anew, and nothing to go on with


def test_without_resume_the_job_begins_anew(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    _cut_off(here, tmp_path / "out", _with(recipe, sparsity=0.75))
    (_partial(tmp_path / "out") / "leftover").write_text("old")
    seen: list[tuple[str, int]] = []
    _job(here, tmp_path / "out", recipe, progress=lambda what, done, _: seen.append((what, done)))
    assert ("pruning blocks", 0) in seen
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_finished_output_is_refused_as_usual(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    _job(here, tmp_path / "out", recipe)
    with pytest.raises(UsageError, match="is not empty; choose another or add --overwrite"):
        _job(here, tmp_path / "out", recipe, resume=True)


def test_with_nothing_to_resume_the_job_just_runs(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_what_a_job_without_a_journal_left_is_no_part_of_the_result(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    _partial(tmp_path / "out").mkdir()
    (_partial(tmp_path / "out") / "model-00001-of-00003.safetensors").write_bytes(b"of another job")
    _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_what_a_killed_process_could_not_remove_is_no_part_of_the_result(
    here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    _cut_off(here, tmp_path / "out", recipe, BLOCKS)
    for name in (f"{JOURNAL_FILE}.new", "hidden-states.part"):
        (_partial(tmp_path / "out") / name).write_bytes(b"half")
    _job(here, tmp_path / "out", recipe, resume=True)
    _job(here, tmp_path / "whole", recipe)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


# A damaged job


def _edited(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, **changes}


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: value for key, value in content.items() if key != name}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda _: [1, 2],
    "no job": _without("job"),
    "unknown key": _edited(more=1),
    "a job that is none": _edited(job="wanda"),
    "a job without a recipe": lambda content: {**content, "job": _without("recipe")(content["job"])},
    "a recipe that is none": lambda content: {**content, "job": {**content["job"], "recipe": 3}},
    "versions that are none": lambda content: {**content, "job": {**content["job"], "versions": None}},
    "blocks in words": _edited(blocks="three"),
    "blocks below zero": _edited(blocks=-1),
    "more blocks than written": _edited(blocks=BLOCKS),
    "amounts that are none": _edited(amounts=[0.5]),
    "amounts of other layers": _edited(amounts={"lm_head": 0.5}),
    "amounts in words": _edited(amounts={"lm_head": "half"}),
    "zeros that are none": _edited(zeros=[]),
    "zeros of no layer": _edited(zeros={}),
    "zeros in words": _edited(zeros={"model.layers.0.mlp.up_proj": "many"}),
    "seconds in words": _edited(seconds="long"),
    "a sink that is none": _edited(sink=[]),
    "an empty sink": _edited(sink={}),
    "a sink of numbers": _edited(sink={"model.norm.weight": 7}),
    "a sink of other entries": _edited(sink={"model.norm.weight": {"shard": 1}}),
    "a sink of words": _edited(
        sink={"model.norm.weight": {"shard": "1", "dtype": "F16", "shape": [32], "begin": 0, "end": 64}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_journal_is_refused(
    damage: Callable[[dict[str, Any]], Any], here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    _cut_off(here, tmp_path / "out", recipe, 2)
    file = _partial(tmp_path / "out") / JOURNAL_FILE
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    _assert_damaged(here, tmp_path / "out", recipe)


def _assert_damaged(here: Path, target: Path, recipe: PruneRecipe, packed: bool = False) -> None:
    with pytest.raises(MackoError, match="is damaged; drop --resume to begin again") as caught:
        _job(here, target, recipe, packed, resume=True)
    assert_plain(str(caught.value))
    _job(here, target, recipe, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_journal_is_refused(packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    _cut_off(here, tmp_path / "out", recipe, 2, packed=packed)
    file = _partial(tmp_path / "out") / JOURNAL_FILE
    file.write_text(file.read_text()[:-50])
    _assert_damaged(here, tmp_path / "out", recipe, packed)


@pytest.mark.parametrize(
    "change",
    [
        {"packed": {}},
        {"packed": []},
        {"packed": {"layers": {"model.layers.0.mlp.up_proj": {}}, "bytes_dense": 0, "bytes_packed": 0, "rounding": {}}},
        {"shards": []},
        {"packed": {"layers": {}, "bytes_dense": 0, "bytes_packed": 0, "rounding": {}}},
    ],
)
def test_a_damaged_journal_of_a_packed_checkpoint_is_refused(
    change: dict[str, Any], here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    _cut_off(here, tmp_path / "out", recipe, 2, packed=True)
    file = _partial(tmp_path / "out") / JOURNAL_FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "sink": {**content["sink"], **change}}))
    _assert_damaged(here, tmp_path / "out", recipe, packed=True)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_blocks_that_are_no_longer_there_are_not_made_up(
    damage: str, here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = _with(recipe, method="magnitude")  # which reads no block again
    _cut_off(here, tmp_path / "out", how, 2)
    file = _partial(tmp_path / "out") / "shard-00001.part"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    _assert_damaged(here, tmp_path / "out", how)


# Errors that would come again


def test_weights_that_are_not_finite_leave_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    shutil.copytree(here / "dense", tmp_path / "dense")
    name = "model.layers.4.mlp.up_proj.weight"
    broken = weights(tmp_path / "dense")[name]
    broken[0, 0] = torch.inf
    edit_weights(tmp_path / "dense", {name: broken})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.4") as caught:
        _job(tmp_path, tmp_path / "out", recipe)
    assert not hasattr(caught.value, "__notes__")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_text_that_cannot_serve_leaves_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise CalibrationError("No calibration token reached it; use more text.")

    with pytest.raises(CalibrationError):
        _job(here, tmp_path / "out", recipe, progress=progress)
    assert not [*tmp_path.iterdir()]


def test_a_job_that_is_not_resumable_leaves_nothing(here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        _job(here, tmp_path / "out", recipe, progress=progress, resumable=False)
    assert not hasattr(caught.value, "__notes__")
    assert not [*tmp_path.iterdir()]
