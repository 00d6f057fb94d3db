"""Plot the best validation accuracy and the training time of a sweep's runs, over settings or by variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.schema import settings_by_key
from tools.common.tables import Row
from tools.runs.records import differing_keys, format_setting
from tools.runs.sweep_points import Point
from train.reporting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

MEASURES = (("best_val_top1", "best validation top-1 accuracy"), ("training_time_s", "training time in s"))
LOG_FACTOR = 10  # values that span at least this factor are drawn on a log axis
MAX_LINES = 8  # in the plot over a setting's values
MAX_BARS = 40  # in the plot by variant


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
    numeric = [key for key in keys if all(type(one[key]) in (int, float) for one in settings)]
    if names == [""] and len(numeric) == 2 and len(keys) == 2:
        return _map_plot(numeric, settings, rows, title)
    if len(numeric) == 1 and not (names != [""] and keys == ["seed"]):
        others = [key for key in keys if key not in numeric]
        labels = [
            ", ".join([*filter(None, [point.variant]), *(f"{other}={format_setting(one[other])}" for other in others)])
            for point, one in zip(points, settings, strict=True)
        ]
        values = [value for one in settings if isinstance(value := one[numeric[0]], int | float)]
        return _line_plot(numeric[0], values, labels, rows, title)
    if names in ([], [""]):
        return None
    return _bar_plot([point.variant if keys in ([], ["seed"]) else point.label for point in points], rows, title)


def _line_plot(
    key: str, values: Sequence[float], labels: Sequence[str], rows: Sequence[Row], title: str
) -> Figure | None:
    """Plot accuracy and training time over the values of a setting, with one line per label.

    If there are more than MAX_LINES labels, the result is None.
    """
    lines: dict[str, list[tuple[float, Row]]] = {}
    for label, value, row in zip(labels, values, rows, strict=True):
        lines.setdefault(label, []).append((value, row))
    if len(lines) > MAX_LINES:
        return None
    named = [label for label in lines if label]
    figure, axes = figures.new_figure(1, 2, size=(10, 4 + 0.22 * len(named)), title=title)
    for axis, (quantity, label) in zip(axes, MEASURES, strict=True):
        for points in lines.values():
            points.sort(key=lambda point: point[0])
            axis.plot([value for value, _ in points], [_nan_if_none(row[quantity]) for _, row in points], marker="o")
        _set_value_axis(axis, values)
        figures.style_axes(axis, key, label)
    axes[1].set_ylim(0, 1.08 * _highest(rows, "training_time_s"))
    if named:
        figures.add_legend(figure, axes[0].lines, list(lines))
    return figure


def _bar_plot(labels: Sequence[str], rows: Sequence[Row], title: str) -> Figure | None:
    """Plot a bar per label, in the given order, with the median of the runs with this label.

    If a label has several runs, an error bar shows their range. If there are more than MAX_BARS labels, the result is
    None.
    """
    bars = {label: [row for one, row in zip(labels, rows, strict=True) if one == label] for label in labels}
    if len(bars) > MAX_BARS:
        return None
    figure, axes = figures.new_figure(1, 2, size=(12, 1.6 + 0.4 * len(bars)), title=title)
    for axis, (quantity, label), digits in zip(axes, MEASURES, ("{:.4f}", "{:.4g}"), strict=True):
        for place, runs in enumerate(bars.values()):
            values = [row[quantity] for row in runs if row[quantity] is not None]
            if not values:
                continue
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]] if len(values) > 1 else None
            axis.barh([place], [middle], height=0.65, xerr=spread, capsize=3, color=f"C{place % 10}")
            axis.text(max(values), place, f"  {digits.format(middle)}", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), list(bars), fontsize=9, parse_math=False)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, 1.18 * _highest(rows, quantity))
        what = label if len(bars) == len(rows) else f"{label}, median and range of the runs"
        figures.style_axes(axis, what, grid="x")
        axis.set_axisbelow(True)
    axes[1].tick_params(labelleft=False)
    return figure


def _nan_if_none(value: float | None) -> float:
    """Return the value, or nan if it is None. nan leaves a gap in a plot."""
    return math.nan if value is None else value


def _highest(rows: Sequence[Row], quantity: str) -> float:
    """Return the largest known value of a quantity. If that is 0 or no value is known, return 1."""
    return max((row[quantity] for row in rows if row[quantity] is not None), default=0.0) or 1.0


def _map_plot(keys: Sequence[str], settings: Sequence[dict[str, Any]], rows: Sequence[Row], title: str) -> Figure:
    """Plot accuracy and training time over two settings.

    The plot is a heat map if the runs cover at least half of all combinations of values, otherwise a scatter plot.
    """
    horizontal, vertical = (sorted({one[key] for one in settings}) for key in keys)
    is_grid = len(horizontal) * len(vertical) <= 2 * len(settings)
    size = (1.8 * len(horizontal) + 4, 0.5 * len(vertical) + 2) if is_grid else (0.0, 0.0)
    figure, axes = figures.new_figure(1, 2, size=(max(11.0, size[0]), max(4.5, size[1])), title=title)
    for axis, (quantity, label) in zip(axes, MEASURES, strict=True):
        values = [_nan_if_none(row[quantity]) for row in rows]
        shown: ScalarMappable
        colors: dict[str, Any] = {"cmap": "viridis" if quantity == "best_val_top1" else "Greys"}
        if is_grid:
            cells = [[math.nan] * len(horizontal) for _ in vertical]
            for one, value in zip(settings, values, strict=True):
                cells[vertical.index(one[keys[1]])][horizontal.index(one[keys[0]])] = value
            shown = axis.imshow(cells, origin="lower", aspect="auto", **colors)
            axis.set_xticks(range(len(horizontal)), map(format_setting, horizontal))
            axis.set_yticks(range(len(vertical)), map(format_setting, vertical))
            for row, column in ((r, c) for r in range(len(vertical)) for c in range(len(horizontal))):
                value = cells[row][column]
                text = "" if math.isnan(value) else f"{value:.4f}" if quantity == "best_val_top1" else f"{value:.3g}"
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
                axis.text(column, row, text, ha="center", va="center", fontsize=8, bbox=box if text else None)
        else:
            places = [[one[key] for one in settings] for key in keys]
            shown = axis.scatter(places[0], places[1], s=70, c=values, edgecolors="0.3", linewidths=0.5, **colors)
            _set_value_axis(axis, places[0])
            if _spans_orders(places[1]):
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        figure.colorbar(shown, ax=axis, label=label)
        axis.set_xlabel(keys[0])
        axis.set_ylabel(keys[1])
    return figure


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
