"""Predict a set of images with one checkpoint or the average of several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from tools.inference.image_sets import ImageSet
from train.engine.evaluate import Evaluation, loss_and_hits
from train.trained_model import TrainedModel, predicted_batches

CHUNK_SIZE = 4096  # images per operation, to avoid a copy of all logits


def predict(
    models: Sequence[TrainedModel], images: ImageSet, tta: str | None, batch_size: int | None
) -> tuple[np.ndarray, list[Evaluation], Evaluation | None]:
    """Predict all images with all models.

    The logits of a single model are returned unchanged. For several models, the result is the logarithm of the mean
    probabilities, computed with logaddexp, so that no probability underflows to 0.

    Args:
        models: The models to average.
        images: The images to predict.
        tta: Test-time augmentation, or None for the eval.tta of each model's config.
        batch_size: Images per batch, or None for the eval.batch_size of each model's config.

    Returns:
        A tuple (logits, evaluations, average) of float32 [N, C] logits on the host, the evaluation of each model, and
        the evaluation of `logits`. If the images have no labels, `evaluations` is empty and `average` is None.

    Raises:
        UserError: A data set cannot be read or has changed, or a logit is not finite.
        RuntimeError: Some samples were missed or counted twice.
    """
    several = len(models) > 1
    logits = np.empty((len(images), len(models[0].dataset.classes)), np.float32)
    each: list[Evaluation] = []
    with progress_bar(total=len(images) * len(models), desc="predict", unit=" images", unit_scale=True) as bar:
        for number, (model, folder) in enumerate(zip(models, images.folders, strict=True)):
            sums = torch.zeros(4, dtype=torch.float64, device=model.state.device)
            start = 0
            for batch, labels in predicted_batches(model, folder, images.split, tta, batch_size):
                sums += loss_and_hits(batch, labels)  # bitwise as in training's evaluation
                values = (batch.log_softmax(1) if several else batch).cpu().numpy()  # synchronizes with the device
                check_finite(values, model, images, start)
                part = logits[start : start + len(values)]
                part[:] = values if number == 0 else np.logaddexp(part, values)
                start += len(values)
                bar.update(len(values))
            if start != len(images):
                raise RuntimeError(f"predicted {start} of {len(images)} images")
            each += [evaluation(sums, len(images))] if images.labels is not None else []
    if several:
        logits -= np.float32(np.log(len(models)))
    if images.labels is None:
        return logits, [], None
    return logits, each, evaluate_logits(logits, images.labels) if several else each[0]


def check_finite(logits: np.ndarray, model: TrainedModel, images: ImageSet, start: int) -> None:
    """Raise UserError if a logit is not finite. `logits` [B, C] are those of B images, starting at index `start`."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        more = f" and {len(bad) - 1} more images of its batch" if len(bad) > 1 else ""
        raise UserError(
            f"{model.path} gives logits that are not finite for {images.describe(start + int(bad[0]))}{more}: its "
            "weights have diverged or overflow; use another checkpoint"
        )


def evaluation(sums: Tensor, samples: int) -> Evaluation:
    """Return the evaluation of `samples` labeled samples, computed from sums of `loss_and_hits`."""
    loss, top1, top5, _ = sums.tolist()
    return Evaluation(loss / samples, top1 / samples, top5 / samples, samples)


def evaluate_logits(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    parts = zip(torch.from_numpy(logits).split(CHUNK_SIZE), torch.from_numpy(labels).split(CHUNK_SIZE), strict=True)
    return evaluation(sum((loss_and_hits(*part) for part in parts), torch.zeros(4, dtype=torch.float64)), len(labels))


def top_classes(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` most probable classes of each image.

    Returns:
        The class indices, int64 [N, count], in order of decreasing probability, and the probabilities, float32
        [N, count].
    """
    parts = [(part.topk(count), part.logsumexp(1, keepdim=True)) for part in torch.from_numpy(logits).split(CHUNK_SIZE)]
    numbers = torch.cat([best.indices for best, _ in parts])
    probabilities = torch.cat([(best.values - total).exp() for best, total in parts])
    return numbers.numpy(), probabilities.numpy()
