"""Draw figures: curves, image grids, confusion matrices and bar charts.

The functions return figures, so that callers can save them to files or send them to trackers.

matplotlib is imported inside the functions, since the import takes half a second. pyplot is not used, since it keeps
figures in global state and may open windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import atomic_write
from train.reporting.metrics_file import MetricsLine

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
RIGHT, WRONG = "#1a7f37", "#c1440e"  # colors of captions
LABELLED_CLASSES = 250  # with more classes, confusion matrices do not show class names
COUNTED_CLASSES = 40  # with more classes, figures use less space per class
RANKED_BARS, BARS_PER_COLUMN = 200, 50
NAME_LETTERS = 28  # maximum length of a class name on an axis
VALIDATION_LOSS = "cross-entropy"  # the validation loss for every train.loss


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], title: str = "", title_size: float | str = "large"
) -> tuple[Figure, list[Axes]]:
    """Return a new figure of `size` (width, height) in inches, and its rows * columns axes in reading order.

    Here and below, text is shown verbatim: matplotlib would render text between dollar signs as a formula.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=title_size, parse_math=False)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def style_axes(axes: Axes, x: str = "", y: str = "", *, grid: Literal["both", "x", "y"] = "both") -> None:
    """Label the axes, and draw a light grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, alpha=0.3)


def add_legend(
    figure: Figure,
    handles: Sequence[Artist],
    names: Sequence[str],
    *,
    columns: int = 1,
    fontsize: int = 9,
) -> None:
    """Add a legend below the axes of a figure, with all names. matplotlib omits names with a leading underscore."""
    numbers = [str(number) for number in range(len(names))]
    legend = figure.legend(handles, numbers, loc="outside lower center", ncols=columns, fontsize=fontsize)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file atomically. Raises UserError if the file cannot be written."""
    try:
        atomic_write(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space, or give another folder") from None


def render(figure: Figure) -> np.ndarray:
    """Draw a figure and return its pixels, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def curves(metrics: Sequence[MetricsLine], title: str, loss: str = "cross-entropy") -> Figure:
    """Plot the loss and the top-1 accuracy over epochs, for training and validation.

    Args:
        metrics: Lines of metrics.jsonl, from `read_metrics`. They may include validation metrics of a moving average.
        title: Title of the figure.
        loss: The value of train.loss.
    """
    figure, axes = new_figure(1, 2, size=(10, 4), title=title)
    loss_label = f"{loss_name(loss)} loss" if loss_name(loss) == VALIDATION_LOSS else "loss"
    for axis, quantity, label in ((axes[0], "loss", loss_label), (axes[1], "top1", "top-1 accuracy")):
        of_train, of_val = ("", "") if label != "loss" else (f", {loss_name(loss)}", f", {VALIDATION_LOSS}")
        names = {"train": f"train{of_train}", "val": f"validation{of_val}", "ema_val": "validation, moving average"}
        for split, name in names.items():
            key = f"{split}_{quantity}"
            points = [(line.epoch + 1, line[key]) for line in metrics if line.get(key) is not None]
            axis.plot(*zip(*points, strict=True), marker=".", label=name) if points else None
        style_axes(axis, "epochs trained", label)
        axis.locator_params(axis="x", integer=True)
        if axis.lines:
            axis.legend()
    return figure


def loss_name(loss: str) -> str:
    """Return the name that figures use for a value of train.loss."""
    return {"bce": "binary cross-entropy"}.get(loss, loss)


def image_grid(
    images: np.ndarray, captions: Sequence[str], *, title: str, columns: int = 5, colors: Sequence[str] | None = None
) -> Figure:
    """Draw images in a grid, each with a caption above it.

    Args:
        images: uint8 [N, H, W, 3].
        captions: One per image.
        title: Title of the figure.
        columns: Maximum number of columns.
        colors: Colors of the captions, e.g. RIGHT or WRONG. If None, all captions are black.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    caption_lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    width = max(1.7 * columns, 0.09 * len(title) + 0.4)  # a grid of few images is narrower than the title
    size = (width, (1.75 + 0.14 * caption_lines) * rows + 0.5)
    figure, axes = new_figure(rows, columns, size=size, title=title, title_size=11)
    for axis in axes:
        axis.set_axis_off()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes[number].imshow(image, interpolation="nearest")
        axes[number].set_title(caption, fontsize=8, color=colors[number] if colors else "black", parse_math=False)
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix with the share of each true class (row) that was predicted as each class (column).

    `counts` contains numbers of samples, int [C, C], indexed by true class and predicted class.
    """
    from matplotlib.colors import PowerNorm

    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    many = len(classes) > COUNTED_CLASSES
    inches = 0.11 if many else 0.45  # per class; 200 classes are readable when zoomed in
    side = min(28.0, max(5.0, inches * len(classes) + 2))
    figure, (axis,) = new_figure(size=(side + 1, side))
    scale = PowerNorm(0.5, vmin=0, vmax=1)  # makes rare confusions visible beside the diagonal
    image = axis.imshow(shares, norm=scale, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8, aspect=60 if many else 20, pad=0.02)
    axis.set_xlabel("predicted class", fontsize=14 if many else 10)
    axis.set_ylabel("true class", fontsize=14 if many else 10)
    axis.set_title(title, fontsize=16 if many else 11, parse_math=False)
    if len(classes) <= LABELLED_CLASSES:
        names = [shorten(name) for name in classes]
        for set_ticks, rotation in ((axis.set_xticks, 90), (axis.set_yticks, 0)):
            set_ticks(range(len(classes)), names, rotation=rotation, fontsize=5 if many else 8, parse_math=False)
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            shade = "white" if shares[row, column] > 0.35 else "black"
            axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=shade)
    return figure


def ranked_bars(values: Sequence[float], names: Sequence[str], quantity: str, title: str) -> Figure:
    """Draw a horizontal bar for each name, from the highest to the lowest value. Values must be between 0 and 1.

    If there are more than RANKED_BARS names, only the RANKED_BARS / 2 highest and the RANKED_BARS / 2 lowest values
    are drawn.
    """
    order = sorted(range(len(names)), key=lambda number: -values[number])
    if len(order) > RANKED_BARS:
        half = RANKED_BARS // 2
        title += f", the {half} highest and the {half} lowest of {len(order)}"
        order = order[:half] + order[-half:]
    columns = math.ceil(len(order) / BARS_PER_COLUMN)
    rows = math.ceil(len(order) / columns)
    size = (max(6, 4 * columns), 0.18 * rows + 1.2)
    figure, axes = new_figure(1, columns, size=size, title=title, title_size=11)
    for column, axis in enumerate(axes):
        shown = order[column * rows : (column + 1) * rows]
        bars = axis.barh(range(len(shown)), [values[number] for number in shown], height=0.7)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.set_yticks(range(len(shown)), [shorten(names[number]) for number in shown], fontsize=7, parse_math=False)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.set_xlim(0, 1.12)
        style_axes(axis, quantity, grid="x")
    return figure


def class_counts(counts: Mapping[str, np.ndarray], classes: Sequence[str], title: str) -> Figure:
    """Draw the number of samples per class in each split.

    Up to COUNTED_CLASSES classes are drawn as bars. More classes are drawn as one curve per split, with the counts in
    descending order.
    """
    named = len(classes) <= COUNTED_CLASSES
    figure, (axis,) = new_figure(size=(max(6.0, 0.35 * len(classes) + 2) if named else 9.0, 4.5))
    drawn: list[Artist] = []
    for number, each in enumerate(counts.values()):
        if named:
            width = 0.8 / len(counts)
            drawn.append(axis.bar(np.arange(len(classes)) + (number + 0.5) * width - 0.4, each, width).patches[0])
        else:
            drawn += axis.step(np.arange(1, len(classes) + 1), np.sort(each)[::-1], where="mid")
    if named:
        axis.set_xticks(range(len(classes)), list(map(shorten, classes)), rotation=90, fontsize=8, parse_math=False)
    style_axes(axis, "class" if named else "classes, from the most to the fewest samples", "samples", grid="y")
    axis.set_ylim(bottom=0)
    labels = [
        f"{split}: {each.min():,} to {each.max():,}, median {np.median(each):,.0f}" for split, each in counts.items()
    ]
    add_legend(figure, drawn, labels, columns=2, fontsize=8)
    axis.set_title(title, fontsize=11, parse_math=False)
    return figure


def shorten(name: str, letters: int = NAME_LETTERS) -> str:
    """Shorten a name to at most `letters` characters, to leave room for the plot."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
