"""Background threads that fill slots with batches, ahead of the consumer.

A thread fills one slot with a group of consecutive batches at once, because for small batches the function calls and
thread wake-ups take longer than gathering the samples. Threads take turns, and each thread owns some of the slots.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.interfaces import SampleSource
from pipelines.loader.bad_samples import BadSamples, Undecodable
from pipelines.loader.batches import BatchPlan
from pipelines.loader.coverage import EMPTY, SampleChecksum, checksums


@dataclass(frozen=True)
class BufferConfig:
    """Number and size of slots, and number of threads that fill the slots."""

    slots: int  # a multiple of `threads`; each slot holds one group
    threads: int
    group: int = 1  # maximum number of batches per group


class HostBatch(NamedTuple):
    """A batch in a slot, ready to be submitted to the runner."""

    images: Any
    labels: np.ndarray
    indices: np.ndarray
    draws: dict[str, np.ndarray]
    slot: int
    is_last: bool  # whether this is the last batch of the slot; once the consumer releases it, the slot is free
    checksum: SampleChecksum  # checksum of the batch's samples; EMPTY in training


class PrefetchThreads:
    """Threads that fill slots during one iteration over an epoch.

    Args:
        plan: Plan that determines the batches.
        source: Source that fills the slots.
        labels: int64 [samples of the split], or None if the split has no labels.
        buffers: Number of slots and threads, and size of a slot.
        slot_waits: For each slot, a function that blocks until the slot can be overwritten.
        bad: Record of the bad samples to replace.
        epoch, first: The iteration starts at batch `first` of `epoch`.
        stream: CUDA stream on which samples are gathered, or None on the CPU.
    """

    def __init__(
        self,
        plan: BatchPlan,
        source: SampleSource,
        labels: np.ndarray | None,
        buffers: BufferConfig,
        slot_waits: list[Callable[[], None]],
        bad: BadSamples,
        *,
        epoch: int,
        first: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.plan, self.source, self.labels, self.slot_waits, self.bad = plan, source, labels, slot_waits, bad
        self.epoch, self.stream, self.is_stopping = epoch, stream, False
        groups = _groups(first, plan.steps, buffers.group, ramp=buffers.threads)
        count = buffers.threads
        self._slots_per_thread = slots = buffers.slots // count
        self._threads = [_GatherThread(self, groups[i::count], range(i * slots, (i + 1) * slots)) for i in range(count)]
        self._preparer = threading.Thread(target=self._prepare_next_epoch, name="prepare", daemon=True)
        self._groups_taken = 0
        self._group: list[HostBatch] = []  # remaining batches of the current group, in reverse order
        self._error: BaseException | None = None  # error of the thread whose turn it is

    def get(self, block: bool) -> HostBatch | None:
        """Return the next batch. With `block`, wait until the batch is ready; otherwise return None if it is not ready.

        If the thread that gathers the next batch has failed, its error is raised, but only with `block`. Without
        `block`, earlier batches may still be in the runner, and their errors must be raised first.
        """
        if not self._group and self._error is None:
            try:
                group = self._threads[self._groups_taken % len(self._threads)].ready.get(block=block)
            except queue.Empty:
                return None
            if isinstance(group, BaseException):
                self._error = group
            else:
                if self._groups_taken == 0:  # not earlier, since training waits for the first batch
                    self._preparer.start()
                self._groups_taken += 1
                self._group = group
        if self._error is not None and not self._group:
            if block:
                raise self._error
            return None
        return self._group.pop()

    def release(self, slot: int) -> None:
        """Allow a slot to be filled again. Its gather thread calls `slot_waits[slot]` before refilling the slot."""
        self._threads[slot // self._slots_per_thread].free.put(slot)

    def gather(self, slot: int, wanted: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Fill a slot with the samples `wanted`, int64 [N], and replace bad samples with their substitutes.

        Returns:
            Images, labels int64 [N] (-1 if the split has no labels), sample indices int64 [N], and draws. The labels,
            indices and draws of a replaced sample are those of the substitute.

        Raises:
            UserError: A file of the source has changed, or bad samples cannot be replaced.
        """
        while True:
            indices = self.bad.substitute(wanted)
            draws = self.plan.draws(self.epoch, indices)
            labels = np.full(len(indices), -1) if self.labels is None else self.labels[indices]
            self.slot_waits[slot]()
            try:
                return self._fill(slot, indices, draws), labels, indices, draws
            except Undecodable as found:
                self.bad.add(found.defects, self.source.defect)

    def _fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor | list[np.ndarray]:
        """Fill a slot and return its images.

        Raises:
            UserError: A file of the source has changed.
            Undecodable: Samples cannot be decoded.
        """
        try:
            images = self.source.fill(slot, indices, draws)
        except Exception:
            self.source.check_unchanged()  # report a changed file rather than the sample that it broke
            raise
        self.source.poll()
        return images

    def regather(self, batch: HostBatch) -> HostBatch:
        """Gather a batch again and return it, with substitutes for all samples that are now known to be bad."""
        images, labels, indices, draws = self.gather(batch.slot, batch.indices)
        return batch._replace(images=images, labels=labels, indices=indices, draws=draws)

    def stop(self) -> None:
        """Stop all threads and wait until they have ended."""
        self.is_stopping = True
        for thread in self._threads:
            thread.free.put(None)
        for thread in self._threads:
            thread.join()
        if self._preparer.ident is not None:  # only if it was started
            self._preparer.join()

    def _prepare_next_epoch(self) -> None:
        self.plan.prepare(self.epoch + 1)


