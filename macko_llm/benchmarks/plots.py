"""Plots of what was measured; matplotlib is an extra, imported only here and only when a plot is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from macko_llm.benchmarks.compare import CompareReport
    from macko_llm.benchmarks.spmv import Case, SpmvReport

PANELS_A_ROW = 3
GREY = "0.55"
NAME_INCHES = 0.08
"""Of a character of a model's name, about."""


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before the time for measuring is spent.

    Raises:
        UsageError: no matplotlib, not a .png file, no such folder, or one where it cannot be written.
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UsageError("A plot needs matplotlib; install it with `pip install matplotlib`.") from error
    try:
        if path.suffix.lower() != ".png" or path.is_dir():
            raise UsageError(f"The plot {path} is not a PNG file; give a name that ends in .png.")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"There is no folder {path.parent} for the plot; make it, or choose another.")
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"The plot {path} cannot be written ({error.strerror}); choose another place.") from error


def plot_spmv(report: SpmvReport, path: Path) -> None:
    """Write a PNG: how many times as fast as dense, over the tokens where they vary, else over the sparsity.

    Over tokens there is a panel a sparsity, and in it a line a shape. Over the sparsity there is a panel a shape, which shows
    where CSR stands, and what reading the packed bytes at the measured bandwidth would give.
    """
    from matplotlib.figure import Figure

    over_tokens = len({case.tokens for case in report.cases}) > 1
    groups: dict[str, list[Case]] = {}
    for case in report.cases:
        title = f"{case.sparsity:.0%} sparse" if over_tokens else _shape(case)
        groups.setdefault(title, []).append(case)
    columns = min(len(groups), PANELS_A_ROW)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(4.4 * columns, 6.4), 3.6 * lines + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel, (title, cases) in zip(panels.flat, groups.items(), strict=False):
        (_draw_over_tokens if over_tokens else _draw_over_sparsity)(panel, cases)
        panel.axhline(1, color="black", linewidth=0.8, label="dense")
        _dress(panel, title)
        panel.grid(alpha=0.25)
    # The panels share the axis. What was measured fills it; limits far out of reach may leave it.
    csr = [] if over_tokens else _csr_speedups(report.cases)
    fastest = max(1.0, *(case.speedup for case in report.cases), *csr)
    panels.flat[0].set_ylim(0, min(panels.flat[0].get_ylim()[1], 2 * fastest))
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    conditions = report.conditions
    fixed = "" if over_tokens else f", {_count(report.cases[0].tokens)}"
    figure.suptitle(f"{conditions.device}, {conditions.dtype}{fixed}: speed against dense", fontsize=12)
    figure.supylabel("times as fast as dense")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 2 + 2 * columns), frameon=False, fontsize=9
    )
    figure.savefig(path)


def plot_compare(report: CompareReport, path: Path) -> None:
    """Write a PNG: a panel each for size, perplexity and speed, and in it a bar a model with its ratio to the first."""
    from matplotlib.figure import Figure

    largest = max(max(one.bytes_on_disk, one.bytes_in_memory) for one in report.models)
    size, unit = ("GB", 1e-9) if largest >= 1e9 else ("MB", 1e-6)
    titles = {
        "bytes_on_disk": (f"{size} on disk", unit),
        "bytes_in_memory": (f"{size} in memory", unit),
        "perplexity": ("perplexity", 1.0),
        "tokens_per_second": ("tokens/s", 1.0),
    }
    count, longest = len(report.models), max(len(one.model) for one in report.models)
    width = 3 * len(titles) + NAME_INCHES * longest  # so that long names leave the bars their room
    figure = Figure(figsize=(width, 0.5 * count + 1.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for panel, (metric, (title, scale)) in zip(panels, titles.items(), strict=True):
        bars = panel.barh(range(count), [getattr(one, metric) * scale for one in report.models])
        ratios = [one.ratios[metric] for one in report.models]
        panel.bar_label(bars, ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=8)
        _dress(panel, title)
        panel.margins(x=0.25)
    panels[0].set_yticks(range(count), [one.model for one in report.models])
    panels[0].invert_yaxis()  # the first stands at the top
    figure.suptitle(f"{report.device}: perplexity on {report.dataset}, windows of {report.seqlen} tokens", fontsize=11)
    figure.savefig(path)


def _dress(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_over_sparsity(panel: Axes, cases: Sequence[Case]) -> None:
    from matplotlib.ticker import PercentFormatter

    cases = sorted(cases, key=lambda case: case.sparsity)
    sparsities = [case.sparsity for case in cases]
    panel.plot(sparsities, [case.speedup for case in cases], marker="o", color="C0", label="macko")
    _draw_csr(panel, sparsities, cases, "CSR")
    _draw_limit(panel, sparsities, cases)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xticks(sparsities)
    panel.set_xlabel("sparsity", fontsize=9)


def _draw_over_tokens(panel: Axes, cases: Sequence[Case]) -> None:
    from matplotlib.ticker import NullLocator

    for shape in dict.fromkeys(map(_shape, cases)):
        own = sorted((case for case in cases if _shape(case) == shape), key=lambda case: case.tokens)
        panel.plot([case.tokens for case in own], [case.speedup for case in own], marker="o", label=shape)
    counts = sorted({case.tokens for case in cases})
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


def _shape(case: Case) -> str:
    return f"{case.rows} x {case.cols}"


def _csr_speedups(cases: Sequence[Case]) -> list[float]:
    """Of all cases, or of none: where torch has no CSR product it has none for any shape."""
    return [case.dense.microseconds / case.csr.microseconds for case in cases if case.csr]
