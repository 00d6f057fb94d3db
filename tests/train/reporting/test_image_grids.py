"""Image grids from tensors: captions, colors and counts match the logits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from train.engine.evaluate import loss_and_hits
from train.reporting import figures, image_grids

CLASSES = ("cat", "European fire salamander", "$costly$")


def noise(count: int, side: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def captions_of(figure: Figure) -> list[tuple[str, str]]:
    """Return (caption with spaces for line breaks, color) of each image."""
    titles = [axis.title for axis in figure.axes if axis.get_images()]
    return [(" ".join(title.get_text().split()), to_hex(str(title.get_color()))) for title in titles]


def test_captions_and_colors_of_predictions_match_the_logits() -> None:
    logits = torch.tensor([[3.0, 1, 0], [0, 0, 2], [1, 4, 1], [0, 5, 0]])
    labels = torch.tensor([0, 1, -1, 1])
    images = noise(4)
    figure = image_grids.prediction_grid(images, labels, logits, CLASSES, "test")
    percent = [f"{value:.0%}" for value in logits.softmax(1).max(1).values.tolist()]
    assert captions_of(figure) == [
        (f"{percent[0]} cat true: cat", figures.RIGHT),
        (f"{percent[1]} $costly$ true: European fire salamander", figures.WRONG),
        (f"{percent[2]} European fire salamander", "#000000"),
        (f"{percent[3]} European fire salamander true: European fire salamander", figures.RIGHT),
    ]
    shown = [np.asarray(axis.get_images()[0].get_array()) for axis in figure.axes[:4]]
    assert np.array_equal(np.stack(shown), images.permute(0, 2, 3, 1).numpy())


def test_samples_have_the_names_of_their_classes() -> None:
    figure = image_grids.sample_grid(noise(3), torch.tensor([1, -1, 0]), CLASSES, "test")
    assert [caption for caption, _ in captions_of(figure)] == ["European fire salamander", "no label", "cat"]


def test_long_names_fit_and_keep_the_probability() -> None:
    for name in ("x" * 200, "many short words " * 20, "dog", ""):
        caption = image_grids.wrap_caption(f"99% {name}")
        lines = caption.split("\n")
        assert len(lines) <= image_grids.CAPTION_LINES
        assert max(map(len, lines)) <= image_grids.CAPTION_WIDTH
        assert caption.startswith("99%")


def test_caption_stays_within_its_column() -> None:
    width = 23 * "n"  # a wide letter
    figure = image_grids.sample_grid(noise(5), torch.zeros(5, dtype=torch.int64), [width], "test")
    figures.render(figure)  # draws it
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_confusion_counts_match_scikit_learn_without_unlabelled_samples() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 5, (300,), generator=generator)
    predicted = torch.randint(0, 6, (300,), generator=generator)
    counts = image_grids.confusion_counts(labels, predicted, 6)
    known = labels >= 0
    assert counts.dtype == np.int64
    assert np.array_equal(counts, confusion_matrix(labels[known], predicted[known], labels=range(6)))


@pytest.mark.parametrize("classes", [3, 10, 200])
def test_ties_are_broken_as_in_training(classes: int) -> None:
    logits = torch.randint(0, 3, (500, classes), generator=torch.Generator().manual_seed(2)).bfloat16().float()
    predicted, probabilities = image_grids.predicted_classes(logits)
    assert loss_and_hits(logits, predicted)[1] == 500
    assert torch.equal(probabilities, logits.softmax(1).max(1).values)
