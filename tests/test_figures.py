"""Pictures of training: that they are drawn of whatever there is, and whole when their name appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train import figures


def metrics(epoch: int, **changes: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.7, "val_top1": 0.4, **changes}


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
def test_curves_are_drawn_of_whatever_epochs_there_are(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    figures.save(figures.curves(lines, "test"), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480)
        assert len(image.convert("RGB").getcolors(10**6) or []) > 10  # there is something on it
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("count", [1, 7, 20])
def test_a_grid_shows_every_image_and_caption(count: int) -> None:
    images = np.full((count, 8, 8, 3), 7, np.uint8)
    images[:, :, :, 1] = np.arange(count)[:, None, None]
    figure = figures.image_grid(images, [f"caption {n}" for n in range(count)], title="test")
    shown = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_title() for axis in shown] == [f"caption {n}" for n in range(count)]
    assert [int(axis.get_images()[0].get_array()[0, 0, 1]) for axis in shown] == list(range(count))


@pytest.mark.parametrize("classes", [2, 10, 50])
def test_a_confusion_matrix_shows_shares_of_the_true_class(classes: int) -> None:
    counts = np.eye(classes, dtype=np.int64) * 3
    counts[0, 1] = 1
    counts[1] = 0  # a class without samples
    figure = figures.confusion_matrix(counts, [f"class {n}" for n in range(classes)], "test")
    shares = figure.axes[0].get_images()[0].get_array()
    assert shares[0, :2].tolist() == [0.75, 0.25]
    assert shares[1].sum() == 0
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ("class 1" in names) == (classes <= figures.LABELLED_CLASSES)


def test_pixels_of_a_figure_are_what_its_file_holds(tmp_path: Path) -> None:
    figure = figures.curves([metrics(0), metrics(1)], "test")
    figures.save(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), figures.pixels_of(figure))
