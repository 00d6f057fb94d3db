"""Evaluation on a split: predictions, test-time augmentation, loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import MODULUS, EvalLoader, SampleChecksum, split_checksum
from train.distributed import collectives
from train.engine.state import TrainState

HALF = 2**32  # checksums are summed in 32-bit halves, so that sums over ranks fit into int64


@dataclass(frozen=True)
class Evaluation:
    """Results over a whole split.

    `loss` is the mean cross-entropy. `top1` and `top5` are accuracies from 0 to 1. `samples` is the size of the split.
    """

    loss: float
    top1: float
    top5: float
    samples: int

    def sentence(self, split: str) -> str:
        """Return the results as a sentence to print. `split` is the name of the split."""
        return f"{split} loss {self.loss:.4f}, top1 {self.top1:.4f}, top5 {self.top5:.4f} over {self.samples} samples"


class EvaluationInterrupted(Exception):
    """Raised on all ranks together when the evaluation is interrupted on any rank."""


def predictions(state: TrainState, loader: Iterable[Batch], tta: str = "none") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits, labels) of each batch, in the order of the loader.

    Logits are float32 [B, num_classes]. Labels are int64 [B], with -1 for unlabeled samples. A smaller last batch is
    padded to the size of the other batches, so that a compiled model sees one shape. The logits of the padding are
    removed. All ranks must iterate, even without batches, since the buffers of rank 0 are broadcast first.

    Args:
        state: Training state. The network is left in evaluation mode.
        loader: Batches of this rank.
        tta: Test-time augmentation, see eval.tta.
    """
    collectives.broadcast_buffers(state.network)
    state.infer.eval()
    full_size = 0
    for images, labels in loader:
        full_size = max(full_size, len(labels))
        missing = full_size - len(labels)
        if missing:  # otherwise padding would copy the batch
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), state.plan.autocast():
            logits = mean_logits(state.infer, images, tta)
        yield logits[: len(labels)], labels


def evaluate(
    state: TrainState,
    loader: Iterable[Batch],
    samples: int,
    tta: str = "none",
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Return the loss and accuracy on a split, over all ranks. All ranks must call this function.

    Args:
        state: Training state. The network is left in evaluation mode.
        loader: Batches of this rank.
        samples: Number of samples in the split, over all ranks.
        tta: Test-time augmentation, see eval.tta.
        is_interrupted: Called for each batch. If it returns True, the remaining batches of this rank are skipped.

    Raises:
        EvaluationInterrupted: `is_interrupted` returned True on any rank.
        RuntimeError: Some samples have no label, were missed or were counted twice.
        UserError: The data cannot be read or have changed.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=state.device)  # the last one counts interrupted ranks
    for logits, labels in predictions(state, loader, tta):
        if is_interrupted():
            sums[4] = 1
            break
        sums[:4] += loss_and_hits(logits, labels)
    loss_sum, top1, top5, count, interrupted = collectives.sum_over_ranks(sums).tolist()
    if interrupted:
        raise EvaluationInterrupted
    check_full_coverage(loader)
    if int(count) != samples:
        raise RuntimeError(f"evaluation counted {int(count)} samples of a split of {samples}")
    return Evaluation(loss_sum / samples, top1 / samples, top5 / samples, samples)


def loss_and_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss and the numbers of top-1 hits, top-5 hits and labeled samples of a batch, float64 [4].

    Samples with label -1 do not count. Does not synchronize.
    """
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()]).double()


def check_full_coverage(loader: Iterable[Batch]) -> None:
    """Check that the last evaluation pass visited every sample of the split exactly once across all ranks.

    All ranks must call this function. No-op for batches that do not come from an `EvalLoader`, e.g. in warm-up.

    Raises:
        RuntimeError: Some samples were missed or counted twice.
        UserError: A file of the data set has changed.
    """
    if not isinstance(loader, EvalLoader):
        return
    loader.check_unchanged()
    seen = loader.seen
    upper, lower = divmod(seen.checksum, HALF)
    samples, upper, lower = collectives.sum_over_ranks(torch.tensor([seen.samples, upper, lower])).tolist()
    found, expected = SampleChecksum(samples, (upper * HALF + lower) % MODULUS), split_checksum(len(loader.split))
    name = loader.split.name
    if found.samples != expected.samples:
        raise RuntimeError(
            f"evaluation counted {found.samples} samples of split {name!r}, which has {expected.samples}"
        )
    if found != expected:
        raise RuntimeError(
            f"evaluation counted the {expected.samples} samples of split {name!r}, but not each of them once: "
            "their checksum differs from that of the split"
        )


def views(images: Tensor, tta: str) -> Iterator[tuple[float, Tensor]]:
    """Yield (weight, images [B, 3, H, W]) for each view of test-time augmentation `tta`. The weights sum to 1.

    "none" yields only the image itself. "flip" adds its horizontal mirror image. "flip-translate" also adds two copies,
    shifted by one pixel up-left and down-right with reflected edges, and the mirror image of each copy. A shifted view
    has half the weight of an unshifted one.

    Source: arXiv:2404.00498, section 3.5.
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
    """Shift images [B, 3, H, W] diagonally by one pixel, with reflected edges.

    Args:
        images: Images to shift.
        by: 1 to shift down and right, -1 to shift up and left.
    """
    for axis in (2, 3):  # concatenated slices take a tenth of the time of an indexed copy
        length = images.shape[axis]
        if by > 0:
            parts = [images.narrow(axis, 1, 1), images.narrow(axis, 0, length - 1)]
        else:
            parts = [images.narrow(axis, 1, length - 1), images.narrow(axis, length - 2, 1)]
        images = torch.cat(parts, dim=axis)
    return images.contiguous(memory_format=torch.channels_last)


def mean_logits(infer: Callable[[Tensor], Tensor], images: Tensor, tta: str) -> Tensor:
    """Return the weighted mean of the logits over all views, float32 [B, num_classes].

    The views are evaluated one by one, each in the shape of `images`, so that a compiled model sees one shape.
    """
    # The product is a new tensor, since replaying a CUDA graph overwrites its output.
    return reduce(torch.add, (infer(view).float() * weight for weight, view in views(images, tta)))
