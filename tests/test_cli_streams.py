"""Commands whose streams are closed, full or not text: real processes, one sentence each, and Python adds nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_plain

from macko_llm.demo.run import MODEL_FOLDER

GENERATE = ["generate", str(MODEL_FOLDER), "--max-new-tokens", "3"]
SPOKEN = [*GENERATE, "--prompt", "Once upon"]
NOT_UTF8 = b"Once \xff upon"
WRONG_CALL, FAILED_JOB = 2, 1


def macko(
    *arguments: str | bytes, redirect: str = "", stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with streams redirected as a shell does it."""
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    return subprocess.run(
        [*shell, sys.executable, "-m", "macko_llm", *arguments],
        input=stdin,
        capture_output=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def sentence(done: subprocess.CompletedProcess[bytes], exit_code: int) -> str:
    """The one line of a command that failed."""
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("macko: ")
    assert_plain(line)
    assert "Unexpected" not in line
    return line


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
COMMANDS = [["--help"], ["--version"], ["doctor"], ["doctor", "--json"], SPOKEN, [*SPOKEN, "--json"]]
NAMES = ["help", "version", "doctor", "doctor --json", "generate", "generate --json"]


@full
@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_full_disk_under_stdout(command: list[str]) -> None:
    assert "No space left on device" in sentence(macko(*command, redirect=">/dev/full"), FAILED_JOB)


@full
def test_a_text_longer_than_any_buffer_for_a_full_disk() -> None:
    prompts = ["--prompt", "Once " * 10] * 50
    done = macko("generate", str(MODEL_FOLDER), *prompts, "-n", "60", "--json", redirect=">/dev/full")
    assert "No space left on device" in sentence(done, FAILED_JOB)


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_closed_stdout(command: list[str]) -> None:
    assert "Standard output is closed" in sentence(macko(*command, redirect=">&-"), WRONG_CALL)


def test_nothing_is_done_where_stdout_is_closed(tmp_path: Path) -> None:
    prune = ["prune", str(MODEL_FOLDER), "-o", str(tmp_path / "out"), "--method", "magnitude"]
    sentence(macko(*prune, redirect=">&-"), WRONG_CALL)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stderr_brings_nothing_to_stdout() -> None:
    for command in (["nonsense"], ["inspect", "nowhere"]):
        done = macko(*command, redirect="2>&-")
        assert done.returncode != 0
        assert done.stdout == b""


@pytest.mark.parametrize(
    ("redirect", "words"),
    [("<&-", "Standard input is closed"), ("0>/dev/null", "Standard input cannot be read (Bad file descriptor)")],
)
def test_a_prompt_from_a_stdin_that_cannot_be_read(redirect: str, words: str) -> None:
    assert words in sentence(macko(*GENERATE, "--prompt", "-", redirect=redirect), WRONG_CALL)


def test_a_closed_stdin_is_no_matter_to_who_does_not_read_it() -> None:
    done = macko(*SPOKEN, redirect="<&-")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_prompt_that_is_not_utf8(tmp_path: Path) -> None:
    """As an argument, in a file, and on stdin, which Python reads strictly or not, as the locale has it."""
    (tmp_path / "prompt.txt").write_bytes(NOT_UTF8)
    calls = [
        macko(*GENERATE, "--prompt", NOT_UTF8),
        macko(*GENERATE, "--prompt-file", str(tmp_path / "prompt.txt")),
        macko(*GENERATE, "--prompt", "-", stdin=NOT_UTF8, PYTHONIOENCODING="utf-8:strict"),
        macko(*GENERATE, "--prompt", "-", stdin=NOT_UTF8, PYTHONIOENCODING="utf-8:surrogateescape"),
    ]
    for done in calls:
        said = sentence(done, WRONG_CALL)
        assert "not utf-8 text; convert it first" in said.lower()
