"""Everything that makes the batches of one image size and batch size."""

from __future__ import annotations

import copy
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from configs.schema import AugConfig
from configs.utils.errors import UserError
from pipelines.interfaces import Draws, Position, StoredImages, no_wait
from pipelines.loader.backend import Backend
from pipelines.loader.bad_samples import BadSamples, Undecodable
from pipelines.loader.batches import BatchPlan, ChosenSamples
from pipelines.storage.split import ReadingPlan

IN_FLIGHT = 2  # maximum number of batches in the runner
MAX_GROUP = 8  # maximum number of batches that are gathered together
GROUP_BYTES = 2**24  # maximum size of a group of several batches


class HostBatch(NamedTuple):
    """A gathered batch, ready to be submitted to the runner."""

    images: StoredImages
    labels: np.ndarray  # int64 [B], or [B * views] if views are flat; -1 if the split has no labels
    indices: np.ndarray  # int64 [B]
    draws: Draws
    slot: int
    is_last: bool = True  # whether this is the last batch of the slot's group; after it, the slot is free

    def piece(self, start: int, stop: int) -> HostBatch:
        """Return the samples from `start` to `stop`, which are not the last of the group."""
        samples = len(self.indices)

        def rows(values: Sized) -> slice:
            each = len(values) // samples  # rows per sample
            return slice(start * each, stop * each)

        images, labels, indices = (
            self.images[rows(self.images)],
            self.labels[rows(self.labels)],
            self.indices[start:stop],
        )
        draws = {name: values[rows(values)] for name, values in self.draws.items()}
        return HostBatch(images, labels, indices, draws, self.slot, is_last=False)


