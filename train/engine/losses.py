"""The losses of a training step and what it counts. Knows no optimizer and no loader."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import TrainConfig
from pipelines.loader.batches import Batch, MixedBatch
from train.engine.mixing import mix_images, swap_pairs

LossAndCounts = Callable[[nn.Module, Batch, float], tuple[Tensor, Tensor]]


def build_loss(config: TrainConfig, mixes: bool) -> LossAndCounts:
    """(model, batch, label_smoothing) -> the mean loss, and float64 [3]: loss * samples, correct, samples.

    Each is one function, so that all of it is compiled. mixes: batches are a MixedBatch, whose images are mixed here;
    a prediction that is the label then counts by the share of the sample, and one that is the neighbour's label by the
    rest.
    """
    if config.loss == "cross-entropy":
        return mixed_loss_and_counts if mixes else loss_and_counts
    threshold = config.bce_threshold

    def bce_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        logits, targets, correct = _soft(model, batch, label_smoothing)
        return _with_counts(binary_cross_entropy(logits, targets, threshold), correct, batch)

    return bce_and_counts


def loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy."""
    logits = model(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    correct = (logits.detach().argmax(1) == batch.labels).sum()
    return _with_counts(loss, correct, batch)


def mixed_loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the mixed labels."""
    logits, targets, correct = _soft(model, batch, label_smoothing)
    return _with_counts(F.cross_entropy(logits, targets), correct, batch)


def binary_cross_entropy(logits: Tensor, targets: Tensor, threshold: float | None) -> Tensor:
    """The mean over samples and classes of each class's binary cross-entropy, as timm's BinaryCrossEntropy; [B, C]."""
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def soft_targets(labels: Tensor, classes: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """[B, classes] of labels, int64 [B]; smoothing is spread over all classes, the true one among them."""
    is_label = labels[:, None] == torch.arange(classes, device=labels.device)
    return is_label.to(dtype) * (1.0 - label_smoothing) + label_smoothing / classes


def _soft(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets [B, C], in float32 or wider, and the number of correct predictions."""
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
