"""Show pictures of a run in the trackers: augmented samples, predictions and the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import Config
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives
from train.engine.evaluate import check_full_coverage, predictions
from train.engine.losses import RenderedBatch, render_batch
from train.engine.state import TrainState
from train.reporting import figures, image_grids
from train.reporting.run_log import RunLog

GRID_IMAGES = 20


def show_samples(log: RunLog, loader: TrainLoader, classes: Sequence[str]) -> None:
    """Show images of the next training batch in the trackers, as the model sees them.

    The position of `loader` is unchanged. No-op without trackers.
    """
    if not log.has_trackers:
        return
    position = loader.position
    batches = iter(loader)
    first = next(batches)
    rendered = RenderedBatch(*(part[:GRID_IMAGES] for part in render_batch(first)))
    del batches, first  # ends the prefetch threads
    loader.position = position
    log.log_figure(
        "pictures/train_samples", lambda: image_grids.training_grid(rendered, classes, "train, augmented"), 0
    )


def show_predictions(
    log: RunLog, state: TrainState, loader: EvalLoader, config: Config, classes: Sequence[str], *, step: int
) -> None:
    """Show the confusion matrix of the validation split, and predictions for some images of rank 0, in the trackers.

    All ranks must call this function together, since it evaluates the split.

    Args:
        log: Log with the trackers.
        state: Training state.
        loader: Loader of the validation split.
        config: Config of the run.
        classes: Class names.
        step: Optimizer steps done so far.

    Raises:
        RuntimeError: Some samples were missed or counted twice.
        UserError: The data set cannot be read or has changed.
    """
    counts, shown, logits = collect_predictions(state, loader, config.eval.tta, len(classes))
    if not log.has_trackers:
        return
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    title = f"{config.data.val_split}, top-1 accuracy {accuracy:.2%}"
    log.log_figure("pictures/confusion_matrix", lambda: figures.confusion_matrix(counts, classes, title), step)
    log.log_figure(
        "pictures/predictions",
        lambda: image_grids.prediction_grid(shown.images, shown.labels, logits, classes, title),
        step,
    )


def collect_predictions(
    state: TrainState, loader: EvalLoader, tta: str, classes: int
) -> tuple[np.ndarray, Batch, Tensor]:
    """Evaluate a split, and keep the predictions for some of its samples. All ranks must call this function.

    Args:
        state: Training state.
        loader: Loader of the split.
        tta: The value of eval.tta.
        classes: Number of classes.

    Returns:
        A tuple (counts, batch, logits). `counts` are the confusion counts over all ranks, int64 [C, C]. `batch`
        contains images and labels of up to GRID_IMAGES evenly spaced samples of this rank, and `logits` contains the
        logits of the same samples.

    Raises:
        RuntimeError: Some samples were missed or counted twice.
        UserError: The data set cannot be read or has changed.
    """
    samples = loader.plan.samples
    wanted = np.linspace(0, samples - 1, min(GRID_IMAGES, samples)).round().astype(int)
    current: list[Batch] = []  # the batch of the latest predictions

    def remember_batches() -> Iterator[Batch]:
        for batch in loader:
            current[:] = [batch]
            yield batch

    counts = torch.zeros((classes, classes), dtype=torch.int64)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for logits, labels in predictions(state, remember_batches(), tta):
        predicted, _ = image_grids.predicted_classes(logits)
        counts += torch.from_numpy(image_grids.confusion_counts(labels, predicted, classes))
        rows = torch.from_numpy(wanted[(wanted >= start) & (wanted < start + len(labels))] - start).to(state.device)
        kept.append((current[0].images[rows], labels[rows], logits[rows]))
        start += len(labels)
    check_full_coverage(loader)
    total = collectives.sum_over_ranks(counts).numpy()
    if not kept:  # more ranks than samples
        empty = torch.empty((0, 3, 1, 1), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        kept = [(*empty, torch.empty((0, classes)))]
    images, labels, logits = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return total, Batch(images, labels), logits
