"""`macko bench spmv`."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macko_llm.cli.console import gigabytes_per_second, megabytes, plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import (
    DeviceOption,
    JsonOption,
    LayoutOption,
    expanded_path,
    parse_list,
    parse_sparsity,
    value_dtypes,
)
from macko_llm.cli.reports import draw, note_on_cpu
from macko_llm.cli.surroundings import with_threads
from macko_llm.defaults import LAYOUT, MAX_ENTRIES
from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from macko_llm.benchmarks.spmv import Case, Means, Method, SpmvReport

COLUMNS = (
    "rows x cols",
    "sparsity",
    "tokens",
    "layout",
    "dense us",
    "CSR us",
    "macko us",
    "GB/s",
    "of read",
    "vs dense",
    "error dense",
    "error macko",
    "dense",
    "packed",
)
CPU_COLUMNS = (
    *COLUMNS[:3],
    "values",
    "fp32 us",
    "bf16 us",
    "fp16 us",
    "CSR us",
    "SciPy us",
    "packed us",
    "vs fastest",
    "vs same",
    "GB/s",
    "of read",
    "error dense",
    "error packed",
    "packed",
)
NOTHING = "-"
_DENSE_COLUMNS = ("float32", "bfloat16", "float16")
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}


@plain_errors
@with_threads
def spmv(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="ROWSxCOLS,...", help="[default: the shapes of Llama-2-7B]")
    ] = None,
    sparsity: Annotated[
        list[str] | None, typer.Option(metavar="SHARE,...", help="Share of zeros. [default: 0.3,0.4,...,0.9]")
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="COUNT,...", help="Rows of the input. [default: 1,2,4,8,16,32 on a GPU, 1 on a CPU]"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DTYPE,...", autocompletion=value_dtypes, help="float16, bfloat16 or both. [default: float16]"
        ),
    ] = None,
    device: DeviceOption = "auto",
    layout: LayoutOption = LAYOUT,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", parser=expanded_path, help="Draw the speeds too (needs matplotlib)."),
    ] = None,
) -> None:
    """Time single layers: dense, sparse CSR and packed, with the bandwidth reached and the error of each.

    The weights are random and go round in more copies than the caches hold. On a CPU dense is timed in float32, bfloat16 and
    float16, and SciPy's CSR too, where it is installed. Lists are separated by commas; an option may also be given several
    times.

    Examples:
        macko bench spmv

        macko bench spmv --sparsity 0.5 --plot speed-over-tokens.png

        macko bench spmv --shape 4096x4096 --tokens 4 --layout tiled

        macko bench spmv --device cpu --shape 4096x4096 --dtype float16,bfloat16
    """
    from macko_llm import refusals
    from macko_llm.benchmarks import plots

    shapes = parse_list(shape, parse_shape)
    sparsities = parse_list(sparsity, parse_sparsity)
    counts = parse_list(tokens, parse_tokens)
    dtypes = parse_list(dtype, str) or ["float16"]
    for name in dtypes:
        refusals.check_benchmark_dtype(name)
    refusals.check_device(device)
    refusals.check_layout(layout)
    if plot is not None and len(dtypes) > 1:
        raise UsageError("A plot shows one dtype; give --plot a single --dtype.")
    if plot is not None:
        plots.check_plot(plot)

    from macko_llm import models
    from macko_llm.benchmarks import spmv as benchmark  # takes seconds, which a wrong call need not wait for

    shapes = shapes or list(benchmark.LLAMA_2_7B)
    sparsities = sparsities or list(benchmark.SPARSITIES)
    counts = counts or list(benchmark.TOKENS[models.resolve_device(device).type])
    with progress_bars() as progress:
        report = benchmark.measure_spmv(
            shapes, sparsities, counts, layout=layout, dtypes=dtypes, device=device, progress=progress
        )
    command = command_line(shapes, sparsities, counts, dtypes, device, layout)
    if as_json:
        print_json({"command": command, **asdict(report)})
    else:
        print_spmv(report, command)
    if plot is not None:
        draw(plots.plot_spmv, report, plot)


def parse_shape(text: str) -> tuple[int, int]:
    """(rows, cols) of "4096x11008".

    Raises:
        UsageError: it is no shape, or one that the format cannot hold.
    """
    match = re.fullmatch(r"([1-9]\d*) *[xX] *([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is not a shape; write rows x columns as in --shape 4096x11008.")
    rows, cols = int(match[1]), int(match[2])
    if rows * cols > MAX_ENTRIES:
        raise UsageError(f"A weight of {rows} x {cols} has more than {MAX_ENTRIES} elements; use a smaller --shape.")
    return rows, cols


def parse_tokens(text: str) -> int:
    """A number of tokens.

    Raises:
        UsageError: it is no whole number above 0.
    """
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise UsageError(f"{text!r} is not a number of tokens; write whole numbers above 0 as in --tokens 1,2,4.")
    return int(text)


def command_line(
    shapes: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    layout: str,
) -> str:
    """The command that measures these cases, with every default written out."""
    return (
        f"macko bench spmv --shape {','.join(f'{rows}x{cols}' for rows, cols in shapes)}"
        f" --sparsity {','.join(map(str, sparsities))} --tokens {','.join(map(str, tokens))}"
        f" --dtype {','.join(dtypes)} --device {device} --layout {layout}"
    )


def print_spmv(report: "SpmvReport", command: str) -> None:
    """A line a case, and below what a reader must know."""
    on_cpu = report.conditions.device == "cpu"
    if on_cpu:
        rows = [*map(_cpu_row, report.cases), *map(_means_row, report.means)]
        print_table(_title(report), CPU_COLUMNS, rows, names=4)
    else:
        print_table(_title(report), COLUMNS, [_row(case) for case in report.cases], names=4)
    for note in dict.fromkeys(note for case in report.cases for note in case.notes):
        print(f"* {note}")
    if on_cpu:
        if all(case.scipy is None for case in report.cases):
            print("* SciPy is not installed, so its CSR is not timed; `pip install scipy` adds it.")
        print("SciPy multiplies in float32, on one thread. Means are geometric.")
    note_on_cpu(report.conditions.device)
    print(f"Errors are relative to float64. Measured {report.conditions.date} with\n{command}")


def _title(report: "SpmvReport") -> str:
    conditions = report.conditions
    speeds = [case.read_gigabytes_per_second for case in report.cases]
    read = " to ".join(dict.fromkeys(gigabytes_per_second(speed) for speed in (min(speeds), max(speeds))))
    return f"{conditions.title}, {conditions.dtype}, {read} GB/s read"


def _row(case: "Case") -> list[str]:
    return [
        f"{case.rows} x {case.cols}",
        f"{case.sparsity:.1%}",
        str(case.tokens),
        case.layout,
        _microseconds(case.dense),
        NOTHING if case.csr is None else _microseconds(case.csr),
        _microseconds(case.macko),
        gigabytes_per_second(case.gigabytes_per_second),
        f"{case.bandwidth_share:.0%}",
        f"{case.speedup:.2f}x",
        f"{case.dense.relative_error:.1e}",
        f"{case.macko.relative_error:.1e}",
        megabytes(case.dense.nbytes),
        megabytes(case.macko.nbytes),
    ]


def _cpu_row(case: "Case") -> list[str]:
    dense = {method.dtype: method for method in (case.dense, *case.dense_others)}
    methods = [*(dense[dtype] for dtype in _DENSE_COLUMNS), case.csr, case.scipy, case.macko]
    return [
        f"{case.rows} x {case.cols}",
        f"{case.sparsity:.1%}",
        str(case.tokens),
        _SHORT[case.dtype],
        *(NOTHING if method is None else _microseconds(method) for method in methods),
        f"{case.speedup_over_fastest:.2f}x",
        f"{case.speedup:.2f}x",
        gigabytes_per_second(case.gigabytes_per_second),
        f"{case.bandwidth_share:.0%}",
        f"{case.dense.relative_error:.1e}",
        f"{case.macko.relative_error:.1e}",
        megabytes(case.macko.nbytes),
    ]


def _means_row(means: "Means") -> list[str]:
    figures = {
        "values": _SHORT[means.dtype],
        "vs fastest": f"{means.speedup_over_fastest:.2f}x",
        "vs same": f"{means.speedup:.2f}x",
        "of read": f"{means.bandwidth_share:.0%}",
    }
    return ["geometric mean", *(figures.get(column, "") for column in CPU_COLUMNS[1:])]


def _microseconds(method: "Method") -> str:
    return f"{'*' if method.timing.graph_failure else ''}{method.microseconds:.1f}"
