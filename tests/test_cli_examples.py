"""Every example of every help is run, word by word, but for what a small model on any machine cannot do."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer.main
from helpers import quiet_transformers, read_own_tasks_only
from typer.testing import CliRunner

from macko_llm.benchmarks import decode, machine, quality, spmv, timing
from macko_llm.cli.main import app
from macko_llm.demo import run as demo
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

NAMES = {
    "meta-llama/Llama-2-7b-hf": "./model",
    "llama2-7b": "tiny",
    "llama2-70b": "tiny",
    "4096x4096": "64x64",
    "/tmp/macko-demo": "macko-demo",
    "/dev/shm": ".",
}
"""What is small here in place of what is large there, and folders of the test's own."""

SMALL = {
    "prune": "--nsamples 2 --seqlen 32",
    "tune": "--steps 2 --seqlen 32",
    "generate": "-n 3",
    "chat": "-n 3",
    "eval-perplexity": "--limit 1 --seqlen 64",
    "eval ": "--include-path my-tasks",
    "compare": "--limit 1 --seqlen 64 --new-tokens 3",
    "bench quality": "--limit 1 --nsamples 2 --seqlen 64",
    "bench decode": "--context 4 --new-tokens 2",
    "bench prune": "--nsamples 2 --seqlen 32",
}
"""Written behind an example, so that it does less of the same."""

ON_GPUS = "--layout tiled"

TASK = """
task: {name}
dataset_path: owner/stories
output_type: loglikelihood
training_split: train
test_split: test
doc_to_text: "{{{{text[:50]}}}}"
doc_to_target: "{{{{text[50:60]}}}}"
metric_list: [{{metric: perplexity}}]
"""


def _examples() -> Iterator[str]:
    def walk(command: Any) -> Iterator[str]:
        yield from command.help.partition("```text\n")[2].partition("\n```")[0].splitlines()
        for inner in getattr(command, "commands", {}).values():
            yield from walk(inner)

    yield from dict.fromkeys(walk(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and files that the examples name."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(demo.MODEL_FOLDER, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("chat-model", "dense"):
        (folder / name).symlink_to("model")
    prune_checkpoint(folder / "model", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    text = demo.bundled_text("held-out.txt")[:20_000].decode()
    for name in ("held-out.txt", "train.txt", "valid.txt"):
        (folder / name).write_text(text)
    for name in ("question.txt", "one.txt", "two.txt", "three.txt"):
        (folder / name).write_text("Once upon a time\n")
    (folder / "questions.txt").write_text("Who is the fox?\nAnd the owl?\n")
    (folder / "my-texts.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n") if len(part) > 200)
    )
    (folder / "my-tasks").mkdir()
    for name in ("arc_easy", "hellaswag", "winogrande", "my_task"):
        (folder / "my-tasks" / f"{name}.yaml").write_text(TASK.format(name=name))
    (folder / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    return folder


@pytest.fixture(autouse=True)
def _small_world(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Datasets of the hub hold the bundled text; the demo and the benchmarks do less."""
    text = (models / "held-out.txt").read_text()
    chat = [{"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": text[:3000]}]

    def load_dataset(path: str, *_: object, split: str | None = None, streaming: bool = False, **__: object) -> Any:
        if path == "owner/stories":  # of a task, which takes all splits at once
            parts = datasets.Dataset.from_dict({"text": [text[at : at + 60] for at in range(0, 600, 60)]})
            return datasets.DatasetDict(train=parts, test=parts)
        rows = {"messages": [chat] * 4} if "chat" in path else {"text": [text] * 4}
        made = datasets.Dataset.from_dict(rows)
        if not streaming:
            assert split is not None
            return made
        names = ("train", "validation", "test", "train_sft")
        return datasets.IterableDatasetDict({name: made.to_iterable_dataset() for name in names})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for module, name, value in (
        (quality, "SPEED_RUNS", 1),
        (quality, "SPEED_TOKENS", 2),
        (decode, "RUNS", 1),
        (decode, "WARMUP_TOKENS", 2),
        (machine, "READ_BYTES", dict.fromkeys(machine.READ_BYTES, 2**20)),
        (spmv, "LLAMA_2_7B", ((64, 64),)),
        (spmv, "CPU_ROTATION_BYTES", 2**16),
        (timing, "REPLAYS", 2),
        (timing, "MIN_LAUNCHES", 2),
    ):
        monkeypatch.setattr(module, name, value)
    whole = demo.bundled_text
    monkeypatch.setattr(demo, "bundled_text", lambda name: whole(name)[:10_000])
    monkeypatch.setattr(demo, "NSAMPLES", 2)
    monkeypatch.setattr(demo, "SEQLEN", 64)
    with quiet_transformers():
        yield


def _parameters() -> Iterator[Any]:
    for example in _examples():
        yield pytest.param(
            example, marks=[pytest.mark.lm_eval] if example.startswith("macko eval ") else [], id=example
        )


@pytest.mark.parametrize("example", list(_parameters()))
def test_an_example_of_the_help_runs(
    example: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ON_GPUS in example and not torch.cuda.is_available():
        pytest.skip("the tiled layout is a GPU's")
    if example.startswith("macko eval "):
        read_own_tasks_only(monkeypatch)
    if "--plot" in example:
        pytest.importorskip("matplotlib", reason="needs matplotlib")
    before, _, call = example.rpartition("| ")
    words = [NAMES.get(word, word) for word in shlex.split(call)]
    assert words.pop(0) == "macko"
    target = words[words.index("-o") + 1] if "-o" in words else None
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        if path.name != target:
            Path(path.name).symlink_to(path)
    command = next((name for name in SMALL if " ".join(words).startswith(name)), None)
    small = shlex.split(SMALL[command]) if command else []
    typed = Path(before.split()[1]).read_text() if before else "Once upon a time\n"
    result = CliRunner().invoke(app, [*words, *small], input=typed)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    if target is not None:
        assert any(Path(target).rglob("config.json"))
    if "--plot" in words:
        assert Path(words[words.index("--plot") + 1]).read_bytes().startswith(b"\x89PNG")
