"""Losses of a training step, with mixup and CutMix on the device.

Mixing is one expression without branches on values, so it is compiled into the forward pass and captured with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import TrainConfig
from pipelines.augment.mixup import identity_table
from pipelines.loader.batches import Batch, MixedBatch

LossAndCounts = Callable[[nn.Module, Batch, float], tuple[Tensor, Tensor]]


def build_loss(config: TrainConfig, mixes: bool) -> LossAndCounts:
    """Return a function (model, batch, label_smoothing) -> (mean loss, float64 [3]: loss * samples, correct, samples).

    The function is compiled as a whole. With `mixes`, it mixes the images of a MixedBatch; a prediction of the sample's
    label counts by the share of the sample, and one of the partner's label by the rest.
    """
    if config.loss == "cross-entropy":
        return mixed_loss_and_counts if mixes else loss_and_counts
    threshold = config.bce_threshold

    def bce_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        logits, targets, correct = _soft(model, batch, label_smoothing)
        return _with_counts(binary_cross_entropy(logits, targets, threshold), correct, batch)

    return bce_and_counts


def loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of plain labels."""
    logits = model(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    correct = (logits.detach().argmax(1) == batch.labels).sum()
    return _with_counts(loss, correct, batch)


def mixed_loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of mixed labels."""
    logits, targets, correct = _soft(model, batch, label_smoothing)
    return _with_counts(F.cross_entropy(logits, targets), correct, batch)


def binary_cross_entropy(logits: Tensor, targets: Tensor, threshold: float | None) -> Tensor:
    """Return the mean binary cross-entropy over samples and classes of [B, C], like timm's BinaryCrossEntropy."""
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def soft_targets(labels: Tensor, classes: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """Return targets [B, classes] of labels, int64 [B]. Smoothing covers all classes, including the true one."""
    is_label = labels[:, None] == torch.arange(classes, device=labels.device)
    return is_label.to(dtype) * (1.0 - label_smoothing) + label_smoothing / classes


def _soft(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and targets [B, C] in float32 or wider, and the number of correct predictions."""
    images, labels = batch
    mix = batch.mix if isinstance(batch, MixedBatch) else None
    logits = model(images if mix is None else mix_images(images, mix))
    predicted = logits.detach().argmax(1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets, correct = soft_targets(labels, logits.shape[1], label_smoothing, logits.dtype), predicted == labels
    if mix is not None:
        share = mix[:, 0]
        targets = torch.lerp(swap_pairs(targets), targets, share[:, None].to(targets.dtype))
        correct = torch.lerp((predicted == swap_pairs(labels)).float(), correct.float(), share)
    return logits, targets, correct.sum()


def _with_counts(loss: Tensor, correct: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    samples = torch.full_like(correct, len(batch.labels))
    return loss, torch.stack([loss.detach().double() * len(batch.labels), correct.double(), samples.double()])


def swap_pairs(values: Tensor) -> Tensor:
    """Return values [B, ...] with the samples of each pair (2i, 2i + 1) swapped, with the same strides."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Mix the images of each pair.

    Args:
        images: uint8 [B, 3, H, W].
        mix: Table of `pipelines.augment.mixup`, float32 [B, 5].

    Returns:
        float32 [B, 3, H, W] in 0..255, with the strides of `images`.
    """
    own, top, bottom, left, right = mix[:, :, None, None].unbind(1)  # each [B, 1, 1]
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    is_inside = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    # torch.where would copy its constants from the host, which synchronizes and cannot be captured
    outside = own.masked_fill(top < bottom, 1.0)  # a box leaves the rest of the image unchanged
    weight = (outside * ~is_inside)[:, None]
    pixels = images.float()
    return torch.lerp(swap_pairs(pixels), pixels, weight)


def identity_mix(batch: Batch) -> MixedBatch:
    """Return the batch as a MixedBatch with shares of 1."""
    table = torch.from_numpy(identity_table(len(batch.labels)))
    return MixedBatch(batch.images, batch.labels, table.to(batch.images.device))


class RenderedBatch(NamedTuple):
    """A batch for pictures, as the model sees it.

    Attributes:
        images: uint8 [B, 3, H, W], rounded.
        labels: int64 [B].
        others: Labels that are mixed in, int64 [B].
        shares: Shares of `labels`, float32 [B].
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor


def render_batch(batch: Batch) -> RenderedBatch:
    """Render a batch into copies, which stay valid when the loader reuses its buffers."""
    if not isinstance(batch, MixedBatch):
        labels = batch.labels.clone()
        return RenderedBatch(batch.images.clone(), labels, labels, torch.ones(len(labels), device=labels.device))
    images = mix_images(batch.images, batch.mix).round().to(torch.uint8)
    return RenderedBatch(images, batch.labels.clone(), swap_pairs(batch.labels), batch.mix[:, 0].clone())
