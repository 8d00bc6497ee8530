"""`macko eval`."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    expanded_path,
    parse_list,
)
from macko_llm.cli.surroundings import with_hub, with_threads

if TYPE_CHECKING:
    from macko_llm.evaluation import EvaluationReport


@plain_errors
@with_hub
@with_threads
def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Tasks, groups or tags of lm-eval, with commas between them; `lm-eval ls tasks` lists them.",
        ),
    ],
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Solved examples in front of each; a task that says 0 keeps it. [default: the task's]"),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="N", help="The first N examples of each task; below 1 a share of them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts evaluated together.")] = 1,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=expanded_path, help="A folder with YAML files of own tasks.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the examples into the model's chat template.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on the tasks of EleutherAI's lm-eval, which `pip install lm-eval` installs.

    Examples:
        macko eval ./packed --tasks arc_easy,hellaswag --batch-size 8

        macko eval ./packed --tasks winogrande --num-fewshot 5 --limit 200 --json

        macko eval ./packed --tasks my_task --include-path ./my-tasks
    """
    from macko_llm import refusals

    names = parse_list(tasks, str)
    refusals.check_tasks(names, include_path)
    refusals.check_examples(num_fewshot, limit)
    refusals.check_batch_size(batch_size, "texts")
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    refusals.require_lm_eval()
    folder = refusals.find_model(model)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it speaks of every default that it takes
    with progress_bars() as progress:
        progress("finding tasks", 0, 1)

        from macko_llm import evaluation, models
        from macko_llm.loading import load
        from macko_llm.text import require_chat_template

        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
        if apply_chat_template:
            require_chat_template(tokenizer, "--apply-chat-template")
        found = evaluation.find_tasks(names, include_path=include_path)
        report = evaluation.evaluate_tasks(
            load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, tokens=batch_size),
            tokenizer,
            found,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_scores(report)


def _print_scores(report: "EvaluationReport") -> None:
    rows = [
        [
            score.task,
            score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            "" if score.examples is None else str(score.examples),
            "" if score.num_fewshot is None else str(score.num_fewshot),
        ]
        for score in report.scores
    ]
    chat = ", chat template" if report.chat_template else ""
    title = f"lm-eval {report.lm_eval}, {report.dtype}{chat}"
    print_table(title, ["task", "metric", "value", "stderr", "examples", "shots"], rows, names=2)
