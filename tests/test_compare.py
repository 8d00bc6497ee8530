"""`macko compare`: its figures against what other commands and the files say, its table, its plot."""

import errno
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MAX_POSITIONS, SENTENCES, save_model
from generation_helpers import byte_level
from helpers import quiet_transformers
from typer.testing import CliRunner, Result

from macko_llm.benchmarks import plots
from macko_llm.benchmarks.compare import METRICS, Compared, CompareReport
from macko_llm.cli.compare import print_comparison
from macko_llm.cli.console import bar
from macko_llm.cli.main import app
from macko_llm.loading import load
from macko_llm.models import load_tokenizer
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

CALL = ["--dataset", "text.txt", "--limit", "2", "--new-tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


def macko(*arguments: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result


def test_the_figures_are_those_of_the_files_and_of_eval_perplexity(folder: Path) -> None:
    report = json.loads(macko("compare", "dense", "packed", *CALL, "--json").stdout)
    assert (report["seqlen"], report["stride"]) == (MAX_POSITIONS, MAX_POSITIONS)
    assert report["same_tokens"] is True
    dense, packed = report["models"]
    for one in (dense, packed):
        alone = macko("eval-perplexity", one["model"], *CALL[:4], "--device", "cpu", "--json").stdout
        assert one["perplexity"] == json.loads(alone)["perplexity"]
        assert one["bytes_on_disk"] == (folder / one["model"] / "model.safetensors").stat().st_size
        model = load(folder / one["model"], device="cpu")
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        assert one["bytes_in_memory"] == sum(held.values())
        assert one["tokens_per_second"] > 0
        assert one["ratios"] == {name: pytest.approx(one[name] / dense[name]) for name in METRICS}
    assert (dense["packed"], packed["packed"]) == (False, True)
    assert set(dense["ratios"].values()) == {1.0}
    assert packed["ratios"]["bytes_on_disk"] < 0.95
    assert packed["ratios"]["bytes_in_memory"] < 0.95


def test_windows_are_as_long_as_all_models_can_read_and_other_tokens_are_told(folder: Path) -> None:
    if not (folder / "other").exists():
        save_model(folder / "other", "llama", torch.float16)
        byte_level().save_pretrained(folder / "other")
        config = json.loads((folder / "other" / "config.json").read_text())
        (folder / "other" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    result = macko("compare", "dense", "other", *CALL)
    assert "windows of 48 tokens, stride 48" in result.stdout
    assert "The models read the text as different tokens, so their perplexities do not compare." in result.stdout
    assert "different tokens" not in macko("compare", "dense", "pruned", *CALL).stdout
    refused = macko("compare", "dense", "other", *CALL, "--seqlen", "64", exit_code=2)
    assert "the model takes at most 48 tokens" in refused.stderr


def test_windows_are_no_longer_than_the_default_where_models_can_read_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("macko_llm.perplexity.EVALUATION_SEQLEN", MAX_POSITIONS - 4)
    said = macko("compare", "dense", "packed", *CALL).stdout
    assert f"windows of {MAX_POSITIONS - 4} tokens, stride {MAX_POSITIONS - 4}" in said


def test_more_new_tokens_than_a_model_has_room_for_are_refused_with_the_most_that_it_has(folder: Path) -> None:
    room = MAX_POSITIONS - len(load_tokenizer(folder / "dense")("Once upon a time")["input_ids"])
    call = ["compare", "dense", "packed", *CALL[:4], "--device", "cpu", "--new-tokens"]
    refused = macko(*call, str(room + 1), exit_code=2)
    assert refused.stderr == (
        f"macko: The model dense has no room for {room + 1} new tokens; use --new-tokens {room} or less.\n"
    )
    macko(*call, str(room))


def _report(*speeds: float, **changes: Any) -> CompareReport:
    models = tuple(
        Compared(f"m{i}", False, "float16", 1000, 2000, 8.0, speed, {**dict.fromkeys(METRICS, 1.0), **changes})
        for i, speed in enumerate(speeds)
    )
    return CompareReport("text.txt", None, 64, 64, True, 4, "cpu", 1, models)


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(_report(10.0, 5.0))
    piped = capsys.readouterr().out
    assert "10.0  1.00x" in piped
    assert "█" not in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in {"COLUMNS": "200", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    print_comparison(_report(10.0, 5.0))
    lines = {line.split()[0]: line.rstrip() for line in capsys.readouterr().out.splitlines() if " m" in line[:4]}
    assert lines["m0"].endswith(" ████████  10.0  1.00x")
    assert lines["m1"].endswith(" ████       5.0  1.00x")


def test_a_terminal_of_80_columns_shows_two_figures_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in {"COLUMNS": "80", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    report = _report(10.0, 5.0)
    large = {"model": "meta-llama/Llama-2-7b", "bytes_on_disk": 13_480_000_000, "bytes_in_memory": 13_480_000_000}
    print_comparison(replace(report, models=tuple(replace(one, **large) for one in report.models)))
    headers = [
        line.split("  ") for line in capsys.readouterr().out.splitlines() if "perplexity  " in line or "on disk" in line
    ]
    assert [[name.strip() for name in line if name.strip()] for line in headers] == [
        ["on disk", "in memory"],
        ["perplexity", "tokens/s"],
    ]


def test_a_ratio_to_nothing_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(_report(10.0, bytes_on_disk=None))
    assert "1.00 kB  -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, "    "), (1.0, "████"), (2.0, "████"), (0.5, "██  "), (0.53, "██▏ "), (float("inf"), "    ")],
)
def test_a_bar_is_as_long_as_its_share(share: float, drawn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert bar(share, 4) == drawn
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert bar(share, 4) == drawn.replace("█", "#").replace("▏", " ")


def test_a_plot_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    nowhere = tmp_path / f"{'long' * 100}.png"
    refused = macko("compare", "dense", "packed", *CALL, "--plot", str(nowhere), "--json", exit_code=2)
    said = f"The plot {nowhere} cannot be written (File name too long); choose another place."
    assert json.loads(refused.stdout) == {"error": said}
    assert refused.stderr == f"macko: {said}\n"
    plots.check_plot(tmp_path / "new.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.png").write_bytes(b"kept")
    plots.check_plot(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"kept"


def test_a_plot_that_fails_in_the_end_leaves_the_figures_as_one_json_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    path = tmp_path / "bars.png"
    result = macko("compare", "dense", "packed", *CALL, "--plot", str(path), "--json", exit_code=1)
    assert len(json.loads(result.stdout)["models"]) == 2
    assert result.stderr.endswith(
        f"macko: The plot {path} cannot be written (No space left on device); free some space, or choose another place.\n"
    )


def test_the_plot_has_a_bar_for_each_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append((self, path)))
    report = _report(10.0, 5.0)
    report = replace(report, models=(report.models[0], replace(report.models[1], bytes_on_disk=3_000_000)))
    plots.plot_compare(report, tmp_path / "bars.png")
    [(made, path)] = drawn
    assert path == tmp_path / "bars.png"
    widths = {axes.get_title(): [patch.get_width() for patch in axes.patches] for axes in made.axes}
    assert widths == {
        "MB on disk": pytest.approx([0.001, 3.0]),
        "MB in memory": pytest.approx([0.002, 0.002]),
        "perplexity": [8.0, 8.0],
        "tokens/s": [10.0, 5.0],
    }
    assert [label.get_text() for label in made.axes[0].get_yticklabels()] == ["m0", "m1"]


def test_a_plot_of_large_models_counts_gigabytes_and_long_names_leave_its_bars_as_wide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: (save(self, path), drawn.append(self)))
    for name in ("m", "a/folder/of/a/folder/of/models/" * 4):
        one = replace(_report(10.0).models[0], model=name, bytes_on_disk=13_000_000_000)
        plots.plot_compare(replace(_report(), models=(one, one)), tmp_path / "bars.png")
    assert drawn[0].axes[0].get_title() == "GB on disk"
    assert drawn[0].axes[0].patches[0].get_width() == pytest.approx(13)
    short, long = (made.axes[0].get_position().width * made.get_figwidth() for made in drawn)
    assert long > 0.8 * short