class Stage:
    """A plan, the source and runner of a backend, and the slots between them.

    Consecutive batches are gathered in groups, one group per slot, because for small batches the function calls and
    thread wake-ups take longer than gathering the samples.

    Args:
        plan: Plan that determines the batches.
        backend: Backend that makes them.
        bad: Bad samples found so far, shared by all stages.

    Attributes:
        batch_images: Images per batch, except for a smaller last one: the samples times their views.
        splits_views: Whether batches have views as a dimension.
        slots: Number of slots.
        slot_waits: For each slot, a function that blocks until the device has finished reading the slot.
    """

    def __init__(self, plan: BatchPlan, backend: Backend, bad: BadSamples) -> None:
        self.plan, self.backend, self.bad = plan, backend, bad
        spec = backend.spec
        self.image_size = spec.image_size
        self.batch_images, self.splits_views = plan.batch_size * spec.views, spec.views > 1 and not spec.flat_views
        batch_bytes = self.batch_images * math.prod(backend.image_shape)
        self._max_group = max(1, min(MAX_GROUP, GROUP_BYTES // max(batch_bytes, 1)))
        groups_ahead = -(-max(spec.data.prefetch, IN_FLIGHT) // self._max_group) + 1
        self.slots = groups_ahead + 2 * backend.threads
        self.slot_waits: list[Callable[[], None]] = [no_wait] * self.slots
        split = bad.split
        self._residency = None if backend.spec.pixels is not None else split.residency  # None: all samples are here
        if self._residency is not None:
            self._residency.check_space(self._reading_plan(), backend.threads * self._max_group)
        self._users: deque[weakref.WeakMethod[Callable[[], None]]] = deque(maxlen=1)  # closes the user of the slots
        # The allocator reuses the source's memory only after this stream has finished using the memory.
        with torch.cuda.stream(backend.stream):
            self.source = backend.source(self.slots, plan.batch_size * backend.source_views * self._max_group)
        self.runner = backend.runner()

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self.plan.steps

    def select(self, samples: np.ndarray) -> Stage:
        """Return a stage whose epochs consist of `samples`, int64 [N], in this order. Each is augmented as before.

        Both stages have the same source, runner and slots, so use one at a time.
        """
        stage = copy.copy(self)
        stage.plan = ChosenSamples(self.plan, samples)
        return stage

    def _reading_plan(self) -> ReadingPlan:
        spec = self.backend.spec
        order = spec.data.order if isinstance(spec.transforms, AugConfig) else ""
        return ReadingPlan(lambda epoch: self.plan.shard_schedule(epoch, spec.split.shard), self.plan.steps, order)

    def follow(self, position: Position) -> Callable[[], None]:
        """Fetch shards ahead of the batches from a position on, and return a function that ends this."""
        residency = self._residency
        if residency is None or residency.is_complete:
            return no_wait
        return partial(residency.unfollow, residency.follow(self._reading_plan(), position.epoch, position.step))

    def add_epoch(self, epoch: int) -> None:
        """Fetch the shards of another epoch after those of the ones before."""
        if self._residency is not None and not self._residency.is_complete:
            self._residency.add_epoch(epoch)

    def claim_slots(self, close: Callable[[], None]) -> None:
        """Call the method `close` of the previous user of the slots, and keep that of the new user.

        Only a weak reference to the user is kept.
        """
        for reference in self._users:
            if (close_previous := reference()) is not None:
                close_previous()
        self._users.append(weakref.WeakMethod(close))

    def groups(self, first: int, *, grow: bool = True) -> Iterator[range]:
        """Yield the groups of consecutive batches of an epoch that starts with batch `first`.

        If `grow`, the group size starts at 1 and doubles after every `backend.threads` groups, for the groups that
        training waits for. Otherwise, all groups have the maximum size.
        """
        number = 0
        while first < len(self):
            size = min(self._max_group, 2 ** (number // self.backend.threads)) if grow else self._max_group
            yield range(first, min(first + size, len(self)))
            first, number = first + size, number + 1

    def gather_group(self, epoch: int, steps: range, slot: int) -> list[HostBatch]:
        """Fill a slot with the batches numbered `steps` and return them in reverse order.

        Raises:
            UserError: A file of the source has changed, or bad samples cannot be replaced.
        """
        if self._residency is not None and not self._residency.is_complete:
            self._residency.advance(epoch, steps.start)
        batches = [self.plan.indices(epoch, step) for step in steps]
        group = self.gather(epoch, batches[0] if len(batches) == 1 else np.concatenate(batches), slot)
        if len(batches) == 1:
            return [group]
        size = self.plan.batch_size
        pieces = [group.piece(start, start + size) for start in range(0, len(group.indices), size)]
        pieces[-1] = pieces[-1]._replace(is_last=True)
        return pieces[::-1]

    def gather(self, epoch: int, wanted: np.ndarray, slot: int) -> HostBatch:
        """Fill a slot with the samples `wanted`, int64 [N], and replace bad samples with their substitutes.

        The labels, indices and draws of a replaced sample are those of the substitute.

        Raises:
            UserError: A file of the source has changed, or bad samples cannot be replaced.
        """
        stored_labels, stream = self.bad.split.labels, self.backend.stream
        spec, source_views = self.backend.spec, self.backend.source_views
        while True:
            indices = self.bad.substitute(wanted)
            draws = self.backend.inputs(self.plan.draws(epoch, indices))
            labels = np.full(len(indices), -1) if stored_labels is None else stored_labels[indices]
            if spec.flat_views:
                labels = labels.repeat(spec.views)
            rows = indices if source_views == 1 else indices.repeat(source_views)
            self.slot_waits[slot]()
            try:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    return HostBatch(self._fill(slot, rows, draws), labels, indices, draws, slot)
            except Undecodable as found:
                self.bad.add(found.defects, self._defect)

    def _fill(self, slot: int, indices: np.ndarray, draws: Draws) -> StoredImages:
        """Fill a slot and return its images.

        Raises:
            UserError: A file of the source has changed.
            Undecodable: Samples cannot be decoded.
        """
        try:
            with nullcontext() if self._residency is None else self.bad.split.hold(indices):
                images = self.source.fill(slot, indices, draws)
        except Exception:
            self.source.check_unchanged()  # report a changed file rather than the sample that it broke
            raise
        self.source.poll()
        return images

    def add_bad_samples(self, batches: list[HostBatch], error: RuntimeError) -> None:
        """Add the bad samples that made the runner fail with `error` while it had `batches` to the record.

        DALI's errors do not name a sample. This method therefore searches the batches for the first one with samples
        that cannot be decoded.

        Raises:
            UserError: A file has changed, or bad samples cannot be replaced.
            RuntimeError: `error`, if all samples can be decoded.
        """
        self.source.check_unchanged()  # report a changed file rather than the sample that it broke
        defects = next(filter(None, map(self._defects, batches)), None)  # usually in the first batch
        if defects is None:
            raise error
        try:
            self.bad.add(defects, self._defect)
        except UserError as refusal:
            raise refusal from error

    def _defects(self, host_batch: HostBatch) -> dict[int, str]:
        """Return the reason for each bad sample of a batch, keyed by the index of the sample.

        This is slow, since the samples are decoded one by one.
        """
        found = ((sample, self._defect(sample)) for sample in host_batch.indices.tolist())
        return {sample: reason for sample, reason in found if reason is not None}

    def _defect(self, sample: int) -> str | None:
        with self.bad.split.hold(slice(sample, sample + 1)):
            return self.source.defect(sample)
