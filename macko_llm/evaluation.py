"""Tasks of EleutherAI's lm-eval on models that this package loads, dense or packed.

lm-eval is the extra `eval`; nothing else imports this module.
"""

import difflib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import CacheHook
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macko_llm.dtypes import dtype_name
from macko_llm.errors import CalibrationError, CheckpointError, UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_batch_size, check_examples, check_tasks
from macko_llm.text import require_chat_template

_DRAWS = 1000
"""Samples of a standard error that has no formula: fewer than lm-eval's 100000, for which one would wait."""

_NOT_HERE = {
    "UNSAFE_CODE": "runs code that the model writes; run it with lm-eval itself, in a sandbox",
    "MULTIMODAL": "shows more than text; choose one of text alone",
}
"""What lm-eval says of tasks that are refused."""


@dataclass(frozen=True)
class Score:
    """What one metric says of one task, or of a group of them.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's name, such as "acc" or "acc_norm".
        filter: what lm-eval made of the model's answers first; "none" for most.
        value: of the metric.
        stderr: its standard error, None where lm-eval gives none.
        examples: that were asked, None for groups of which lm-eval does not say.
        num_fewshot: solved examples in front of each, None for groups of which lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int | None
    num_fewshot: int | None


@dataclass(frozen=True)
class EvaluationReport:
    """Scores and what they depend on.

    Attributes:
        scores: in lm-eval's order.
        limit: examples of each task at most, below 1 a share of them, None for all.
        chat_template: whether the model's chat template was put around the examples.
        batch_size: texts evaluated together.
        dtype: of the model's weights, as "float16".
        lm_eval: its version.
    """

    scores: list[Score]
    limit: float | None
    chat_template: bool
    batch_size: int
    dtype: str
    lm_eval: str


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, and groups of them, as lm-eval's `TaskManager.load` gives them."""

    loaded: Any


def find_tasks(names: Sequence[str], *, include_path: Path | None = None) -> Tasks:
    """Look tasks up and read their data, for which no model is needed.

    Args:
        names: of tasks, groups or tags that lm-eval knows; `*` and `?` stand for what fits.
        include_path: a folder with YAML files of more tasks.

    Raises:
        UsageError: no names, a name that lm-eval does not know, a task that runs code or shows images, no such folder.
        CalibrationError: the tasks' data cannot be read.
    """
    check_tasks(names, include_path)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    found: list[str] = []
    for name in names:
        fitting = manager.match_tasks([name])
        if not fitting:
            raise _unknown(name, manager.all_tasks)
        found += fitting
    try:
        loaded = manager.load(list(dict.fromkeys(found)))
    except ModuleNotFoundError:  # some tasks need packages of their own; the error names the package
        raise
    except Exception as error:  # lm-eval, datasets, its file systems and its HTTP clients each raise their own
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise CalibrationError(
            f"The data of {', '.join(names)} cannot be read ({reason}); check the network, or the YAML files of own tasks."
        ) from error
    for name, task in loaded["tasks"].items():
        for mark, sentence in _NOT_HERE.items():
            if getattr(task, mark, False):
                raise UsageError(f"The task {name} {sentence}.")
    return Tasks(loaded)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Score a model on tasks, as lm-eval does, but that probabilities are computed in float32 whatever the model's dtype.

    Args:
        model: a causal language model in eval mode, dense or packed.
        tokenizer: the model's.
        tasks: from `find_tasks`; lm-eval changes them, so they serve once.
        num_fewshot: solved examples in front of each one, instead of the number that each task names; a task that names
            0 keeps it.
        limit: use the first examples of each task only; below 1 it is a share of them.
        batch_size: texts evaluated together.
        apply_chat_template: put the model's chat template around the examples.
        progress: called with (what, requests done, requests to do).

    Raises:
        UsageError: a number outside its range, more solved examples than a task has, or a chat template that is not there.
        CheckpointError: a batch does not fit the device's memory.
    """
    # Its processes would be forks of one that has a model, threads and perhaps a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    check_examples(num_fewshot, limit)
    check_batch_size(batch_size, "texts")
    if apply_chat_template:
        require_chat_template(tokenizer, "--apply-chat-template")
    scorer = _Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    scorer.progress = progress
    for name, task in tasks.loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # as lm-eval has it: who writes 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        _check_solved(name, task)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        with redirect_stdout(io.StringIO()):  # lm-eval prints which standard errors it samples
            # simple_evaluate would run git, pip and nvidia-smi for its report.
            results: Any = lm_eval.evaluate(
                lm=scorer,
                task_dict=tasks.loaded,
                limit=limit,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=True,
                log_samples=False,
                bootstrap_iters=_DRAWS,
            )
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"A batch of {batch_size} does not fit on {model.device}; use a smaller --batch-size, or --device cpu."
        ) from error
    return EvaluationReport(
        scores=_scores(results),
        limit=limit,
        chat_template=apply_chat_template,
        batch_size=batch_size,
        dtype=dtype_name(model.dtype),
        lm_eval=lm_eval.__version__,
    )


def _check_solved(name: str, task: Any) -> None:
    """Refuse more solved examples than a task has; one that is asked about is not shown, where both are of one split."""
    asked = task.get_config("num_fewshot")
    if asked == 0:
        return
    solved = len(task.fewshot_docs() or ()) - (1 if task.fewshot_cfg.split == task.config.test_split else 0)
    if asked > solved:
        raise UsageError(
            f"The task {name} has fewer than {asked} solved examples; use --num-fewshot {max(solved, 0)} or less."
        )


class _Scorer(HFLM):
    """lm-eval's own adapter of transformers models, which reports its progress and draws no bars."""

    progress: Progress = staticmethod(no_progress)

    def loglikelihood(self, requests: list[Any], **_: Any) -> Any:
        return self._reported("scoring answers", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> Any:
        return self._reported("scoring texts", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], **_: Any) -> Any:
        return self._reported("generating answers", super().generate_until, requests)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> Any:
        return super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True})

    def _reported(self, what: str, score: Callable[..., Any], requests: list[Any]) -> Any:
        self.progress(what, 0, len(requests))
        self.set_cache_hook(_Counter(lambda done: self.progress(what, done, len(requests))))
        return score(requests, disable_tqdm=True)


class _Counter(CacheHook):
    """lm-eval tells its cache of each request that is done; there is no cache, so this counts them."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__(None)
        self.report, self.done = report, 0

    def add_partial(self, *_: object) -> None:
        self.done += 1
        self.report(self.done)


def _unknown(name: str, known: Sequence[str]) -> UsageError:
    close = difflib.get_close_matches(name, known, n=3)
    fix = f"use {' or '.join(close)}" if close else "see `lm-eval ls tasks`"
    return UsageError(f"lm-eval has no task {name}; {fix}, or name the folder of own tasks with --include-path.")


def _scores(results: dict[str, Any]) -> list[Score]:
    scores = []
    for task, measured in results["results"].items():
        for key, value in measured.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = measured.get(f"{metric}_stderr,{name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, Real) else None,
                    examples=measured.get("sample_len"),
                    num_fewshot=results["n-shot"].get(task),
                )
            )
    return scores
