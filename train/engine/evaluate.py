"""Evaluation of a model on a split, and test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.loader.batches import Batch
from pipelines.loader.coverage import MODULUS, SampleChecksum, split_checksum
from pipelines.loader.loader import Loader
from train.distributed import collectives
from train.engine.state import TrainState

HALF = 2**32  # a checksum travels in halves, whose sums over ranks fit into 64 bits with a sign


@dataclass(frozen=True)
class Evaluation:
    """Means over a whole split; top1 and top5 are fractions."""

    loss: float
    top1: float
    top5: float
    samples: int

    def sentence(self, split: str) -> str:
        """As every command says it, of a split by this name."""
        return f"{split} loss {self.loss:.4f}, top1 {self.top1:.4f}, top5 {self.top5:.4f} over {self.samples} samples"


class EvaluationInterrupted(Exception):
    """An evaluation that was broken off, on all ranks alike."""


def predictions(state: TrainState, loader: Iterable[Batch], tta: str = "none") -> Iterator[tuple[Tensor, Tensor]]:
    """(logits float32 [B, num_classes], labels int64 [B], -1 where there is none) of each batch, in the loader's order.

    tta: test-time augmentation, eval.tta.

    The last batch is filled up to the size of the others, so that a compiled model sees one shape; the filling is cut
    off its logits.
    """
    collectives.broadcast_buffers(state.network)
    state.infer.eval()
    full = 0
    for images, labels in loader:
        full = max(full, len(labels))
        missing = full - len(labels)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), state.autocast():
            logits = mean_logits(state.infer, images, tta)
        yield logits[: len(labels)], labels


def evaluate(
    state: TrainState,
    loader: Iterable[Batch],
    samples: int,
    tta: str = "none",
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss and accuracy over all ranks' pieces of a split of `samples`; fails when they do not add up to it.

    is_interrupted: asked between batches; once it is true on any rank, all of them raise Interrupted.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=state.device)  # the last: ranks that were interrupted
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
    """Float64 [4]: sums over the batch of loss, top-1 and top-5 hits, and labelled samples. Does not synchronise."""
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()]).double()


def check_full_coverage(loader: Iterable[Batch]) -> None:
    """Raise RuntimeError unless the last iteration over an evaluation's loader, finished on all ranks, has handed over
    each sample of the split once. Other batches, such as those that a model is warmed up with, have no samples."""
    if not isinstance(loader, Loader):
        return
    loader.check_unchanged()
    upper, lower = divmod(loader.seen.checksum, HALF)
    samples, upper, lower = collectives.sum_over_ranks(torch.tensor([loader.seen.samples, upper, lower])).tolist()
    found, expected = SampleChecksum(samples, (upper * HALF + lower) % MODULUS), split_checksum(len(loader.split))
    name = loader.split.name
    if found.samples != expected.samples:
        raise RuntimeError(
            f"evaluation counted {found.samples} samples of split {name!r}, which has {expected.samples}"
        )
    if found != expected:
        raise RuntimeError(
            f"evaluation counted the {expected.samples} samples of split {name!r}, but not each of them once: "
            "their checksum is not the split's"
        )


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
