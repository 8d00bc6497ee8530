"""What more than one command prints."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from macko_llm.cli.console import megabytes, print_error, print_table

if TYPE_CHECKING:
    from macko_llm.benchmarks.quality import QualityReport
    from macko_llm.pack_report import PackReport

Report = TypeVar("Report")


def draw(plot: Callable[[Report, Path], None], report: Report, path: Path) -> None:
    """Write the plot of a report that has been printed: where that fails, stdout with its one JSON object is left as it is."""
    try:
        plot(report, path)
    except OSError as error:
        print_error(
            f"The plot {path} cannot be written ({error.strerror or error}); free some space, or choose another place."
        )
        raise typer.Exit(1) from None


def print_quality(report: "QualityReport") -> None:
    """The table of `macko bench quality` and of the demo."""
    rows = [
        [
            row.name,
            f"{row.sparsity:.1%}",
            megabytes(row.bytes_on_disk),
            megabytes(row.bytes_in_memory),
            f"{row.perplexity:.2f}",
            f"{row.tokens_per_second:.0f}",
        ]
        for row in report.measurements
    ]
    windows = "1 window" if report.windows == 1 else f"{report.windows} windows"
    title = (
        f"{windows} of {report.seqlen} tokens, {report.recipe.nsamples} x {report.recipe.seqlen} "
        f"calibration tokens, {report.recipe.dtype}, {report.device}"
    )
    print_table(title, ["", "sparsity", "on disk", "in memory", "perplexity", "tokens/s"], rows)
    note_on_cpu(report.device)


def note_on_cpu(device: str) -> None:
    """Say of figures from a CPU which layers are faster there."""
    if device == "cpu":
        print(
            "On a CPU packed layers are faster than dense ones where their weights outgrow its caches; "
            "in a model of a few MB, what a call costs counts for more than what it reads."
        )


def pack_report_json(report: "PackReport") -> dict[str, object]:
    """What --json says of a packed checkpoint."""
    return {**asdict(report), "sparsity": report.sparsity, "kept_dense": report.kept_dense}


def print_layers(report: "PackReport") -> None:
    """A table of the layers."""
    rows = [
        [
            name,
            f"{layer.rows} x {layer.cols}",
            f"{layer.sparsity:.1%}",
            megabytes(layer.bytes_dense),
            megabytes(layer.bytes_packed) if layer.packed else "dense",
        ]
        for name, layer in report.layers.items()
    ]
    print_table("", ["layer", "shape", "sparsity", "dense", "packed"], rows)


def print_kinds(report: "PackReport") -> None:
    """A table of the layers by what they are in a block, of all other tensors, and of the whole."""
    kinds = report.kinds
    rows = [
        [name, str(kind.layers), *_sizes(kind.bytes_dense, kind.bytes_packed), f"{kind.sparsity:.1%}"]
        for name, kind in kinds.items()
    ]
    others = [
        whole - sum(getattr(kind, size) for kind in kinds.values())
        for size, whole in (("bytes_dense", report.bytes_dense), ("bytes_packed", report.bytes_packed))
    ]
    rows.append(["all other tensors", "", *_sizes(*others), ""])
    whole = _sizes(report.bytes_dense, report.bytes_packed)
    rows.append(["total", str(len(report.layers)), *whole, f"{report.sparsity:.1%}"])
    print_table("", ["kind", "layers", "dense", "packed", "smaller", "sparsity"], rows)


def _sizes(dense: int, packed: int) -> list[str]:
    return [megabytes(dense), megabytes(packed), f"{dense / max(packed, 1):.2f}x"]
