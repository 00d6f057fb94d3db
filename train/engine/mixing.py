"""Mixup and CutMix on the device: what images and labels become by the table of `pipelines.mixing`.

One expression for mixup, CutMix and nothing, without a look at the values: it is compiled into the forward pass, where
pixels stay floats, and captured with it. Knows no loss and draws nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.augment.mixup import identity_table
from pipelines.loader.batches import Batch, MixedBatch


def swap_pairs(values: Tensor) -> Tensor:
    """values [B, ...] of the other sample of each pair 2i, 2i + 1, with the same strides."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Float32 [B, 3, H, W] in 0..255 with the strides of images, uint8 [B, 3, H, W]; mix: float32 [B, 5]."""
    own, top, bottom, left, right = mix[:, :, None, None].unbind(1)  # each [B, 1, 1]
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    is_inside = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    # torch.where would copy its numbers from the host, which waits for the device and cannot be captured
    outside = own.masked_fill(top < bottom, 1.0)  # a box leaves the rest of the image as it is
    weight = (outside * ~is_inside)[:, None]
    pixels = images.float()
    return torch.lerp(swap_pairs(pixels), pixels, weight)


def identity_mix(batch: Batch) -> MixedBatch:
    """The batch for a step that mixes, but with shares of 1."""
    table = torch.from_numpy(identity_table(len(batch.labels)))
    return MixedBatch(batch.images, batch.labels, table.to(batch.images.device))


class RenderedBatch(NamedTuple):
    """A batch as the model sees it, for pictures: images uint8 [B, 3, H, W], rounded; labels and the labels that are
    mixed in, int64 [B]; shares of the former, float32 [B]."""

    images: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor


def render_batch(batch: Batch) -> RenderedBatch:
    """Copies, which stay when the loader reuses its buffers."""
    if not isinstance(batch, MixedBatch):
        labels = batch.labels.clone()
        return RenderedBatch(batch.images.clone(), labels, labels, torch.ones(len(labels), device=labels.device))
    images = mix_images(batch.images, batch.mix).round().to(torch.uint8)
    return RenderedBatch(images, batch.labels.clone(), swap_pairs(batch.labels), batch.mix[:, 0].clone())
