"""`macko prune` killed, interrupted or out of space, as a process of its own: --resume gives the bytes of one that was not."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_plain
from resume_helpers import BLOCKS, SLOW, files, journal, partial_folder, run_job, write_model_and_text

from macko_llm.progress import Progress, no_progress
from macko_llm.recipe import PruneRecipe

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
    return write_model_and_text(tmp_path_factory.mktemp("resume"))


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
        run_job(Path(), Path(name), how, packed, progress=progress)
        return files(here / name)

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
        run_job(Path(), Path(name), how, packed, resume=True)
    assert files(here / name) == whole
    assert not partial_folder(here / name).exists()


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
    assert journal(here / "interrupted")["blocks"] >= 2
    again = _command(here, "interrupted", "--resume", "--json")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert json.loads(out)["output"] == "interrupted"
    assert files(here / "interrupted") == expected("interrupted-whole")


def test_an_interrupt_before_the_first_block_leaves_nothing_and_says_so(here: Path) -> None:
    process = _command(here, "early", "--json")
    assert process.stderr is not None
    while "loading the model 1" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert not partial_folder(here / "early").exists()
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
    assert 1 <= journal(here / name)["blocks"] < BLOCKS
    how = PruneRecipe(calibration="text.txt", nsamples=4, seqlen=24)
    run_job(Path(), Path(name), how, packed, resume=True)
    assert files(here / name) == whole
