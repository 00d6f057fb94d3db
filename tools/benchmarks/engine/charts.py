"""Draw a bar chart of a benchmark run, with one panel per table.

Bars show the median images/s, and error bars show the slowest and fastest round. This project's rows have bold labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.reporting.figures import save

OURS, PEER, BOUND = "#c1440e", "#8a9ba8", "#d9dee2"
LOG_SCALE_RATIO = 20.0  # minimum ratio of largest to smallest rate for a logarithmic axis
COLUMNS = 2


def draw_chart(run: dict[str, Any], path: Path) -> Path | None:
    """Write the chart as a PNG file and return its path, or None if the run has no rates."""
    from matplotlib.figure import Figure

    groups = [(group, [row for row in group["rows"] if "lowest" in row]) for group in run["groups"]]
    groups = [(group, rows) for group, rows in groups if rows]
    if not groups:
        return None
    lines = [groups[start : start + COLUMNS] for start in range(0, len(groups), COLUMNS)]
    heights = [max(len(rows) for _, rows in line) + 2.2 for line in lines]
    figure = Figure(figsize=(13, 0.34 * sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(lines), COLUMNS, height_ratios=heights)
    for number, line in enumerate(lines):
        for column, (group, rows) in enumerate(line):
            axes = figure.add_subplot(grid[number, column] if len(line) > 1 or len(lines) > 1 else grid[number, :])
            _panel(axes, group, sorted(rows, key=lambda row: row["images_per_s"]))
    machine = run["environment"]
    where = f"{machine['device']}, {machine['cores']} cores, {machine['date']}"
    figure.suptitle(f"{where}: images/s, median and range of the rounds", parse_math=False)
    save(figure, path)
    return path


def _panel(axes: Any, group: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rates = [row["images_per_s"] for row in rows]
    is_log = max(rates) / min(rates) >= LOG_SCALE_RATIO
    colors = [OURS if row["ours"] else BOUND if row["name"].startswith("bound") else PEER for row in rows]
    ranges = [
        [rate - row["lowest"] for rate, row in zip(rates, rows, strict=True)],
        [row["highest"] - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    axes.barh(
        range(len(rows)),
        rates,
        color=colors,
        xerr=ranges,
        error_kw={"ecolor": "#333333", "elinewidth": 0.8},
        height=0.72,
    )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9, parse_math=False)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    for position, row in enumerate(rows):
        text = f" {row['images_per_s']:,.0f}" + (f"  (ours: {row['ratio']:.3g}x)" if "ratio" in row else "")
        axes.text(row["highest"], position, text, va="center", fontsize=8)
    if is_log:
        low, high = 10 ** _power_of_ten(min(rates)), max(row["highest"] for row in rows)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.45)  # room for the numbers
    else:
        axes.set_xlim(0, max(row["highest"] for row in rows) * 1.45)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("images/s" + (", logarithmic" if is_log else ""), fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(group["title"], fontsize=10, loc="left", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _power_of_ten(value: float) -> int:
    """Return the largest integer n with 10**n <= value. `value` must be positive."""
    power = 0
    while 10.0 ** (power + 1) <= value:
        power += 1
    while 10.0**power > value:
        power -= 1
    return power
