"""`macko demo` and `macko bench quality` on the bundled model, with less text and fewer tokens than they take by default."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import edit_config, quiet_transformers
from typer.testing import CliRunner

from macko_llm import checkpoint, inspecting
from macko_llm.benchmarks import quality
from macko_llm.calibration import calibration_tokens, tokens_sha256
from macko_llm.cli.main import app
from macko_llm.demo import run as demo
from macko_llm.models import load_tokenizer

CHARACTERS = {"calibration.txt": 40_000, "held-out.txt": 10_000}
NAMES = ["dense", "magnitude 50%", "wanda 50%", "packed 50%"]

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_FOLDER / "config.json").is_file(), reason="the bundled model has not been trained yet"
)


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quality, "SPEED_RUNS", 1)
    monkeypatch.setattr(quality, "SPEED_TOKENS", 8)
    whole = demo.bundled_text
    monkeypatch.setattr(demo, "bundled_text", lambda name: whole(name)[: CHARACTERS[name]])
    monkeypatch.setattr(demo, "NSAMPLES", 8)
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo(demo_folder: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-o", str(demo_folder), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    rows = {row["name"]: row for row in content["report"]["measurements"]}
    assert list(rows) == NAMES
    # What the demo is there to show: pruning hurts, magnitude clearly more than Wanda, and packing costs nothing.
    dense, magnitude, wanda, packed = (rows[name] for name in NAMES)
    assert 1.1 * dense["perplexity"] < wanda["perplexity"] < 0.95 * magnitude["perplexity"]
    assert packed["perplexity"] == pytest.approx(wanda["perplexity"], rel=1e-3)
    assert packed["bytes_on_disk"] < 0.8 * dense["bytes_on_disk"]
    assert packed["bytes_in_memory"] < 0.8 * dense["bytes_in_memory"]
    assert [row["sparsity"] for row in rows.values()] == pytest.approx([0, 0.5, 0.5, 0.5], abs=0.01)
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    for name, row in zip(("dense", "magnitude-50", "wanda-50", "packed-50"), rows.values(), strict=True):
        assert checkpoint.folder_bytes(demo_folder / name) == row["bytes_on_disk"]
    assert inspecting.inspect_checkpoint(demo_folder / "packed-50").kept_dense == []
    assert content["prompt"] == "Once upon a time"
    assert len(content["story"].split()) > 20
    assert "writing stories: 0/1" in result.stderr.splitlines()


def test_the_demo_prints_a_table_and_a_story_and_may_run_again(demo_folder: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-o", str(demo_folder)])
    assert result.exit_code == 0, result.output
    table, story = result.stdout.split("The packed model tells a story:")
    for words in (*NAMES, "sparsity", "on disk", "in memory", "perplexity", "tokens/s"):
        assert words in table
    assert story.strip().startswith("Once upon a time")
    assert "macko generate" in story


def test_bench_quality_of_the_bundled_model() -> None:
    call = [
        "bench",
        "quality",
        "--limit",
        "1",
        "--nsamples",
        "2",
        "--seqlen",
        "128",
        "--sparsity",
        "0.3",
        "--sparsity",
        "0.7",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [row["name"] for row in content["measurements"]] == [
        "dense",
        *(f"{kind} {percent}%" for percent in (30, 70) for kind in ("magnitude", "wanda", "packed")),
    ]
    assert (content["windows"], content["seqlen"], content["recipe"]["nsamples"]) == (1, 128, 2)
    assert content["device"] == "cpu"


def test_what_the_demo_did_not_write_is_kept(tmp_path: Path) -> None:
    (tmp_path / "wanda-50").mkdir()
    (tmp_path / "wanda-50" / "config.json").write_text("a project of one's own")
    for command in (["demo"], ["bench", "quality"]):
        result = CliRunner().invoke(app, [*command, "-o", str(tmp_path)])
        assert result.exit_code == 2, result.output
        assert "holds wanda-50, which this command did not write" in result.stderr
    (tmp_path / "calibration.txt").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "calibration.txt")])
    assert (result.exit_code, "is a file; choose another folder" in result.stderr) == (2, True)
    assert (tmp_path / "wanda-50" / "config.json").read_text() == "a project of one's own"
    assert (tmp_path / "calibration.txt").read_text() == "mine"


def test_bench_quality_of_a_model_and_texts_of_ones_own(tmp_path: Path) -> None:
    texts = demo.write_texts(tmp_path)
    call = ["bench", "quality", str(demo.MODEL_FOLDER), "--calibration", str(texts.calibration)]
    call += ["--dataset", str(texts.held_out), "--limit", "1", "--nsamples", "2", "--seqlen", "128", "--device", "cpu"]
    result = CliRunner().invoke(app, [*call, "-o", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    assert "1 window of 128 tokens, 2 x 128 calibration tokens, float16, cpu" in result.stdout
    assert result.stdout.count("On a CPU packed layers are faster than dense ones where") == 1
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        ".macko-outputs.json",
        "dense",
        "magnitude-50",
        "packed-50",
        "wanda-50",
    ]


def test_bench_quality_of_datasets_takes_a_split_and_a_column_for_each(tmp_path: Path) -> None:
    """Each text lies where only its own options lead, and the default length shrinks to the model's context."""
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_FOLDER, model)
    edit_config(model, max_position_embeddings=128)
    texts = demo.write_texts(tmp_path)
    for name, split, column, text in (
        ("calibrate", "first", "story", texts.calibration),
        ("evaluate", "second", "body", texts.held_out),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n---\n"
        )
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({column: text.read_text()}))
    call = ["bench", "quality", str(model), "--limit", "1", "--nsamples", "2", "--device", "cpu", "--json"]
    call += ["--calibration", str(tmp_path / "calibrate"), "--calibration-split", "first"]
    call += ["--calibration-column", "story", "--dataset", str(tmp_path / "evaluate"), "--dataset-split", "second"]
    result = CliRunner().invoke(app, [*call, "--dataset-column", "body"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["split"], report["seqlen"], report["windows"]) == ("second", 128, 1)
    settings = (report["recipe"]["split"], report["recipe"]["text_column"], report["recipe"]["seqlen"])
    assert settings == ("first", "story", 128)


def test_bench_quality_calibrates_in_a_chat_template_as_prune_does(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_FOLDER, model)
    texts = demo.write_texts(tmp_path)
    story = texts.calibration.read_text()[:20_000]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": story}]}))
    call = [
        "bench",
        "quality",
        str(model),
        "--calibration",
        str(chats),
        "--dataset",
        str(texts.held_out),
        "--limit",
        "1",
    ]
    call += ["--nsamples", "2", "--seqlen", "64", "--device", "cpu", "--chat-template", "-o", str(tmp_path / "kept")]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2, refused.output
    assert "chat template" in refused.stderr
    assert "--chat-template" in refused.stderr
    assert not (tmp_path / "kept").exists()  # before any work
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"]["chat_template"] is True
    made = json.loads((tmp_path / "kept" / "wanda-50" / "macko.json").read_text())["prune"]
    tokens = calibration_tokens(str(chats), load_tokenizer(model), 2, 64, 0, chat_template=True)
    assert made["calibration_sha256"] == tokens_sha256(tokens)
