"""Figures: drawn for any data, and written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.reporting import figures
from train.reporting.metrics_file import MetricsLine


def metrics(epoch: int, **changes: Any) -> MetricsLine:
    values = {"epoch": epoch, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.7, "val_top1": 0.4, **changes}
    return MetricsLine(values)


@pytest.mark.parametrize(
    "lines",
    [
        [metrics(0)],
        [metrics(epoch) for epoch in range(3)],
        [metrics(0, val_loss=None, val_top1=None), metrics(1)],
        [metrics(0, train_loss=None)],
    ],
    ids=["one epoch", "several", "no validation in an epoch", "a loss of nan"],
)
def test_curves_are_drawn_for_any_epochs(lines: list[MetricsLine], tmp_path: Path) -> None:
    figures.save(figures.curves(lines, "test"), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480)
        assert len(image.convert("RGB").getcolors(10**6) or []) > 10  # not empty
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("count", [1, 7, 20])
def test_grid_shows_every_image_and_caption(count: int) -> None:
    images = np.full((count, 8, 8, 3), 7, np.uint8)
    images[:, :, :, 1] = np.arange(count)[:, None, None]
    figure = figures.image_grid(images, [f"caption {n}" for n in range(count)], title="test")
    shown = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_title() for axis in shown] == [f"caption {n}" for n in range(count)]
    assert [int(axis.get_images()[0].get_array()[0, 0, 1]) for axis in shown] == list(range(count))


@pytest.mark.parametrize("classes", [2, 10, 50, 300])
def test_confusion_matrix_shows_shares_of_the_true_class(classes: int) -> None:
    counts = np.eye(classes, dtype=np.int64) * 3
    counts[0, 1] = 1
    counts[1] = 0  # a class without samples
    figure = figures.confusion_matrix(counts, [f"class {n}" for n in range(classes)], "test")
    shares = figure.axes[0].get_images()[0].get_array()
    assert shares[0, :2].tolist() == [0.75, 0.25]
    assert shares[1].sum() == 0
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ("class 1" in names) == (classes <= figures.LABELLED_CLASSES)


def test_rendered_pixels_equal_the_saved_file(tmp_path: Path) -> None:
    figure = figures.curves([metrics(0), metrics(1)], "test")
    figures.save(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), figures.render(figure))


@pytest.mark.parametrize("classes", [3, 120, 450])
def test_ranked_bars_go_from_highest_to_lowest(classes: int) -> None:
    values = np.random.default_rng(0).permutation(classes) / classes
    figure = figures.ranked_bars(values.tolist(), [f"class {n}" for n in range(classes)], "F1", "test")
    widths = [bar.get_width() for axis in figure.axes for bar in axis.patches]
    names = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == max(values)
    assert widths[-1] == 0
    assert len(widths) == min(classes, figures.RANKED_BARS)
    assert [values[int(name.removeprefix("class "))] for name in names] == widths


@pytest.mark.parametrize("classes", [4, 60])
def test_class_counts_name_minimum_maximum_and_median(classes: int, tmp_path: Path) -> None:
    counts = {"train": np.arange(classes) + 1000, "val": np.arange(classes)[::-1] + 5}
    figure = figures.class_counts(counts, [f"class {n}" for n in range(classes)], "test")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0] == f"train: 1,000 to {999 + classes:,}, median {1000 + (classes - 1) / 2:,.0f}"
    assert legend[1].startswith(f"val: 5 to {4 + classes}")
    (axis,) = figure.axes
    heights = [bar.get_height() for bar in axis.patches] or axis.lines[1].get_ydata()[::-1]
    assert list(heights[-classes:]) == sorted(counts["val"], reverse=classes == 4)
    figures.save(figure, tmp_path / "counts.png")


def test_long_class_names_are_shortened_at_an_axis() -> None:
    assert figures.shorten("tench") == "tench"
    assert len(figures.shorten("x" * 99)) == figures.NAME_LETTERS


ODD = ["$\\frac$", "_$a_$b", "_hidden", "100 % of $5"]  # invalid formulas of matplotlib, and names that it omits


def test_any_name_is_drawn_unchanged() -> None:
    images = np.zeros((len(ODD), 8, 8, 3), np.uint8)
    counts = np.eye(len(ODD), dtype=np.int64)
    drawn = [
        figures.curves([metrics(0)], ODD[0]),
        figures.image_grid(images, ODD, title=ODD[0]),
        figures.confusion_matrix(counts, ODD, ODD[0]),
        figures.ranked_bars([0.1, 0.2, 0.3, 0.4], ODD, "F1", ODD[0]),
        figures.class_counts(dict.fromkeys(ODD, counts[0]), ODD, ODD[0]),
    ]
    for figure in drawn:
        figures.render(figure)
    legend = [text.get_text().rpartition(": ")[0] for text in drawn[-1].legends[0].get_texts()]
    assert legend == ODD


@pytest.mark.parametrize(
    ("loss", "axis_label", "names"),
    [
        ("cross-entropy", "cross-entropy loss", ["train", "validation"]),
        ("bce", "loss", ["train, binary cross-entropy", "validation, cross-entropy"]),
    ],
)
def test_each_loss_curve_is_named(loss: str, axis_label: str, names: list[str]) -> None:
    axis = figures.curves([metrics(0), metrics(1)], "test", loss).axes[0]
    assert axis.get_ylabel() == axis_label
    assert [text.get_text() for text in axis.get_legend().get_texts()] == names
