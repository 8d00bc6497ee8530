"""What reaches a pipe or a simple terminal: plain tables, no colours. Real processes, as their readers see them."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)")
UNSET = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM", "GITHUB_ACTIONS", "PY_COLORS")
PLAIN = {name: value for name, value in os.environ.items() if name not in UNSET}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    prune_checkpoint(MODEL_FOLDER, folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder / "packed"


def _piped(*arguments: str, **environment: str) -> str:
    call = [sys.executable, "-m", "macko_llm", *arguments]
    return subprocess.run(call, env={**PLAIN, **environment}, capture_output=True, text=True, check=True).stdout


def _at_terminal(*arguments: str, **environment: str) -> str:
    reader, writer = pty.openpty()
    call = [sys.executable, "-m", "macko_llm", *arguments]
    with subprocess.Popen(call, env={**PLAIN, **environment}, stdout=writer, stderr=writer, stdin=writer) as process:
        os.close(writer)
        text = b""
        try:
            while chunk := os.read(reader, 4096):
                text += chunk
        except OSError:  # the other end is closed
            pass
    os.close(reader)
    assert process.returncode == 0
    return text.decode()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "30"},
        {"NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "ascii"},
    ],
    ids=str,
)
def test_a_table_in_a_pipe_is_plain_text_a_line_a_row(environment: dict[str, str], packed: Path) -> None:
    said = _piped("inspect", str(packed), **environment)
    assert said.isascii()
    assert "\x1b" not in said
    lines = said.splitlines()
    assert lines == [line.rstrip() for line in lines if line]
    header, *rows = (re.split(r"  +", line) for line in lines[:-1])
    assert header == ["layer", "shape", "sparsity", "dense", "packed"]
    assert len(rows) == 28
    assert all(len(row) == len(header) for row in rows)
    assert len({len(line) for line in lines[:29]}) == 1  # numbers end together


def test_a_dumb_terminal_and_one_without_colours_get_none(packed: Path) -> None:
    assert "\x1b" not in _at_terminal("inspect", str(packed), TERM="dumb")
    shown = _at_terminal("inspect", str(packed), TERM="xterm-256color", NO_COLOR="1")
    assert "self_attn" in shown
    assert not COLOUR.search(shown)
    assert COLOUR.search(_at_terminal("--help", TERM="xterm-256color"))  # or nothing has been shown here
    call = ["generate", "--help"]
    assert not COLOUR.search(_at_terminal(*call, TERM="xterm-256color", NO_COLOR="1"))
    assert "\x1b" not in _at_terminal(*call, TERM="dumb") + _piped(*call)
