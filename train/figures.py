"""Pictures of training: curves, grids of images, confusion matrices. Figures come back unsaved, for files and trackers.

matplotlib is imported inside the functions: it takes half a second, and most of a run does without. No pyplot: it keeps
figures in global state and may open windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
RIGHT, WRONG = "#1a7f37", "#c1440e"  # colours of captions
LABELLED_CLASSES = 40  # up to so many classes a confusion matrix names each of them


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with rows * columns axes, in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Figure, path: Path) -> None:
    """A PNG, whole or not there: the name appears when the file is complete."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=DPI, format="png")
    temporary.rename(path)


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure: uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def curves(metrics: list[dict[str, Any]], title: str) -> Figure:
    """Loss and top-1 accuracy against epoch, train and validation, side by side; metrics: lines of metrics.jsonl."""
    figure, axes = new_figure(1, 2, size=(10, 4))
    for axis, quantity, label in ((axes[0], "loss", "cross-entropy loss"), (axes[1], "top1", "top-1 accuracy")):
        for split, name in (("train", "train"), ("val", "validation")):
            points = [(line["epoch"] + 1, line.get(f"{split}_{quantity}")) for line in metrics]
            points = [point for point in points if point[1] is not None]
            axis.plot(*zip(*points, strict=True), marker=".", label=name) if points else None
        axis.set_xlabel("epochs trained")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    return figure


def image_grid(
    images: np.ndarray, captions: Sequence[str], *, title: str, columns: int = 5, colors: Sequence[str] | None = None
) -> Figure:
    """Images with a caption above each; images: uint8 [N, H, W, 3], colors: of the captions (RIGHT, WRONG …)."""
    columns = max(1, min(columns, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    caption_lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    figure, axes = new_figure(rows, columns, size=(1.7 * columns, (1.75 + 0.14 * caption_lines) * rows + 0.5))
    for axis in axes:
        axis.set_axis_off()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes[number].imshow(image, interpolation="nearest")
        axes[number].set_title(caption, fontsize=8, color=colors[number] if colors else "black", parse_math=False)
    figure.suptitle(title, fontsize=11)
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Share of each true class (row) that was predicted as each class (column); counts: int [C, C], true by
    predicted."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = min(14.0, max(5.0, 0.45 * len(classes) + 2))
    figure, (axis,) = new_figure(size=(side + 1, side))
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(title, fontsize=11)
    if len(classes) <= LABELLED_CLASSES:
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=shade)
    return figure
