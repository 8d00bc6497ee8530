"""What a user sees: help, tables on narrow terminals, errors as JSON, completion."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from macko_llm.benchmarks import machine
from macko_llm.cli import bench_decode, bench_spmv
from macko_llm.cli.console import print_table
from macko_llm.cli.main import app

COMMANDS = [
    *(
        [name]
        for name in (
            "prune",
            "tune",
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
            "bench",
        )
    ),
    ["bench", "quality"],
    ["bench", "spmv"],
    ["bench", "decode"],
    ["bench", "prune"],
    [],
]


def _help(command: list[str]) -> list[str]:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_every_command_is_looked_at() -> None:
    group = typer.main.get_command(app)
    named = {command[0] for command in COMMANDS if len(command) == 1}
    assert named == set(group.commands)  # type: ignore[attr-defined]
    assert {command[1] for command in COMMANDS if len(command) == 2} == set(group.commands["bench"].commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_and_speaks_of_no_types(command: list[str]) -> None:
    lines = _help(command)
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for kind in ("<bool>", "<str>", "<int>", "<float>", "<list", "<path>"):
        assert kind not in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_stand_line_by_line(command: list[str]) -> None:
    lines = [line.strip() for line in _help(command)]
    block = lines[lines.index("Examples:") + 1 :]
    examples = [line for line in block[: next(i for i, line in enumerate(block) if line.startswith("╭"))] if line]
    assert examples[0].startswith("macko ")
    for line in examples:
        assert "macko" not in line.removeprefix("macko")[1:] or "| macko" in line or "macko-" in line, line


def test_help_says_what_cpus_and_benchmarks_are_about() -> None:
    text = " ".join(" ".join(_help([])).replace("│", " ").split())
    assert "faster and smaller than dense, on NVIDIA GPUs and on CPUs with AVX2 or AVX-512" in text
    assert "Measure: sizes and perplexities, whole models" in text


# Tables


@contextmanager
def _terminal(columns: int) -> Iterator[Callable[[], str]]:
    """Stdout as a terminal of that width; what has been printed comes from the function."""
    reader, writer = pty.openpty()
    before, width = sys.stdout, os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    sys.stdout = os.fdopen(writer, "w")

    def printed() -> str:
        sys.stdout.flush()
        text = b""
        while select.select([reader], [], [], 0.2)[0]:
            text += os.read(reader, 4096)
        return text.decode()

    try:
        yield printed
    finally:
        sys.stdout.close()
        sys.stdout = before
        os.close(reader)
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width


def _plain(text: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in text.splitlines()]


LAYER = ["model.layers.31.mlp.gate_proj", "11008 x 4096", "50.0%", "90.18 MB", "56.64 MB"]
DECODED = [
    "macko, packed",
    "50.0%",
    "309.0",
    "309.0",
    "1.93x",
    "3.236",
    "3.092",
    "0.078",
    "0.067",
    "8.55 GB",
    "59 ms",
    "fused",
]
PRODUCT = [
    "22016 x 4096",
    "50.0%",
    "1",
    "tiled",
    "101.23",
    "1234.56",
    "37.82",
    "2890",
    "93%",
    "1.47x",
    "1.1e-03",
    "1.1e-03",
]


@pytest.mark.parametrize(
    ("columns", "row", "names"),
    [
        (["layer", "shape", "sparsity", "dense", "packed"], LAYER, 1),
        (
            ["layer", "shape"],
            ["model.language_model.layers.31.self_attn.compressed_query_projection.weight", "1 x 1"],
            1,
        ),
        (bench_decode.COLUMNS, DECODED, 2),
        (bench_spmv.COLUMNS, [*PRODUCT, "180.36 MB", "109.25 MB"], 4),
    ],
)
def test_tables_fit_a_terminal_and_lose_nothing(columns: list[str], row: list[str], names: int) -> None:
    with _terminal(80) as printed:
        print_table("A title", columns, [row, row], names=names)
        lines = _plain(printed())
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "\u2026" not in text
    for cell in [*columns[1:], *row[1:]]:
        assert cell in text
    assert row[0] in text or row[0] in "".join(line.strip().split(" ")[0] for line in lines)


def test_a_table_for_a_program_is_one_however_wide(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", [f"column {number}" for number in range(30)], [[f"value {number}" for number in range(30)]])
    printed = capsys.readouterr().out
    assert sum("column" in line for line in printed.splitlines()) == 1
    assert all(f"value {number}" in printed for number in range(30))


# JSON and completion


@pytest.mark.parametrize(
    ("call", "exit_code"),
    [
        ("generate nowhere --prompt Hi --json", 1),
        ("prune nowhere -o out --sparsity 2 --json", 2),
        ("inspect --json", 2),
        ("bench spmv --no-such-option --json", 2),
    ],
)
def test_an_error_is_json_too_where_json_is_wanted(call: str, exit_code: int) -> None:
    result = CliRunner().invoke(app, call.split())
    assert result.exit_code == exit_code
    content = json.loads(result.stdout)
    assert content.keys() == {"error"}
    assert result.stderr == f"macko: {content['error']}\n"


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("macko generate x --dtype ", ["auto", "float16", "bfloat16", "float32"]),
        ("macko generate x --dtype b", ["bfloat16"]),
        ("macko prune x --method ", ["wanda", "magnitude", "ria", "sparsegpt"]),
        ("macko prune x --update ", ["none", "admm"]),
        ("macko prune x --allocation ", ["uniform", "owl"]),
        ("macko tune x --dtype b", ["bfloat16"]),
        ("macko pack x --dtype f", ["float16"]),
        ("macko inspect x --re", ["--revision"]),
        ("macko prune x --pattern ", ["unstructured", "2:4", "4:8"]),
        ("macko chat x --layout ", ["auto", "sliced", "tiled"]),
        ("macko compare x --device c", ["cpu", "cuda"]),
        ("macko bench decode --config llama2", ["llama2-7b", "llama2-70b"]),
        ("macko bench spmv --dtype ", ["float16", "bfloat16"]),
        ("macko c", ["chat", "compare"]),
        ("macko bench ", ["quality", "spmv", "decode"]),
    ],
)
def test_shells_complete_values(words: str, completions: list[str]) -> None:
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    environment = {"_MACKO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    said = CliRunner().invoke(app, [], prog_name="macko", env=environment)
    assert set(completions) <= set(said.stdout.split()), said.output
    assert all(word.startswith(words.split(" ")[-1]) for word in said.stdout.split())


def test_installed_completion_completes_in_a_shell(tmp_path: Path) -> None:
    """What --install-completion writes for bash, sourced by a bash that knows nothing else of macko."""
    program = tmp_path / "bin" / "macko"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom macko_llm.cli.main import main\nmain()\n")
    program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    script = """macko --install-completion >/dev/null || exit 1
. ~/.bash_completions/macko.sh
COMP_WORDS=(macko generate x --dtype b)
COMP_CWORD=4
$(complete -p macko | sed 's/.*-F \\([^ ]*\\).*/\\1/') macko
echo "${COMPREPLY[@]}"
"""
    call = ["bash", "--norc", "-c", script]
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    said = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["bfloat16"], said


def test_options_are_called_what_they_are_called() -> None:
    """Some releases of typer take a metavar that equals the option's name for the name."""

    def names(command: object) -> Iterator[str]:
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.param_type_name == "option":
                yield from parameter.opts
        for inner in getattr(command, "commands", {}).values():
            yield from names(inner)

    found = set(names(typer.main.get_command(app)))
    assert {"--device", "--dtype", "--token", "--json", "-o"} <= found
    assert not [name for name in found if name != name.lower()]


def test_figures_of_a_cpu_are_not_shown_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)
    call = ["bench", "spmv", "--device", "cpu", "--shape", "64x64", "--sparsity", "0.5", "--threads", "1"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("On a CPU packed layers are faster than dense ones where") == 1
