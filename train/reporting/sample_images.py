"""The pictures of a run that trackers show: samples as augmented, predictions, confusion. Drawing is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import Config
from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives
from train.engine.evaluate import check_full_coverage, predictions
from train.engine.losses import RenderedBatch, render_batch
from train.engine.state import TrainState
from train.reporting import figures, image_grids
from train.reporting.run_log import RunLog

GRID_IMAGES = 20  # in a grid


def show_samples(log: RunLog, loader: TrainLoader, classes: Sequence[str]) -> None:
    """The first images of the training stream, as the model will see them; `loader` stands where it stood."""
    if not log.has_trackers:
        return
    state = loader.state
    batches = iter(loader)
    first = next(batches)
    seen = RenderedBatch(*(part[:GRID_IMAGES] for part in render_batch(first)))
    del batches, first  # ends the threads that work ahead
    loader.state = state
    log.log_figure("pictures/train_samples", lambda: image_grids.training_grid(seen, classes, "train, augmented"), 0)


def show_predictions(
    log: RunLog, training: TrainState, loader: Loader, config: Config, classes: Sequence[str], *, step: int
) -> None:
    """A last pass over the validation split, which all ranks must join: confusion over all, images of the first's."""
    counts, shown, logits = collect_predictions(training, loader, config.eval.tta, len(classes))
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
    training: TrainState, loader: Loader, tta: str, classes: int
) -> tuple[np.ndarray, Batch, Tensor]:
    """Confusion counts over all ranks' pieces, and images, labels and logits of some samples of this rank's piece."""
    samples = loader.plan.samples
    wanted = np.linspace(0, samples - 1, min(GRID_IMAGES, samples)).round().astype(int)
    held: list[Batch] = []  # the batch whose predictions are being looked at

    def holding() -> Iterator[Batch]:
        for batch in loader:
            held[:] = [batch]
            yield batch

    counts = torch.zeros((classes, classes), dtype=torch.int64)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    begin = 0
    for logits, labels in predictions(training, holding(), tta):
        counts += torch.from_numpy(
            image_grids.confusion_counts(labels, image_grids.predicted_classes(logits)[0], classes)
        )
        inside = wanted[(wanted >= begin) & (wanted < begin + len(labels))] - begin
        here = torch.from_numpy(inside).to(training.device)
        kept.append((held[0].images[here], labels[here], logits[here]))
        begin += len(labels)
    check_full_coverage(loader)
    total = collectives.sum_over_ranks(counts).numpy()
    if not kept:  # more ranks than samples
        nothing = torch.empty((0, 3, 1, 1), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        kept = [(*nothing, torch.empty((0, classes)))]
    images, labels, logits = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return total, Batch(images, labels), logits
