"""Tasks of lm-eval against log-likelihoods computed in plain torch from the dense weights."""

import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_plain, quiet_transformers, read_own_tasks_only
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from macko_llm.cli.main import app
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.errors import CalibrationError, UsageError
from macko_llm.loading import load
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

QUESTIONS = [
    {"q": "Once upon a time there was a little", "choices": ["girl", "dog", "boy"], "a": 1},
    {"q": "The cat was very", "choices": ["happy", "sad and tired", "big"], "a": 2},
    {"q": "They went to the", "choices": ["park", "house", "garden in the sun"], "a": 0},
    {"q": "Lily saw a red", "choices": ["ball", "hat", "stone"], "a": 0},
]
SOLVED = [{"q": "Tom had a", "choices": ["ball", "cat", "hat"], "a": 1}]


def _task(name: str, kind: str, files: dict[str, str], target: str, *metrics: str, **more: Any) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": target,
        "metric_list": [{"metric": metric} for metric in metrics],
        **more,
    }


def tasks_in(folder: Path) -> list[dict[str, Any]]:
    """What the files of lm-eval's tasks say; the questions lie in that folder."""
    questions = {"test": f"{folder}/questions.jsonl"}
    with_solved = {**questions, "train": f"{folder}/solved.jsonl"}
    choice = _task(
        "tiny_choice", "multiple_choice", with_solved, "a", "acc", "acc_norm", "brier_score",
        doc_to_choice="choices", fewshot_split="train", fewshot_config={"sampler": "first_n"},
    )  # fmt: skip
    last = _task("tiny_last", "loglikelihood", questions, " {{choices[a]}}", "perplexity")
    lost = _task("tiny_lost", "loglikelihood", {"test": f"{folder}/nowhere.jsonl"}, "", "perplexity")
    rolling = _task("tiny_rolling", "loglikelihood_rolling", questions, "{{q}}", "byte_perplexity", doc_to_text="")
    answered = _task(
        "tiny_answered", "generate_until", {"test": f"{folder}/answered.jsonl"}, "{{answer}}", "exact_match",
        generation_kwargs={"until": ["<never>"], "max_gen_toks": 8, "do_sample": False},
    )  # fmt: skip
    return [
        choice,
        {**choice, "task": "tiny_among", "fewshot_split": "test"},
        {**choice, "task": "tiny_fixed", "num_fewshot": 0},
        {"group": "tiny_group", "task": ["tiny_choice"], "aggregate_metric_list": [{"metric": "acc"}]},
        last,
        {**last, "task": "tiny_unsafe", "unsafe_code": True},
        {**last, "task": "tiny_images", "doc_to_image": ["q"]},
        lost,
        rolling,
        answered,
    ]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, pruned and packed, and tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    prune_checkpoint(MODEL_FOLDER, folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    tasks = folder / "tasks"
    tasks.mkdir()
    for number, task in enumerate(tasks_in(tasks)):
        (tasks / f"{number}.yaml").write_text(json.dumps(task))  # which is YAML, too
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tasks / "solved.jsonl").write_text("\n".join(map(json.dumps, SOLVED)))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    if importlib.util.find_spec("lm_eval") is not None:
        read_own_tasks_only(monkeypatch)