def _groups(first: int, steps: int, largest: int, ramp: int) -> list[range]:
    """Split the batch indices range(first, steps) into groups of consecutive indices.

    The group size starts at 1 and doubles after every `ramp` groups, up to `largest`. The first groups are small
    because training waits for them.
    """
    groups: list[range] = []
    while first < steps:
        size = min(largest, 2 ** (len(groups) // ramp))
        groups.append(range(first, min(first + size, steps)))
        first += size
    return groups


class _GatherThread(threading.Thread):
    """Thread that fills its own slots with its share of the batch groups."""

    def __init__(self, owner: PrefetchThreads, groups: list[range], slots: range) -> None:
        super().__init__(name="gather", daemon=True)
        self._owner, self._groups = owner, groups
        self.ready: queue.SimpleQueue[list[HostBatch] | BaseException] = queue.SimpleQueue()
        self.free: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None ends the thread
        for slot in slots:
            self.free.put(slot)
        self.start()

    def run(self) -> None:
        try:
            with torch.cuda.stream(self._owner.stream):
                for steps in self._groups:
                    slot = self.free.get()
                    if slot is None or self._owner.is_stopping:
                        return
                    self.ready.put(self._gather_group(steps, slot))
        except BaseException as error:
            self.ready.put(error)

    def _gather_group(self, steps: range, slot: int) -> list[HostBatch]:
        """Fill a slot with the batches numbered `steps` and return them in reverse order."""
        plan = self._owner.plan
        batches = [plan.indices(self._owner.epoch, step) for step in steps]
        wanted = batches[0] if len(batches) == 1 else np.concatenate(batches)
        images, labels, indices, draws = self._owner.gather(slot, wanted)

        seen = checksums(indices, plan.batch_size) if plan.repeats else [EMPTY] * len(batches)
        if len(batches) == 1:
            return [HostBatch(images, labels, indices, draws, slot, True, seen[0])]
        group = []
        for number, (batch, checksum) in enumerate(zip(batches, seen, strict=True)):
            piece = slice(number * plan.batch_size, number * plan.batch_size + len(batch))
            drawn = {name: values[piece] for name, values in draws.items()}
            is_last = number + 1 == len(batches)
            group.append(HostBatch(images[piece], labels[piece], indices[piece], drawn, slot, is_last, checksum))
        return group[::-1]
