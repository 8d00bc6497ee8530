"""`macko bench decode`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from macko_llm.cli.console import gigabytes_per_second, megabytes, plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import DeviceOption, DtypeOption, JsonOption, parse_list, parse_sparsity, shapes
from macko_llm.cli.reports import note_on_cpu
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import BENCHMARK_CONTEXT, MAX_NEW_TOKENS

if TYPE_CHECKING:
    from macko_llm.benchmarks.decode import DecodeReport, Measured, Row

COLUMNS = (
    "",
    "sparsity",
    "tokens/s",
    "in all",
    "vs transformers",
    "ms/token",
    "linears",
    "attention",
    "rest",
    "peak memory",
    "first token",
    "engine",
)
NOTHING = "-"


@plain_errors
@with_hub
@with_threads
def decode(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder or hub id. A dense one is pruned by magnitude in memory to each --sparsity; "
            "a packed one has its own, and its dense rows are unpacked in memory."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            autocompletion=shapes,
            help="In place of a MODEL: llama2-7b, llama2-70b, llama3-8b, tinyllama-1.1b or tiny, random weights.",
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARE,...", help="Share of zeros in a packed row. [default: 0.5 for random weights]"),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take only the shape of the MODEL; a --config implies it.")
    ] = False,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = BENCHMARK_CONTEXT,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are timed, after some to warm up.")] = MAX_NEW_TOKENS,
    batch: Annotated[int, typer.Option(help="Texts at a time.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time decoding: transformers (compiled), this engine dense, and this engine packed.

    Random weights are built on the device, in float16 if --dtype does not say otherwise: speed and memory do not depend on
    their values.

    Examples:
        macko bench decode --config llama2-7b --sparsity 0.5,0.7,0.9

        macko bench decode ./model --sparsity 0.5 --context 1024

        macko bench decode ./packed
    """
    from macko_llm import refusals
    from macko_llm.benchmarks.shapes import check_shape

    sparsities = parse_list(sparsity, parse_sparsity)
    refusals.check_counts(context, new_tokens, batch)
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    refusals.check_subject(model, config, sparsities, random_weights)
    if config is not None:
        check_shape(config)

    from macko_llm import models  # takes seconds, which a wrong call need not wait for
    from macko_llm.benchmarks.decode import Task, measure_decode
    from macko_llm.benchmarks.subjects import make_subject

    where = models.resolve_device(device)
    subject = make_subject(
        model, config, sparsities=sparsities, random_weights=random_weights, dtype=dtype, device=where
    )
    with progress_bars() as progress:
        report = measure_decode(subject, Task(context, new_tokens, batch), device=where, progress=progress)
    what = f"--config {config}" if model is None else f"{model}{' --random-weights' * random_weights}"
    shares = f" --sparsity {','.join(map(str, sparsities))}" if sparsities else ""
    command = (
        f"macko bench decode {what}{shares} --context {context} --new-tokens {new_tokens} --batch {batch}"
        f" --dtype {dtype} --device {device}"
    )
    if as_json:
        print_json({"command": command, **asdict(report)})
    else:
        print_decode(report, command)


def print_decode(report: "DecodeReport", command: str) -> None:
    """A line a row, and below what a reader must know."""
    print_table(_title(report), COLUMNS, [_cells(row) for row in report.rows], names=2)
    for row in report.rows:
        if row.note:
            print(f"{row.name}: {row.note}.")
    if report.dense_bytes and report.dense_limit_tokens_per_second:
        read = gigabytes_per_second(report.machine.read_gigabytes_per_second)
        print(
            f"Dense limit: {report.dense_limit_tokens_per_second:.1f} tokens/s, the weights of a token "
            f"({megabytes(report.dense_bytes)}) at {read} GB/s read."
        )
    note_on_cpu(report.machine.device)
    print(f"Medians of {report.runs} runs. Measured {report.machine.date} with\n{command}")


def _title(report: "DecodeReport") -> str:
    task = report.task
    texts = f"{task.batch} text{'s' * (task.batch > 1)}"
    dtypes = dict.fromkeys(row.measured.dtype for row in report.rows if row.measured)
    return (
        f"{report.machine.title}, transformers {report.transformers}\n"
        f"{', '.join([report.model, *dtypes])}, {texts}, context {task.context}, {task.new_tokens} new tokens"
    )


def _cells(row: "Row") -> list[str]:
    share = NOTHING if row.sparsity is None else f"{row.sparsity:.1%}"
    if row.measured is None:
        return [row.name, share, *[NOTHING] * (len(COLUMNS) - 2)]
    return [row.name, share, *_figures(row.measured, row.speedup)]


def _figures(measured: "Measured", speedup: float | None) -> list[str]:
    parts, peak = measured.parts, measured.peak_memory_bytes
    return [
        f"{measured.tokens_per_second:.1f}",
        f"{measured.total_tokens_per_second:.1f}",
        NOTHING if speedup is None else f"{speedup:.2f}x",
        f"{measured.milliseconds_per_token:.3f}",
        *([NOTHING] * 3 if parts is None else [f"{ms:.3f}" for ms in (parts.linears, parts.attention, parts.rest)]),
        NOTHING if peak is None else megabytes(peak),
        f"{measured.first_token_seconds * 1e3:.0f} ms",
        measured.engine,
    ]
