"""Plot the loss and accuracy curves of several runs in four panels with one legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.runs.records import RunRecord, summarize_metrics
from train.reporting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import ColorType

PANELS = (
    ("train_loss", "train loss"),
    ("val_loss", f"validation loss ({figures.VALIDATION_LOSS})"),
    ("train_top1", "train top-1 accuracy"),
    ("val_top1", "validation top-1 accuracy"),
)
OTHERS_LABEL = "others"
EMA_LABEL = "validation of a moving average"
MAX_TITLE_LENGTH = 70  # characters that fit into a panel's title
MAX_COLORED = 12  # number of distinguishable colors; with more runs, only the best ones are colored
LOG_SPAN = 5  # losses that span a larger factor are drawn on a log axis
DIVERGED = 10  # losses above this multiple of the ordinary loss are cut off, see `loss_range`
CurvePoints = list[tuple[int, float]]  # number of epochs trained, value


def plot_curves(records: Sequence[RunRecord], names: Sequence[str], title: str) -> Figure:
    """Plot training and validation loss and accuracy, with one color per run.

    Dotted lines show validation results with a moving average of the weights.
    """
    colors = _run_colors(records)
    rows = math.ceil(min(len(records), MAX_COLORED + 1) / _legend_columns(names))
    figure, axes = figures.new_figure(2, 2, size=(11, 7.5 + 0.22 * rows), title=title)
    handles: dict[str, Line2D] = {}
    dotted: list[Line2D] = []
    losses = {figures.loss_name(record.config.train.loss) for record in records}
    train_loss = f"train loss ({losses.pop()})" if len(losses) == 1 else "train loss"
    for axis, (quantity, label) in zip(axes, PANELS, strict=True):
        curves = [_curve_points(record, quantity) for record in records]
        averages = [_curve_points(record, f"ema_{quantity}") for record in records]
        for average, color in zip(averages, colors, strict=True):
            if average and color is not None:
                dotted += axis.plot(*zip(*average, strict=True), color=color, zorder=2, linestyle=":")
        for curve, record, name, color in zip(curves, records, names, colors, strict=True):
            is_colored = color is not None
            so_far = f" ({record.epochs_trained} of {record.config.train.epochs} epochs)"
            (line,) = axis.plot(
                *zip(*curve, strict=True) if curve else ([], []),
                color=color if is_colored else "0.8",
                zorder=2 if is_colored else 1,
                linewidth=1.6 if is_colored else 0.8,
                marker="." if len(curve) <= 30 else None,
                linestyle="-" if record.is_finished else "--",
            )
            handles.setdefault(name + so_far * (not record.is_finished) if is_colored else OTHERS_LABEL, line)
        if quantity.endswith("loss"):
            _set_loss_axis(axis, curves, names, averages)
        figures.style_axes(axis, "epochs trained", train_loss if quantity == "train_loss" else label)
        axis.locator_params(axis="x", integer=True)
    if OTHERS_LABEL in handles:
        handles[OTHERS_LABEL] = handles.pop(OTHERS_LABEL)  # move to the end
    if dotted:
        handles[EMA_LABEL] = dotted[0]
    figures.add_legend(figure, list(handles.values()), list(handles), columns=_legend_columns(names))
    return figure


def _curve_points(record: RunRecord, quantity: str) -> CurvePoints:
    """Return a point for each epoch in which the quantity was evaluated.

    A non-finite loss has the value nan, so that the curve has a gap.
    """
    split = quantity.rpartition("_")[0]
    return [
        (line.epoch + 1, math.nan if (value := line[quantity]) is None else value)
        for line in record.metrics
        if line.get(f"{split}_top1") is not None
    ]


def _set_loss_axis(
    axis: Axes, curves: Sequence[CurvePoints], names: Sequence[str], averages: Sequence[CurvePoints]
) -> None:
    """Fit the axis to the losses within `loss_range`.

    If losses of `curves` are above this range or not finite, the title lists or counts the runs with such losses.
    """
    losses = [[value for _, value in curve] for curve in curves]
    finite = [list(filter(math.isfinite, run)) for run in losses]
    low, high = loss_range(finite + [[value for _, value in curve if math.isfinite(value)] for curve in averages])
    left_out = {
        "nan or infinite": [name for name, run in zip(names, losses, strict=True) if not all(map(math.isfinite, run))],
        f"above {high:.3g}": [name for name, run in zip(names, finite, strict=True) if max(run, default=0) > high],
    }
    by_name = "; ".join(f"{reason}: {', '.join(runs)}" for reason, runs in left_out.items() if runs)
    by_number = "; ".join(f"{reason} in {len(runs)} of {len(names)} runs" for reason, runs in left_out.items() if runs)
    if by_name:
        notes = by_name if len(by_name) <= MAX_TITLE_LENGTH else by_number
        axis.set_title(f"not shown: {notes}", fontsize=8, parse_math=False)
    if low > 0 and high / low > LOG_SPAN:
        axis.set_yscale("log")
        axis.set_yticks(_log_ticks(low, high), map("{:g}".format, _log_ticks(low, high)))
        axis.set_yticks([], minor=True)
        axis.set_ylim(low / 1.1, high * 1.1)
    elif high > low:
        margin = 0.05 * (high - low)
        axis.set_ylim(low - margin, high + margin)


def loss_range(losses: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the smallest and largest loss to show, given the finite losses of each run.

    The ordinary loss is the smallest of the runs' largest losses, but at least 1, since a run may start from trained
    weights. Losses above DIVERGED times the ordinary loss are cut off, since they would flatten all other curves.
    Without any losses, the result is (0, 1).
    """
    values = [value for run in losses for value in run]
    if not values:
        return 0.0, 1.0
    limit = DIVERGED * max(1.0, min(max(run) for run in losses if run))
    return min(values), max([value for value in values if value <= limit], default=max(values))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks at 1, 2 and 5 times the powers of ten from `low` to `high`.

    A range of more than three decades only has ticks at the powers of ten.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    return [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1]


def _run_colors(records: Sequence[RunRecord]) -> list[ColorType | None]:
    """Return a color per run.

    If there are more than MAX_COLORED runs, those with the highest validation accuracy get a color. The other entries
    are None.
    """
    import matplotlib

    best = [summarize_metrics(record.metrics, record.config.eval.weights)["best_val_top1"] or 0.0 for record in records]
    numbers = range(len(records))
    ranking = numbers if len(records) <= MAX_COLORED else sorted(numbers, key=lambda number: -best[number])
    colors = dict(zip(ranking, [*matplotlib.color_sequences["tab10"], "black", "navy"], strict=False))
    return [colors.get(number) for number in numbers]


def _legend_columns(names: Sequence[str]) -> int:
    """Return the number of columns of the legend below the figure, from 1 to 4."""
    widest = max(map(len, names)) + 18  # room for the progress of an unfinished run
    return max(1, min(4, len(names), 150 // widest))
