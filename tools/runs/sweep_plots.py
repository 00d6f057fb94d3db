"""Plot the best validation accuracy and the training time of a sweep's runs, over settings or by variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from configs.schema import settings_by_key
from tools.common.tables import Row
from tools.runs.records import differing_keys, format_setting
from tools.runs.sweep_points import Point
from train.reporting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MEASURES = {"best_val_top1": "best validation top-1 accuracy", "training_time_s": "training time in s"}
LOG_FACTOR = 10  # values that span at least this factor are drawn on a log axis
MAX_LINES = 8  # in the plot over a setting's values
MAX_BARS = 40  # in the plot by variant
Values = dict[str, list[float]]  # of each run, by setting
Results = list[list[float]]  # of each run, by measure; nan if unknown, which leaves a gap


def plot_values(points: Sequence[Point], rows: Sequence[Row], title: str) -> Figure | None:
    """Plot the best validation accuracy and the training time of finished runs.

    The kind of plot depends on the settings that differ between runs or, with variants, within variants:
        two numeric settings and no others, without variants: a heat map or a scatter plot
        none or only the seed, with variants: one bar per variant
        one numeric setting: a line plot, with one line per combination of variant and other settings
        other settings, with variants: one bar per run

    Args:
        points: Points whose runs have finished.
        rows: Rows with the results of `points`. Values that are None are left out.
        title: Title of the figure.

    Returns:
        The figure, or None if there is nothing to compare or too much for one plot.
    """
    settings = [settings_by_key(point.config) for point in points]
    names = list(dict.fromkeys(point.variant for point in points))
    # only the settings that differ within a variant
    groups = [[point.config for point in points if point.variant == name] for name in names]
    keys = list(dict.fromkeys(key for group in groups for key in differing_keys(group)))
    numeric = {key: values for key in keys if len(values := numbers_of(settings, key)) == len(settings)}
    results = [[math.nan if row[quantity] is None else row[quantity] for row in rows] for quantity in MEASURES]
    if names == [""] and len(numeric) == 2 and len(keys) == 2:
        return _map_plot(numeric, results, title)
    if len(numeric) == 1 and not (names != [""] and keys == ["seed"]):
        others = [key for key in keys if key not in numeric]
        labels = [
            ", ".join([*filter(None, [point.variant]), *(f"{other}={format_setting(one[other])}" for other in others)])
            for point, one in zip(points, settings, strict=True)
        ]
        return _line_plot(numeric, labels, results, title)
    if names in ([], [""]):
        return None
    return _bar_plot([point.variant if keys in ([], ["seed"]) else point.label for point in points], results, title)


def numbers_of(settings: Sequence[Mapping[str, object]], key: str) -> list[float]:
    """Return the values of a setting that are numbers."""
    return [value for one in settings if isinstance(value := one[key], int | float) and not isinstance(value, bool)]


def _line_plot(numeric: Values, labels: Sequence[str], results: Results, title: str) -> Figure | None:
    """Plot accuracy and training time over the values of a setting, with one line per label.

    If there are more than MAX_LINES labels, the result is None.
    """
    ((key, values),) = numeric.items()
    lines = _numbers_by_label(labels)
    if len(lines) > MAX_LINES:
        return None
    named = list(filter(None, lines))
    figure, axes = figures.new_figure(1, 2, size=(10, 4 + 0.22 * len(named)), title=title)
    for axis, measured, label in zip(axes, results, MEASURES.values(), strict=True):
        for numbers in lines.values():
            ordered = sorted(numbers, key=lambda number: values[number])
            axis.plot([values[number] for number in ordered], [measured[number] for number in ordered], marker="o")
        _set_value_axis(axis, values)
        figures.style_axes(axis, key, label)
    axes[1].set_ylim(0, 1.08 * _highest(results[1]))
    if named:
        figures.add_legend(figure, axes[0].lines, list(lines))
    return figure


def _bar_plot(labels: Sequence[str], results: Results, title: str) -> Figure | None:
    """Plot a bar per label, in the given order, with the median of the runs with this label.

    If a label has several runs, an error bar shows their range. If there are more than MAX_BARS labels, the result is
    None.
    """
    bars = _numbers_by_label(labels)
    if len(bars) > MAX_BARS:
        return None
    figure, axes = figures.new_figure(1, 2, size=(12, 1.6 + 0.4 * len(bars)), title=title)
    for axis, measured, label, digits in zip(axes, results, MEASURES.values(), (".4f", ".4g"), strict=True):
        for place, numbers in enumerate(bars.values()):
            values = [measured[number] for number in numbers if not math.isnan(measured[number])]
            if not values:
                continue
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]] if len(values) > 1 else None
            axis.barh([place], [middle], height=0.65, xerr=spread, capsize=3, color=f"C{place % 10}")
            axis.text(max(values), place, f"  {middle:{digits}}", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), list(bars), fontsize=9, parse_math=False)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, 1.18 * _highest(measured))
        what = label if len(bars) == len(labels) else f"{label}, median and range of the runs"
        figures.style_axes(axis, what, grid="x")
        axis.set_axisbelow(True)
    axes[1].tick_params(labelleft=False)
    return figure


def _numbers_by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the runs with each label, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(label, []).append(number)
    return groups


def _highest(measured: Sequence[float]) -> float:
    """Return the largest known result of a measure. If that is 0 or no result is known, return 1."""
    return max((value for value in measured if not math.isnan(value)), default=0.0) or 1.0


def _map_plot(numeric: Values, results: Results, title: str) -> Figure:
    """Plot accuracy and training time over two settings.

    The plot is a heat map if the runs cover at least half of all combinations of values, otherwise a scatter plot.
    """
    (x_key, xs), (y_key, ys) = numeric.items()
    columns, rows = len(set(xs)), len(set(ys))
    is_grid = columns * rows <= 2 * len(xs)
    size = (max(11.0, 1.8 * columns + 4), max(4.5, 0.5 * rows + 2)) if is_grid else (11.0, 4.5)
    figure, axes = figures.new_figure(1, 2, size=size, title=title)
    styles = (("viridis", ".4f"), ("Greys", ".3g"))
    for axis, measured, label, (colors, digits) in zip(axes, results, MEASURES.values(), styles, strict=True):
        shown: ScalarMappable
        if is_grid:
            shown = _draw_heat_map(axis, xs, ys, measured, colors, digits)
        else:
            shown = axis.scatter(xs, ys, s=70, c=measured, edgecolors="0.3", linewidths=0.5, cmap=colors)
            _set_value_axis(axis, xs)
            if _spans_orders(ys):
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        figure.colorbar(shown, ax=axis, label=label)
        axis.set_xlabel(x_key)
        axis.set_ylabel(y_key)
    return figure


def _draw_heat_map(
    axis: Axes, xs: Sequence[float], ys: Sequence[float], measured: Sequence[float], colors: str, digits: str
) -> AxesImage:
    """Draw a cell for each combination of values, with its result as text. Combinations without a run are empty."""
    horizontal, vertical = sorted(set(xs)), sorted(set(ys))
    cells = np.full((len(vertical), len(horizontal)), np.nan)
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    for x, y, value in zip(xs, ys, measured, strict=True):
        column, row = horizontal.index(x), vertical.index(y)
        cells[row, column] = value
        if not math.isnan(value):
            axis.text(column, row, f"{value:{digits}}", ha="center", va="center", fontsize=8, bbox=box)
    axis.set_xticks(range(len(horizontal)), map(format_setting, horizontal))
    axis.set_yticks(range(len(vertical)), map(format_setting, vertical))
    return axis.imshow(cells, origin="lower", aspect="auto", cmap=colors)


def _set_value_axis(axis: Axes, values: Sequence[float]) -> None:
    """Set up the x-axis: a tick at each distinct value if there are at most 8, and a log scale for a wide range.

    A range is wide if all values are positive and they span at least a factor of LOG_FACTOR.
    """
    tried = sorted(set(values))
    if _spans_orders(values):
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
    if len(tried) <= 8:
        axis.set_xticks(tried, map(format_setting, tried))


def _spans_orders(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= LOG_FACTOR * min(values)
