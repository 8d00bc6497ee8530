"""Plots of what was measured; matplotlib is an extra, imported only here and only when a plot is asked for."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from macko_llm.benchmarks.spmv import Case, SpmvReport

PANELS_A_ROW = 3
GREY = "0.55"


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before the time for measuring is spent.

    Raises:
        UsageError: no matplotlib, not a .png file, or no such folder.
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UsageError("A plot needs matplotlib; install it with `pip install 'macko-llm[plot]'`.") from error
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UsageError(f"The plot {path} is not a PNG file; give a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.parent} for the plot; make it, or choose another.")


def plot_spmv(report: SpmvReport, path: Path) -> None:
    """Write a PNG: how many times as fast as dense, over the sparsity (or the tokens, where they alone vary).

    One panel a shape, one line a number of tokens. Each panel shows where CSR stands at the fewest tokens, and, where there is
    one line alone, what reading the packed bytes at the measured bandwidth would give.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((case.rows, case.cols) for case in report.cases))
    columns = min(len(shapes), PANELS_A_ROW)
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(max(4.4 * columns, 6.4), 3.6 * lines + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    conditions = report.conditions
    over_tokens = len({case.sparsity for case in report.cases}) == 1 and len({case.tokens for case in report.cases}) > 1
    for panel, (rows, cols) in zip(panels.flat, shapes, strict=False):
        cases = [case for case in report.cases if (case.rows, case.cols) == (rows, cols)]
        if over_tokens:
            _draw_over_tokens(panel, cases)
        else:
            _draw_over_sparsity(panel, cases)
        panel.axhline(1, color="black", linewidth=1, label="dense")
        panel.set_title(f"{rows} x {cols}", fontsize=10)
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    # The panels share the axis. What was measured fills it; limits far out of reach may leave it.
    fastest = max(1.0, *(speedup for case in report.cases for speedup in (case.speedup, *_csr_speedups([case]))))
    panels.flat[0].set_ylim(0, min(panels.flat[0].get_ylim()[1], 2 * fastest))
    for panel in panels.flat[len(shapes) :]:
        panel.set_visible(False)
    fixed = f", sparsity {report.cases[0].sparsity:.0%}" if over_tokens else ""
    figure.suptitle(f"{conditions.device}, {conditions.dtype}{fixed}: speed against dense", fontsize=12)
    figure.supylabel("times as fast as dense")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 2 + 2 * columns), frameon=False, fontsize=9
    )
    figure.savefig(path)


def _draw_over_sparsity(panel: Axes, cases: Sequence[Case]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    groups = [
        list(group) for _, group in itertools.groupby(sorted(cases, key=_by_tokens), key=lambda case: case.tokens)
    ]
    for number, group in enumerate(groups):
        points = [case.sparsity for case in group], [case.speedup for case in group]
        color = colormaps["viridis"](0.85 * number / (len(groups) - 1)) if len(groups) > 1 else "C0"
        panel.plot(*points, marker="o", color=color, label=f"macko, {_count(group[0].tokens)}")
    fewest = groups[0]
    sparsities = [case.sparsity for case in fewest]
    _draw_csr(panel, sparsities, fewest, f"CSR, {_count(fewest[0].tokens)}")
    if len(groups) == 1:
        _draw_limit(panel, sparsities, fewest)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xticks(sorted({case.sparsity for case in cases}))
    panel.set_xlabel("sparsity", fontsize=9)


def _draw_over_tokens(panel: Axes, cases: Sequence[Case]) -> None:
    from matplotlib.ticker import NullLocator

    cases = sorted(cases, key=_by_tokens)
    counts = [case.tokens for case in cases]
    panel.plot(counts, [case.speedup for case in cases], marker="o", color="C0", label="macko")
    _draw_csr(panel, counts, cases, "CSR")
    _draw_limit(panel, counts, cases)
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens", fontsize=9)


def _draw_csr(panel: Axes, positions: Sequence[float], cases: Sequence[Case], label: str) -> None:
    speedups = _csr_speedups(cases)
    if speedups:
        panel.plot(positions, speedups, marker=".", linestyle="--", color=GREY, label=label)


def _draw_limit(panel: Axes, positions: Sequence[float], cases: Sequence[Case]) -> None:
    limits = [case.dense.microseconds * case.read_gigabytes_per_second * 1e3 / case.bytes_moved for case in cases]
    panel.plot(positions, limits, marker="_", linestyle=":", color="C0", label="macko's bytes at the read bandwidth")


def _count(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens > 1)}"


def _by_tokens(case: Case) -> tuple[int, float]:
    return case.tokens, case.sparsity


def _csr_speedups(cases: Sequence[Case]) -> list[float]:
    """Of all cases, or of none: where torch has no CSR product it has none for any shape."""
    return [case.dense.microseconds / case.csr.microseconds for case in cases if case.csr]
