"""What all commands share: help, a home folder, errors in one sentence, JSON, sizes."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from cli_helpers import macko, write_models_and_texts
from helpers import assert_plain, quiet_transformers
from typer.testing import CliRunner

from macko_llm.cli.console import megabytes, plain_errors, print_json
from macko_llm.cli.main import app
from macko_llm.errors import CalibrationError, UsageError

COMMANDS = [
    "prune",
    "pack",
    "unpack",
    "generate",
    "chat",
    "eval",
    "eval-perplexity",
    "compare",
    "inspect",
    "doctor",
    "demo",
    "bench quality",
    "bench spmv",
    "bench prune",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models_and_texts(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


@pytest.mark.parametrize("command", ["", "bench", *COMMANDS])
def test_h_is_help(command: str) -> None:
    assert macko(*command.split(), "-h").stdout == macko(*command.split(), "--help").stdout != ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    text = macko(*command.split(), "--help").stdout
    assert "Examples:" in text
    assert f"macko {command}" in text.split("Examples:")[1]


def test_help_lists_every_command() -> None:
    for call in ([], ["--help"]):
        text = macko(*call).stdout
        assert all(re.search(rf"\b{command.split()[0]}\b", text) for command in COMMANDS)
    assert "quality" in macko("bench", "--help").stdout


@pytest.mark.parametrize("form", [["--output=~/out"], ["-o", "~/out"], ["-o~/out"]], ids=str)
def test_a_tilde_is_the_home_folder(
    form: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell replaces it only where a word begins with it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "packed", tmp_path / "packed")
    macko("unpack", "~/packed", *form)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_anything_unexpected_is_one_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[BaseException, int, str]] = [
        (UsageError("A wrong call; mend it."), 2, "A wrong call; mend it."),
        (CalibrationError("A failed job; mend it."), 1, "A failed job; mend it."),
        (ModuleNotFoundError("No module", name="rich.console"), 1, "The package rich is missing; install it"),
        (ImportError("needs einops"), 1, "Unexpected ImportError: needs einops; set MACKO_DEBUG=1"),
        (RuntimeError("first\nsecond"), 1, "Unexpected RuntimeError: first; set MACKO_DEBUG=1"),
        (ValueError(), 1, "Unexpected ValueError; set MACKO_DEBUG=1"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ]
    for error, code, words in cases:

        @plain_errors
        def command(error: BaseException = error) -> None:
            raise error

        with pytest.raises(typer.Exit) as caught:
            command()
        assert caught.value.exit_code == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"macko: {words}")
        assert_plain(err.removesuffix("\n"))


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACKO_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["prune", "dense", "-o", "x", "--sparsity", "2"]).exception, UsageError)
    monkeypatch.setenv("MACKO_DEBUG", "0")
    assert "outside [0, 1)" in macko("prune", "dense", "-o", "x", "--sparsity", 2, exit_code=2).stderr


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"perplexity": float("inf"), "layers": {"one": float("nan")}, "text": "é"})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "layers": {"one": None}, "text": "é"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (7 * 10**9, "7.00 GB")]
)
def test_megabytes(count: int, text: str) -> None:
    assert megabytes(count) == text
