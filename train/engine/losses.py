"""Losses of a training step, with mixup and CutMix on the device.

Mixing is one expression without branches on tensor values, so it can be compiled and captured with the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import TrainConfig
from configs.schema.train import LOSSES
from configs.utils.code import describe_error, load_object
from configs.utils.errors import UserError
from pipelines.augment.mixup import identity_table
from pipelines.loader.batches import Batch, MixedBatch

LossAndCounts = Callable[[nn.Module, Batch, float], tuple[Tensor, Tensor]]


def build_loss(
    config: TrainConfig,
    mixes: bool,
    device: torch.device | None = None,
    compiled: Callable[[LossAndCounts], LossAndCounts] = lambda function: function,
) -> LossAndCounts:
    """Return the loss function for train.loss. It can be compiled as a whole, unless it is the user's own.

    The loss function takes (model, batch, label_smoothing) and returns the mean loss and the sums (loss * samples,
    correct, samples), float64 [3]. In a `MixedBatch`, each sample is mixed with a partner, and correct predictions are
    counted as fractions: predicting the label of the sample counts as the share of the sample, and predicting the label
    of the partner counts as the rest.

    A class weight multiplies the term of its class in the target: the logarithm of its probability, in cross-entropy as
    in bce. The sum over the batch is divided by its number of samples, not by their weights as torch does for labels,
    so that the gradient does not depend on how a global batch is split.

    Args:
        config: Config section `train`, as returned by `with_class_weights`.
        mixes: Whether batches use mixup or CutMix.
        device: Device of the model.
        compiled: Compiles the loss function, such as `ExecutionPlan.compiled`. Default: it is not compiled.

    Raises:
        UserError: train.loss names code that cannot be imported, or a class that needs arguments.
    """
    is_cross_entropy, threshold = config.loss == "cross-entropy", config.bce_threshold
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, device=device)
    if is_cross_entropy and not mixes and weights is None:
        return compiled(loss_and_counts)
    if config.loss not in LOSSES:
        return custom_loss(config.loss, mixes or config.label_smoothing > 0, device, compiled)

    def soft_loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        logits, targets, correct = _soft(model, batch, label_smoothing)
        if is_cross_entropy:
            return _with_counts(F.cross_entropy(logits, targets, weights), correct, batch)
        return _with_counts(binary_cross_entropy(logits, targets, threshold, weights), correct, batch)

    return compiled(soft_loss_and_counts)


def custom_loss(
    name: str, is_soft: bool, device: torch.device | None, compiled: Callable[[LossAndCounts], LossAndCounts]
) -> LossAndCounts:
    """Return the user's function (logits, labels) -> loss as a loss function, see `build_loss`.

    The function is called with logits of at least float32 [B, C] on the device, with autocast as in the forward pass,
    and with the labels. It returns the loss as a tensor []. A class is called without arguments to get the function.

    Args:
        name: The value of train.loss.
        is_soft: Whether labels are the target probabilities [B, C], with the dtype of the logits. Otherwise they are
            int64 [B].
        device: Device to which a loss that is a module is moved.
        compiled: Compiles the loss function.
    """
    function = _load_loss(name, device)

    def custom_loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        logits, targets, correct = _soft(model, batch, label_smoothing)
        loss = function(logits, targets if is_soft else batch.labels)
        return _with_counts(_checked_loss(loss, logits, name), correct, batch)

    run = compiled(custom_loss_and_counts)

    def explained_loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        try:
            return run(model, batch, label_smoothing)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception:  # the user's code may raise anything, and torch.compile wraps it
            if batch.images.is_cuda and torch.cuda.is_current_stream_capturing():
                raise  # as an error of the capture
            # Run uncompiled to find out whether the function or the model fails, and where.
            network = model.module if isinstance(model, DistributedDataParallel) else model
            logits, targets, _ = _soft(network, batch, label_smoothing)
            try:
                loss = function(logits, targets if is_soft else batch.labels)
            except Exception as error:
                _raise_failed(name, error, is_soft)
            _checked_loss(loss, logits, name)
            raise

    return explained_loss_and_counts


def _load_loss(name: str, device: torch.device | None) -> Callable[..., object]:
    """Import the function that train.loss names. Call a class without arguments, and return the object."""
    found = load_object(name, "train.loss")
    if not isinstance(found, type):
        return found
    try:
        loss = found()
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"train.loss={name} is a class, and calling it without arguments failed: {describe_error(error)}; give its "
            "arguments defaults, or name a function (logits, labels) -> loss"
        ) from error
    if not callable(loss):
        raise UserError(f"train.loss={name} is a class without __call__; name a function (logits, labels) -> loss")
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def _checked_loss(loss: object, logits: Tensor, name: str) -> Tensor:
    """Return the user's loss if it is a tensor of one float that depends on the logits. Raise UserError otherwise."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        found = f"{list(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"train.loss={name} returns {found}, but must return the mean loss of the batch as a tensor of one "
            "float (shape []), e.g. loss.mean()"
        )
    if logits.requires_grad and not loss.requires_grad:
        raise UserError(
            f"train.loss={name} returns a loss without a gradient; compute it from the logits with differentiable "
            "operations (not argmax, detach or item)"
        )
    return loss


