"""The `macko` command as a process of its own: the main chain, signals, pipes, and what only a new process shows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import SENTENCES, save_model
from helpers import assert_plain, weights

import macko_llm
from macko_llm import generation
from macko_llm.models import load_tokenizer
from macko_llm.text import encode_prompt

COMMAND = [sys.executable, "-m", "macko_llm"]
TIMEOUT = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    return folder


def _start(
    folder: Path,
    *arguments: str,
    command: list[str] = COMMAND,
    ignored: signal.Signals | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    def set_signals() -> None:  # whatever those of the tests are: a shell that runs them in the background ignores some
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    settings = {
        name: value for name, value in os.environ.items() if not name.startswith(("TQDM", "HF_", "TRANSFORMERS"))
    }
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**settings, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=set_signals,
    )


def _wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    """Read a process's messages until one begins so."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"it ended without a line that begins with {beginning!r}")


def _finish(process: subprocess.Popen[str], exit_code: int = 0, stdin: str | None = None) -> tuple[str, str]:
    out, err = process.communicate(stdin, timeout=TIMEOUT)
    assert process.returncode == exit_code, err
    return out, err


def test_the_main_chain(folder: Path) -> None:
    calibration = ["--calibration", "text.txt", "--nsamples", "4", "--seqlen", "24"]
    out, err = _finish(_start(folder, "prune", "dense", "-o", "pruned", *calibration, "--json"))
    assert json.loads(out)["sparsity"] == 0.5
    assert set(err.splitlines()) >= {"drawing calibration tokens: 0/1", "pruning blocks: 0/2", "saving: 0/1"}
    out, err = _finish(_start(folder, "pack", "pruned", "-o", "packed", "--json"))
    assert json.loads(out)["kept_dense"] == []
    assert err.splitlines()[0].startswith("packing: 0/")

    # These only read the packed model.
    inspect = _start(folder, "inspect", "packed", "--json")
    perplexity = _start(folder, "eval-perplexity", "packed", "--dataset", "text.txt", "--limit", "2", "--json")
    unpack = _start(folder, "unpack", "packed", "-o", "unpacked")
    call = ["--prompt", "-", "--max-new-tokens", "50", "--dtype", "float32"]
    generate = _start(folder, "generate", "packed", *call)
    assert generate.stdin is not None
    assert generate.stdout is not None
    generate.stdin.write("Once upon a time\n")
    generate.stdin.close()
    chunks = []
    while chunk := os.read(generate.stdout.fileno(), 1 << 16):
        chunks.append(chunk)
    assert len(chunks) > 3, "the text streams"
    model, tokenizer = macko_llm.load(folder / "pruned", dtype="float32"), load_tokenizer(folder / "pruned")
    made = generation.generate(model, tokenizer, encode_prompt(tokenizer, "Once upon a time"), max_new_tokens=50)
    assert b"".join(chunks).decode() == made.text + "\n"
    assert generate.stderr is not None
    summary = generate.stderr.read()
    assert summary.startswith(f"prompt: {made.prompt_tokens} tokens, ")
    assert len(summary.splitlines()) == 1
    assert generate.wait(TIMEOUT) == 0
    assert json.loads(_finish(inspect)[0])["valid"] is True
    assert json.loads(_finish(perplexity)[0])["windows"] == 2
    _finish(unpack)
    pruned, unpacked = weights(folder / "pruned"), weights(folder / "unpacked")
    assert pruned.keys() == unpacked.keys()
    assert all(torch.equal(tensor, unpacked[name]) for name, tensor in pruned.items())


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("name", SIGNALS)
def test_an_interrupted_prune_leaves_nothing(name: str, folder: Path) -> None:
    long_work = ["--calibration", "text.txt", "--nsamples", "4000", "--seqlen", "32"]
    process = _start(folder, "prune", "dense", "-o", "interrupted", *long_work)
    _wait_for(process, "pruning blocks")
    assert any(path.name.endswith("-interrupted") for path in folder.iterdir())
    process.send_signal(getattr(signal, name))
    out, err = _finish(process, exit_code=SIGNALS[name])
    assert out == ""
    assert err.splitlines()[-1].startswith("macko: Interrupted; ")
    assert not any("interrupted" in path.name for path in folder.iterdir())


def test_a_hangup_that_is_ignored_stays_ignored(folder: Path) -> None:
    work = ["--calibration", "text.txt", "--nsamples", "200", "--seqlen", "32"]
    process = _start(folder, "prune", "dense", "-o", "hung-up", *work, ignored=signal.SIGHUP)
    _wait_for(process, "pruning blocks")
    process.send_signal(signal.SIGHUP)
    _finish(process)
    assert (folder / "hung-up" / "config.json").is_file()


def test_an_interrupted_demo_leaves_nothing_unfinished(folder: Path) -> None:
    process = _start(folder, "demo", "-o", "demo")
    _wait_for(process, "pruning blocks")
    process.send_signal(signal.SIGINT)
    _, err = _finish(process, exit_code=130)
    assert err.splitlines()[-1].startswith("macko: Interrupted; ")
    assert not [path for path in (folder / "demo").rglob("*") if "partial" in path.name]
    assert all((path / "config.json").is_file() for path in (folder / "demo").iterdir() if path.is_dir())


def test_a_missing_package(folder: Path) -> None:
    """A package that cannot be imported, as where it is not installed."""
    without = "import sys; sys.modules['datasets'] = None; from macko_llm.cli.main import main; main()"
    process = _start(folder, "prune", "dense", "-o", "out", command=[sys.executable, "-c", without])
    out, err = _finish(process, exit_code=1)
    sentence = err.splitlines()[-1]
    assert out == ""
    assert sentence.startswith("macko: The package datasets, ")
    assert "pip install datasets" in sentence
    assert_plain(sentence)
    assert not (folder / "out").exists()


def test_a_missing_native_library(folder: Path) -> None:
    if any((Path(path) / "lib").exists() and (Path(path) / "cli").exists() for path in macko_llm.__path__):
        pytest.skip("the native library lies beside the Python files, so one cannot be hidden without the other")
    without = (
        "import macko_llm, pathlib\n"
        "macko_llm.__path__[:] = [path for path in macko_llm.__path__ if not pathlib.Path(path, 'lib').exists()]\n"
        "from macko_llm.cli.main import main\n"
        "main()"
    )
    out, _ = _finish(_start(folder, "doctor", command=[sys.executable, "-c", without]))
    assert "native library  missing" in out
    assert "! The native library is missing; build it" in out


def test_the_traceback_only_for_who_asks(folder: Path) -> None:
    call = ["prune", "dense", "-o", "out", "--sparsity", "2"]
    _, err = _finish(_start(folder, *call), exit_code=2)
    assert err.startswith("macko: The sparsity 2.0 is outside [0, 1);")
    assert len(err.splitlines()) == 1
    _, err = _finish(_start(folder, *call, MACKO_DEBUG="1"), exit_code=1)
    assert err.startswith("Traceback (most recent call last)")
    assert "UsageError: The sparsity 2.0 is outside" in err


def test_a_reader_that_goes_away_is_no_error_to_speak_of(folder: Path) -> None:
    process = _start(folder, "doctor", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT) == 1
