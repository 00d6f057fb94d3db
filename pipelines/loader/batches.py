"""Batches, and the plans that determine their samples and random augmentation parameters (draws)."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
import torch

from pipelines import order
from pipelines.augment import mixup
from pipelines.augment.sampler import AugmentationSampler, draw_views
from pipelines.interfaces import Draws
from pipelines.loader.epoch_order import ReadAhead, TrainOrder


class Batch(NamedTuple):
    """Images and labels on the device.

    Attributes:
        images: uint8 [B, 3, H, W] with channels_last strides. With data.views > 1, [B, views, 3, H, W], or
            [B * views, 3, H, W] if the loader flattens views; the views of a sample are next to each other in memory.
        labels: int64 [B], or [B * views] if the loader flattens views; -1 if the split has no labels.
    """

    images: torch.Tensor
    labels: torch.Tensor


class MixedBatch(Batch):
    """A batch whose samples are still to be mixed with their neighbors.

    Attributes:
        mix: float32 [B, 5], see `mixup.mix_table`.
    """

    mix: torch.Tensor

    def __new__(cls, images: torch.Tensor, labels: torch.Tensor, mix: torch.Tensor) -> MixedBatch:
        batch = super().__new__(cls, images, labels)
        batch.mix = mix
        return batch


class BatchPlan:
    """Base class of plans, which determine the batches of each epoch on this rank.

    Methods are called from several threads. A method's result depends only on its arguments and the plan's constructor
    arguments.
    """

    samples: int  # samples per epoch
    batch_size: int  # the last batch may be smaller

    @property
    def steps(self) -> int:
        """Number of batches per epoch."""
        return -(-self.samples // self.batch_size)

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Return the indices of the samples of a batch, int64 [B]."""
        raise NotImplementedError

    def shard_schedule(self, epoch: int, shard: np.ndarray) -> order.ShardSchedule:
        """Return which shards the batches of an epoch read, and when.

        For training, these are the batches of all ranks of this machine. `shard` is the shard of each sample of the
        split, int [samples].
        """
        samples = np.concatenate([self.indices(epoch, step) for step in range(self.steps)])
        return order.shard_schedule(samples, shard, self.steps, self.batch_size)

    def draws(self, epoch: int, samples: np.ndarray) -> Draws:
        """Return the augmentation parameters of each view of `samples`, int64 [N], by name; see `draw_views`."""
        return {}

    def prepare(self, epoch: int) -> None:
        """Precompute the state that `indices` needs for an epoch."""

    def mix(self, epoch: int, step: int, samples: int, size: int) -> np.ndarray | None:
        """Return the `mixup.mix_table` of a batch, or None if the plan does not mix.

        The batch has `samples` images of size x size pixels.
        """
        return None


class TrainBatches(BatchPlan):
    """Shuffled, augmented batches of equal size.

    Args:
        epoch_order: Order of the samples of each epoch.
        batch_size: Samples per batch on this rank.
        steps: Batches per epoch on this rank.
        rank, world_size: Rank of this process, and number of ranks.
        accumulation_steps: Batches per optimizer step.
        samplers: Samplers that draw the augmentation, one per view.
        machines: Number of machines, with equally many consecutive ranks. With order sequential-window, each reads its
            own shards if the number divides data.window_shards.
    """

    def __init__(
        self,
        epoch_order: TrainOrder,
        batch_size: int,
        steps: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        samplers: Sequence[AugmentationSampler],
        machines: int = 1,
    ) -> None:
        self.samples, self.batch_size = steps * batch_size, batch_size
        splits_pairs = batch_size * world_size // machines % 2
        self._order, self._rank, self._world_size = epoch_order, rank, world_size
        self._machines = machines if epoch_order.lanes and not splits_pairs else 1
        lanes = epoch_order.lanes // gcd(epoch_order.lanes, self._machines)  # of this machine
        self._read_ahead = ReadAhead(epoch_order.split, lanes) if lanes else None
        self._accumulation_steps = accumulation_steps
        self._samplers = samplers
        self._mixes = mixup.mixing_enabled(samplers[0].aug.mix)

    def indices(self, epoch: int, step: int) -> np.ndarray:
        if self._read_ahead is not None:
            self._read_ahead(epoch, step, self._schedule(epoch))
        return order.train_batch(
            self._order(epoch), step, self.batch_size, self._rank, self._world_size, self._machines
        )

    def shard_schedule(self, epoch: int, shard: np.ndarray) -> order.ShardSchedule:
        return self._schedule(epoch)

    def _schedule(self, epoch: int) -> order.ShardSchedule:
        return self._order.schedule(epoch, self.steps, self.batch_size, self._rank, self._world_size, self._machines)

    def draws(self, epoch: int, samples: np.ndarray) -> Draws:
        return draw_views(self._samplers, epoch, samples)

    def prepare(self, epoch: int) -> None:
        self._order(epoch)
        if self._read_ahead is not None:
            self._schedule(epoch)

    def mix(self, epoch: int, step: int, samples: int, size: int) -> np.ndarray | None:
        if not self._mixes:
            return None
        return mixup.mix_table(
            self._samplers[0].aug.mix,
            self._samplers[0].seed,
            epoch,
            step,
            samples,
            size,
            positions=order.train_positions(step, samples, self._rank, self._world_size, self._machines),
            accumulation_steps=self._accumulation_steps,
        )


class EvalBatches(BatchPlan):
    """Batches of consecutive samples in stored order, without augmentation. The last batch may be smaller.

    Args:
        start, stop: Range [start, stop) of sample indices.
        batch_size: Samples per batch.
    """

    def __init__(self, start: int, stop: int, batch_size: int) -> None:
        self.samples, self.batch_size = stop - start, batch_size
        self._start, self._stop = start, stop

    def indices(self, epoch: int, step: int) -> np.ndarray:
        first = self._start + step * self.batch_size
        return np.arange(first, min(first + self.batch_size, self._stop))


class ChosenSamples(BatchPlan):
    """Batches of chosen samples, in the same order in every epoch.

    Args:
        plan: Plan that determines the batch size, the draws and the mixing.
        samples: Indices of the chosen samples, int64 [N].
    """

    def __init__(self, plan: BatchPlan, samples: np.ndarray) -> None:
        self.samples, self.batch_size = len(samples), plan.batch_size
        self._plan, self._chosen = plan, samples

    def indices(self, epoch: int, step: int) -> np.ndarray:
        return self._chosen[step * self.batch_size : (step + 1) * self.batch_size]

    def draws(self, epoch: int, samples: np.ndarray) -> Draws:
        return self._plan.draws(epoch, samples)

    def mix(self, epoch: int, step: int, samples: int, size: int) -> np.ndarray | None:
        return self._plan.mix(epoch, step, samples, size)
