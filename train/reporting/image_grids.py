"""Draw image grids of a model's inputs and predictions. The functions accept tensors on any device."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from train.reporting import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from train.engine.losses import RenderedBatch

CAPTION_WIDTH = 23  # characters per line
CAPTION_LINES = 2  # per class name
MIXED_LINES = 2 * CAPTION_LINES


def training_grid(rendered: RenderedBatch, classes: Sequence[str], title: str) -> Figure:
    """Draw images as the model sees them in training. Captions name the classes that are mixed into each image."""
    captions = [wrap_caption(name, lines=MIXED_LINES) for name in mix_captions(rendered, classes)]
    return figures.image_grid(to_numpy(rendered.images), captions, title=title)


def mix_captions(rendered: RenderedBatch, classes: Sequence[str]) -> list[str]:
    """Return a caption for each image, such as "cat 0.70 + dog 0.30", or "cat" for an unmixed image."""
    names = []
    for label, other, share in zip(
        rendered.labels.tolist(), rendered.others.tolist(), rendered.shares.tolist(), strict=True
    ):
        rest = f" {share:.2f} + {class_name(other, classes)} {1 - share:.2f}" if share < 1 else ""
        names.append(class_name(label, classes) + rest)
    return names


def sample_grid(images: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Draw images, each with its class name as caption.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N], with -1 for unknown labels.
        classes: Class names.
        title: Title of the figure.
    """
    captions = [wrap_caption(class_name(label, classes)) for label in labels.tolist()]
    return figures.image_grid(to_numpy(images), captions, title=title)


def prediction_grid(images: Tensor, labels: Tensor, logits: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Draw images, each with the predicted class, its probability and, if known, the true class in its caption.

    Captions are green for correct predictions, red for wrong ones, and black if the label is unknown.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N], with -1 for unknown labels.
        logits: [N, C].
        classes: Class names.
        title: Title of the figure.
    """
    predicted, probabilities = predicted_classes(logits)
    captions, colors = [], []
    for label, guess, probability in zip(labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True):
        lines = [wrap_caption(f"{probability:.0%} {classes[guess]}")]
        if label >= 0:
            lines.append(wrap_caption(f"true: {classes[label]}"))
        captions.append("\n".join(lines))
        colors.append("black" if label < 0 else figures.RIGHT if label == guess else figures.WRONG)
    return figures.image_grid(to_numpy(images), captions, title=title, colors=colors)


def predicted_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted classes, int64 [N], and their probabilities, float32 [N], from logits [N, C].

    Equal logits, which are common in bfloat16, are ordered as in `evaluate.loss_and_hits`. argmax might choose a
    different class.
    """
    best = logits.topk(min(5, logits.shape[1])).indices[:, :1]
    return best[:, 0], logits.float().softmax(1).gather(1, best)[:, 0]


def confusion_counts(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Return the number of samples for each true class (row) and predicted class (column), int64 [C, C].

    Samples without a label are ignored.
    """
    known = labels >= 0
    cells = labels[known] * classes + predicted[known]
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes).cpu().numpy()


def to_numpy(images: Tensor) -> np.ndarray:
    """Convert images from a uint8 tensor [N, 3, H, W] to a uint8 array [N, H, W, 3] in host memory."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def class_name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label >= 0 else "no label"


def wrap_caption(caption: str, lines: int = CAPTION_LINES) -> str:
    """Break a caption into lines that fit above an image, and truncate the caption after `lines` lines."""
    return "\n".join(textwrap.wrap(caption, CAPTION_WIDTH, max_lines=lines, placeholder=" …"))
