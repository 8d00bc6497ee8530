"""`macko compare`."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macko_llm.cli.console import bar, megabytes, plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EvaluationTextOption,
    JsonOption,
    LimitOption,
    StrideOption,
    TestSplitOption,
    TextColumnOption,
    TrustOption,
    expanded_path,
)
from macko_llm.cli.reports import draw, note_on_cpu
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import EVALUATION_DATASET, EVALUATION_SEQLEN, MAX_NEW_TOKENS

if TYPE_CHECKING:
    from macko_llm.benchmarks.compare import CompareReport

BAR_WIDTH = 8
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "bytes_on_disk": ("on disk", lambda count: megabytes(int(count))),
    "bytes_in_memory": ("in memory", lambda count: megabytes(int(count))),
    "perplexity": ("perplexity", lambda value: f"{value:.3f}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:.1f}"),
}


@plain_errors
@with_hub
@with_threads
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders or hub ids (also ID@REVISION), dense or packed; ratios are to the first."
        ),
    ],
    dataset: EvaluationTextOption = EVALUATION_DATASET,
    split: TestSplitOption = None,
    text_column: TextColumnOption = None,
    seqlen: Annotated[
        int | None,
        typer.Option(help=f"Tokens in a window. [default: {EVALUATION_SEQLEN}, or what all models can read]"),
    ] = None,
    stride: StrideOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(help="Windows evaluated together.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text that is timed.")] = MAX_NEW_TOKENS,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", parser=expanded_path, help="Draw bars too (needs matplotlib)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put models side by side: size on disk and in memory, perplexity on a text, and tokens per second.

    Examples:
        macko compare ./model ./packed

        macko compare ./model ./pruned ./packed --dataset held-out.txt --limit 20

        macko compare ./model ./packed --dataset held-out.txt --plot compared.png
    """
    from macko_llm import calibration, refusals
    from macko_llm.benchmarks import plots

    refusals.check_comparison(models, new_tokens)
    refusals.check_windows(seqlen, stride, limit)
    refusals.check_batch_size(batch_size)
    calibration.check_source(dataset, split, text_column)
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    if plot is not None:
        plots.check_plot(plot)
    folders = [(name, refusals.find_model(name)) for name in models]

    from macko_llm.benchmarks.compare import compare as measure  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        report = measure(
            folders,
            dataset=dataset,
            split=split,
            text_column=text_column,
            seqlen=seqlen,
            stride=stride,
            limit=limit,
            batch_size=batch_size,
            new_tokens=new_tokens,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
    else:
        print_comparison(report)
    if plot is not None:
        draw(plots.plot_compare, report, plot)


def print_comparison(report: "CompareReport") -> None:
    """A line a model, each figure with its ratio to the first one's, and at a terminal a bar."""
    part = f", {report.split} split" if report.split else ""
    title = (
        f"{report.device}; perplexity on {report.dataset}{part}, windows of {report.seqlen} tokens, stride {report.stride}; "
        f"speed of {report.new_tokens} new tokens"
    )
    columns = {metric: _column(report, metric) for metric in COLUMNS}
    rows = [[one.model, *(cells[i] for cells in columns.values())] for i, one in enumerate(report.models)]
    print_table(title, ["", *(name for name, _ in COLUMNS.values())], rows)
    if not report.same_tokens:
        print("The models read the text as different tokens, so their perplexities do not compare.")
    note_on_cpu(report.device)


def _column(report: "CompareReport", metric: str) -> list[str]:
    _, words = COLUMNS[metric]
    values = [getattr(one, metric) for one in report.models]
    ratios = [one.ratios[metric] for one in report.models]
    cells = [
        f"{words(value)}  {'-' if ratio is None else f'{ratio:.2f}x'}"
        for value, ratio in zip(values, ratios, strict=True)
    ]
    if not sys.stdout.isatty():
        return cells
    width, longest = max(map(len, cells)), max(*values, 1e-9)
    return [f"{bar(value / longest, BAR_WIDTH)}  {cell:>{width}}" for cell, value in zip(cells, values, strict=True)]