def _raise_failed(name: str, error: Exception, is_soft: bool) -> NoReturn:
    hint = ""
    if is_soft:
        hint = "; labels are probabilities [B, C] here because of train.label_smoothing, mixup or CutMix"
    raise UserError(f"train.loss={name} failed: {describe_error(error)}{hint}") from error


def loss_and_counts(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a batch without mixing, and the sums (loss * samples, correct, samples).

    See `build_loss`.
    """
    logits = model(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    correct = (logits.detach().argmax(1) == batch.labels).sum()
    return _with_counts(loss, correct, batch)


def with_class_weights(config: TrainConfig, labels: Callable[[], np.ndarray], classes: int) -> TrainConfig:
    """Return the config section `train` with balanced class weights as numbers, like scikit-learn's.

    Args:
        config: Config section `train`.
        labels: Returns the labels of all training samples, int [samples]. Called only for train.class_weights=balanced.
        classes: Number of classes. Classes without samples have weight 1.
    """
    if config.class_weights != "balanced":
        return config
    counts = np.bincount(labels(), minlength=classes)
    balanced = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return config.model_copy(update={"class_weights": tuple(np.where(counts > 0, balanced, 1.0).tolist())})


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, threshold: float | None, weights: Tensor | None = None
) -> Tensor:
    """Return the mean binary cross-entropy over samples and classes, like timm's BinaryCrossEntropy.

    `logits` and `targets` are float [B, C]. If `threshold` is given, targets above it become 1 and all others 0. The
    terms of the targets are multiplied by `weights`, float [C], if given.
    """
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)


def soft_targets(labels: Tensor, classes: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """Return smoothed one-hot targets [B, classes] for int64 labels [B].

    The share `label_smoothing` is spread evenly over all classes, including the true class.
    """
    is_label = labels[:, None] == torch.arange(classes, device=labels.device)
    return is_label.to(dtype) * (1.0 - label_smoothing) + label_smoothing / classes


def _soft(model: nn.Module, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits [B, C], the targets [B, C], and the number of correct predictions.

    The number of correct predictions can be fractional if samples are mixed. Logits and targets have at least the
    precision of float32.
    """
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
    """Return the loss and the sums (loss * samples, correct, samples), see `build_loss`."""
    samples = torch.full_like(correct, len(batch.labels))
    return loss, torch.stack([loss.detach().double() * len(batch.labels), correct.double(), samples.double()])


def swap_pairs(values: Tensor) -> Tensor:
    """Swap samples 2i and 2i + 1 of values [B, ...] for every i. Return a copy with the same strides."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Mix the images 2i and 2i + 1 with each other for every i, by mixup or CutMix.

    Args:
        images: uint8 [B, 3, H, W].
        mix: Table returned by `pipelines.augment.mixup.mix_table`, float32 [B, 5].

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
    """Return the batch as a `MixedBatch` whose samples all have share 1, so that mixing changes nothing."""
    table = torch.from_numpy(identity_table(len(batch.labels)))
    return MixedBatch(batch.images, batch.labels, table.to(batch.images.device))


class RenderedBatch(NamedTuple):
    """A batch as the model sees it, for images in logs.

    Attributes:
        images: uint8 [B, 3, H, W], mixed and rounded.
        labels: Labels of the samples, int64 [B].
        others: Labels of the partners mixed into the samples, int64 [B]. Without mixing, they are equal to `labels`.
        shares: Shares of `labels` in the targets, float32 [B]. The shares of `others` are 1 minus these.
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    shares: Tensor


def render_batch(batch: Batch) -> RenderedBatch:
    """Return the batch as the model sees it. The tensors are copies, so the loader can reuse its buffers."""
    if not isinstance(batch, MixedBatch):
        labels = batch.labels.clone()
        return RenderedBatch(batch.images.clone(), labels, labels, torch.ones(len(labels), device=labels.device))
    images = mix_images(batch.images, batch.mix).round().to(torch.uint8)
    return RenderedBatch(images, batch.labels.clone(), swap_pairs(batch.labels), batch.mix[:, 0].clone())