@pytest.fixture(scope="module")
def dense(folder: Path) -> nn.Module:
    """The pruned model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "pruned")


def log_likelihood(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the tokens that the continuation adds to the context's, one by one in float64."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[at - 1, ids[at]].item() for at in range(start, len(ids)))


def run(folder: Path, name: str, *, model: str = "packed", dtype: str = "float32", **options: Any) -> dict[str, Any]:
    """What the library says of a task, metric -> score."""
    from macko_llm import evaluation

    loaded = load(folder / model, dtype=dtype, device="cpu")
    own = options.pop("tokenizer", None) or AutoTokenizer.from_pretrained(folder / model)
    tasks = evaluation.find_tasks([name], include_path=folder / "tasks")
    report = evaluation.evaluate_tasks(loaded, own, tasks, **options)
    return {score.metric: score for score in report.scores}


def expected_choices(dense: nn.Module, tokenizer: Any, contexts: list[str], delimiter: str = " ") -> dict[str, float]:
    """The metrics of tiny_choice from their definitions."""
    hits, hits_by_length, brier = [], [], []
    for question, context in zip(QUESTIONS, contexts, strict=False):
        choices, right = question["choices"], question["a"]
        scores = [log_likelihood(dense, tokenizer, context, delimiter + choice) for choice in choices]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        hits.append(scores.index(max(scores)) == right)
        hits_by_length.append(by_length.index(max(by_length)) == right)
        shares = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        brier.append(sum((share - (index == right)) ** 2 for index, share in enumerate(shares)))
    count = len(hits)
    return {"acc": sum(hits) / count, "acc_norm": sum(hits_by_length) / count, "brier_score": sum(brier) / count}


@pytest.mark.lm_eval
@pytest.mark.parametrize(("model", "batch_size"), [("packed", 1), ("packed", 3), ("pruned", 2)])
def test_choices_are_scored_by_their_log_likelihoods(folder, dense, tokenizer, model, batch_size) -> None:
    measured = run(folder, "tiny_choice", model=model, batch_size=batch_size)
    expected = expected_choices(dense, tokenizer, [question["q"] for question in QUESTIONS])
    assert {name: score.value for name, score in measured.items()} == pytest.approx(expected, rel=1e-4)
    assert 0.1 < expected["brier_score"] < 1.9  # so that it says something
    rate = expected["acc"]
    assert measured["acc"].stderr == pytest.approx(math.sqrt(rate * (1 - rate) / (len(QUESTIONS) - 1)))
    assert {(s.task, s.filter, s.examples, s.num_fewshot) for s in measured.values()} == {("tiny_choice", "none", 4, 0)}


@pytest.mark.lm_eval
def test_solved_examples_stand_in_front_and_a_limit_takes_the_first(folder, dense, tokenizer) -> None:
    measured = run(folder, "tiny_choice", num_fewshot=1, limit=3)
    contexts = [f"Tom had a cat\n\n{question['q']}" for question in QUESTIONS[:3]]
    expected = expected_choices(dense, tokenizer, contexts)
    assert {name: score.value for name, score in measured.items()} == pytest.approx(expected, rel=1e-4)
    assert {(score.examples, score.num_fewshot) for score in measured.values()} == {(3, 1)}
    assert run(folder, "tiny_choice", limit=0.5)["acc"].examples == 2
    assert run(folder, "tiny_fixed", num_fewshot=1)["acc"].num_fewshot == 0


@pytest.mark.lm_eval
def test_more_solved_examples_than_there_are_are_refused(folder) -> None:
    sentence = "^The task tiny_choice has fewer than 2 solved examples; use --num-fewshot 1 or less.$"
    with pytest.raises(UsageError, match=sentence):
        run(folder, "tiny_choice", num_fewshot=2)
    assert run(folder, "tiny_among", num_fewshot=len(QUESTIONS) - 1)["acc"].num_fewshot == len(QUESTIONS) - 1
    with pytest.raises(
        UsageError, match=f"fewer than {len(QUESTIONS)} solved examples; use --num-fewshot {len(QUESTIONS) - 1} or"
    ):
        run(folder, "tiny_among", num_fewshot=len(QUESTIONS))  # the one that is asked about is not shown


@pytest.mark.lm_eval
def test_probabilities_of_half_precision_models_are_computed_in_float32(folder, tokenizer) -> None:
    half = load(folder / "packed", dtype="float16", device="cpu")
    expected = expected_choices(half, tokenizer, [question["q"] for question in QUESTIONS])
    assert run(folder, "tiny_choice", dtype="float16")["brier_score"].value == pytest.approx(
        expected["brier_score"], rel=1e-5
    )


@pytest.mark.lm_eval
def test_a_chat_template_is_put_around_questions(folder, dense) -> None:
    chat = AutoTokenizer.from_pretrained(folder / "packed")
    chat.chat_template = (
        "{% for m in messages %}{{ m.content }}!{% endfor %}{% if add_generation_prompt %} So:{% endif %}"
    )
    measured = run(folder, "tiny_choice", tokenizer=chat, apply_chat_template=True)
    expected = expected_choices(dense, chat, [f"{question['q']}! So:" for question in QUESTIONS], "")
    assert measured["brier_score"].value == pytest.approx(expected["brier_score"], rel=1e-4)
    with pytest.raises(UsageError, match="no chat template; use a chat model, or drop --apply-chat-template"):
        run(folder, "tiny_choice", apply_chat_template=True)


@pytest.mark.lm_eval
def test_perplexities_of_answers_and_of_texts(folder, dense, tokenizer, monkeypatch) -> None:
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr(multiprocessing, "Pool", None)  # standard errors are sampled in this process
    answers = [log_likelihood(dense, tokenizer, q["q"], f" {q['choices'][q['a']]}") for q in QUESTIONS]
    assert run(folder, "tiny_last")["perplexity"].value == pytest.approx(math.exp(-sum(answers) / 4), rel=1e-4)
    calls: list[tuple[str, int, int]] = []
    measured = run(folder, "tiny_rolling", progress=lambda *call: calls.append(call))
    # lm-eval puts a BOS token in front of texts, the one that this tokenizer writes included.
    texts = [log_likelihood(dense, tokenizer, "", tokenizer.bos_token + question["q"]) for question in QUESTIONS]
    count = sum(len(question["q"].encode()) for question in QUESTIONS)
    assert measured["byte_perplexity"].value == pytest.approx(math.exp(-sum(texts) / count), rel=1e-4)
    assert calls == [("scoring texts", done, 4) for done in range(5)]


@pytest.mark.lm_eval
def test_answers_are_generated_greedily(folder, dense, tokenizer) -> None:
    lines = []
    for number, question in enumerate(QUESTIONS):
        ids = tokenizer(question["q"])["input_ids"]
        start = len(ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(dense(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        answer = "something else" if number == 3 else tokenizer.decode(ids[start:])
        lines.append(json.dumps({"q": question["q"], "answer": answer}))
    (folder / "tasks" / "answered.jsonl").write_text("\n".join(lines))
    assert run(folder, "tiny_answered", batch_size=2)["exact_match"].value == 0.75


@pytest.mark.lm_eval
def test_groups_and_patterns_are_names_too(folder) -> None:
    from macko_llm import evaluation

    alone = run(folder, "tiny_choice")["acc"].value
    loaded = load(folder / "packed", dtype="float32", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder / "packed")
    tasks = evaluation.find_tasks(["tiny_group", "tiny_la*"], include_path=folder / "tasks")
    scores = evaluation.evaluate_tasks(loaded, tokenizer, tasks).scores
    assert {(s.task, s.metric): s.value for s in scores if s.metric == "acc"} == {
        ("tiny_group", "acc"): alone,
        ("tiny_choice", "acc"): alone,
    }
    assert {score.task for score in scores} == {"tiny_group", "tiny_choice", "tiny_last"}


@pytest.mark.lm_eval
@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("tiny_chioce", UsageError, "no task tiny_chioce; use tiny_choice .*, or name the folder .* --include-path"),
        ("zzzzzz", UsageError, "no task zzzzzz; see `lm-eval ls tasks`, or name the folder"),
        ("tiny_unsafe", UsageError, "tiny_unsafe runs code that the model writes; run it with lm-eval itself"),
        ("tiny_images", UsageError, "tiny_images shows more than text; choose one of text alone"),
        ("tiny_lost", CalibrationError, r"tiny_lost cannot be read \(FileNotFoundError: .*nowhere.*\); check"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_in_a_sentence(folder, name, kind, sentence) -> None:
    from macko_llm import evaluation

    with pytest.raises(kind, match=sentence) as raised:
        evaluation.find_tasks([name], include_path=folder / "tasks")
    assert_plain(str(raised.value))


@pytest.mark.lm_eval
def test_the_command_prints_json_and_nothing_else_on_stdout(folder, tmp_path) -> None:
    command = [sys.executable, "-m", "macko_llm", "eval", "packed", "--tasks", "tiny_choice,tiny_last,tiny_rolling"]
    command += ["--include-path", "tasks", "--batch-size", "2", "--dtype", "float32", "--device", "cpu", "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=folder, env=environment)
    content = json.loads(ran.stdout)
    assert content.keys() == {"scores", "limit", "chat_template", "batch_size", "dtype", "lm_eval"}
    assert (content["limit"], content["chat_template"], content["batch_size"]) == (None, False, 2)
    expected = run(folder, "tiny_choice", batch_size=2)["brier_score"]
    brier = next(score for score in content["scores"] if score["metric"] == "brier_score")
    assert brier == {
        "task": "tiny_choice",
        "metric": "brier_score",
        "filter": "none",
        "value": pytest.approx(expected.value, rel=1e-5),
        "stderr": None,
        "examples": 4,
        "num_fewshot": 0,
    }
    for line in ran.stderr.splitlines():
        assert re.fullmatch(r"(finding tasks|scoring answers|scoring texts): \d+/\d+", line), line


@pytest.mark.lm_eval
def test_the_command_prints_a_table(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    call = ["eval", "packed", "--tasks", "tiny_choice", "--include-path", "tasks", "--limit", "2", "--num-fewshot", "1"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["task", "metric", "value", "stderr", "examples", "shots"] in rows
    row = next(row for row in rows if row[:2] == ["tiny_choice", "acc"])
    assert re.fullmatch(r"\d\.\d{4}", row[2])
    assert row[4:] == ["2", "1"]


def test_without_lm_eval_one_sentence_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["eval", str(MODEL_FOLDER), "--tasks", "arc_easy"])
    assert result.exit_code == 2
    assert result.stderr == "macko: `macko eval` needs lm-eval; install it with `pip install lm-eval`.\n"
    assert result.stdout == ""
