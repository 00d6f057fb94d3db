"""Test-time augmentation: the mean of a model's logits over several views of each image. Works on raw pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def views(images: Tensor, tta: str) -> Iterator[tuple[float, Tensor]]:
    """(weight, images [B, 3, H, W]) of each view that `eval.tta` asks for; the weights sum to 1.

    Source: arXiv:2404.00498, section 3.5: the image, and the image shifted by a pixel up-left and down-right with its
    edge reflected, each also mirrored.
    """
    if tta == "none":
        yield 1.0, images
        return
    shifted = [(1.0, images)]
    if tta == "flip-translate":
        shifted = [(0.5, images), (0.25, shift(images, -1)), (0.25, shift(images, 1))]
    for weight, view in shifted:
        yield weight / 2, view
        yield weight / 2, view.flip(3).contiguous(memory_format=torch.channels_last)


def shift(images: Tensor, by: int) -> Tensor:
    """Shifted by one pixel, down and right for 1, up and left for -1; the line left free mirrors the second one."""
    for axis in (2, 3):
        length = images.shape[axis]
        if by > 0:
            parts = [images.narrow(axis, 1, 1), images.narrow(axis, 0, length - 1)]
        else:
            parts = [images.narrow(axis, 1, length - 1), images.narrow(axis, length - 2, 1)]
        images = torch.cat(parts, dim=axis)
    return images.contiguous(memory_format=torch.channels_last)


def mean_logits(infer: Callable[[Tensor], Tensor], images: Tensor, tta: str) -> Tensor:
    """Float32 [B, num_classes]. Every view has the shape of `images`, so that a compiled model sees one shape."""
    total: Tensor | None = None
    for weight, view in views(images, tta):
        logits = infer(view).float() * weight  # a new tensor, as replaying a CUDA graph overwrites the old one
        total = logits if total is None else total + logits
    assert total is not None
    return total
