"""Draw a bar chart of a benchmark run, with one panel per table.

Bars show the median images/s, and error bars show the slowest and fastest round. This project's rows have bold labels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.run_file import Run
from train.reporting.figures import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PEER, BOUND = "#c1440e", "#8a9ba8", "#d9dee2"
LOG_SCALE_RATIO = 20.0  # minimum ratio of largest to smallest rate for a logarithmic axis
COLUMNS = 2


def draw_chart(run: Run, path: Path) -> Path | None:
    """Write the chart as a PNG file and return its path, or None if the run has no rates."""
    from matplotlib.figure import Figure

    panels = [(group["title"], [row for row in group["rows"] if "lowest" in row]) for group in run.groups]
    panels = [(title, rows) for title, rows in panels if rows]
    if not panels:
        return None
    counts = [len(rows) for _, rows in panels]
    heights = [max(counts[start : start + COLUMNS]) + 2.2 for start in range(0, len(counts), COLUMNS)]
    figure = Figure(figsize=(13, 0.34 * sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for place, (title, rows) in enumerate(panels):
        axes = figure.add_subplot(grid[place] if len(panels) > 1 else grid[:])
        _panel(axes, title, sorted(rows, key=lambda row: row["images_per_s"]))
    machine = run.environment
    where = f"{machine['device']}, {machine['cores']} cores, {machine['date']}"
    figure.suptitle(f"{where}: images/s, median and range of the rounds", parse_math=False)
    save(figure, path)
    return path


def _panel(axes: Axes, title: str, rows: list[Row]) -> None:
    rates = [row["images_per_s"] for row in rows]
    is_log = max(rates) / min(rates) >= LOG_SCALE_RATIO
    colors = [OURS if row["ours"] else BOUND if row["name"].startswith("bound") else PEER for row in rows]
    ranges = np.abs([[row["lowest"], row["highest"]] for row in rows] - np.array(rates)[:, None]).T
    error_bars = {"ecolor": "#333333", "elinewidth": 0.8}
    axes.barh(range(len(rows)), rates, 0.72, color=colors, xerr=ranges, error_kw=error_bars)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9, parse_math=False)
    for position, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        label.set_fontweight("bold" if row["ours"] else "normal")
        text = f" {row['images_per_s']:,.0f}" + (f"  (ours: {row['ratio']:.3g}x)" if "ratio" in row else "")
        axes.text(row["highest"], position, text, va="center", fontsize=8)
    if is_log:
        low, high = 10.0 ** math.floor(math.log10(min(rates))), max(row["highest"] for row in rows)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.45)  # room for the numbers
    else:
        axes.set_xlim(0, max(row["highest"] for row in rows) * 1.45)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("images/s" + (", logarithmic" if is_log else ""), fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
