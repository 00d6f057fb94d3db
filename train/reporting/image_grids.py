"""Pictures of what a model sees and what it says, from tensors on any device, for tools and trackers alike.

Drawing is train/reporting/figures.py. Knows no files, no trackers and no data sets.
"""

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

CAPTION_WIDTH = 23  # letters in a line above an image
CAPTION_LINES = 2  # for one class
MIXED_LINES = 2 * CAPTION_LINES


def training_grid(seen: RenderedBatch, classes: Sequence[str], title: str) -> Figure:
    """Images as the model is trained on them, with what they are mixed of."""
    captions = [wrap_caption(name, lines=MIXED_LINES) for name in mix_captions(seen, classes)]
    return figures.image_grid(to_numpy(seen.images), captions, title=title)


def mix_captions(seen: RenderedBatch, classes: Sequence[str]) -> list[str]:
    """Such as "cat 0.70 + dog 0.30", or "cat" where nothing is mixed in."""
    names = []
    for label, other, share in zip(seen.labels.tolist(), seen.others.tolist(), seen.shares.tolist(), strict=True):
        rest = f" {share:.2f} + {class_name(other, classes)} {1 - share:.2f}" if share < 1 else ""
        names.append(class_name(label, classes) + rest)
    return names


def sample_grid(images: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Images with the names of their classes; images: uint8 [N, 3, H, W], labels: int64 [N], -1 where unknown."""
    captions = [wrap_caption(class_name(label, classes)) for label in labels.tolist()]
    return figures.image_grid(to_numpy(images), captions, title=title)


def prediction_grid(images: Tensor, labels: Tensor, logits: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Images with the predicted class, its probability and the true class: right ones green, wrong ones red.

    images: uint8 [N, 3, H, W]; labels: int64 [N], -1 where the truth is unknown (black); logits: [N, C].
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
    """The predicted classes, int64 [N], and their probabilities, float32 [N]; logits: [N, C].

    Of equal logits, which bfloat16 often gives, the one that `train.loop.loss_and_hits` counts: argmax may differ.
    """
    best = logits.topk(min(5, logits.shape[1])).indices[:, :1]
    return best[:, 0], logits.float().softmax(1).gather(1, best)[:, 0]


def confusion_counts(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """int64 [C, C], true by predicted class, for `figures.confusion_matrix`; samples without a label are left out."""
    known = labels >= 0
    cells = labels[known] * classes + predicted[known]
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes).cpu().numpy()


def to_numpy(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] on the host, of uint8 [N, 3, H, W]."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def class_name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label >= 0 else "no label"


def wrap_caption(caption: str, lines: int = CAPTION_LINES) -> str:
    """Broken into lines that fit above an image; what does not is left out at the end."""
    return "\n".join(textwrap.wrap(caption, CAPTION_WIDTH, max_lines=lines, placeholder=" …"))
