"""The threads that gather: they fill slots with groups of consecutive batches, ahead of the consumer.

A group is drawn and gathered in one go, since for small batches the calls and the waking of a thread would cost more
than the gather. Threads take groups in turn; each has its own slots. Knows indices, draws and sources, but no graph.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.loader.bad_samples import BadSamples, Undecodable
from pipelines.loader.coverage import EMPTY, SampleChecksum, checksums
from pipelines.loader.sources import SampleSource, fill_checked


def no_draws(epoch: int, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The draws of a graph that has no input but images and labels."""
    return {}


@dataclass(frozen=True)
class Plan:
    """Which batches an epoch has. Its functions are pure and are called in the background threads."""

    samples: int  # that this rank sees in an epoch
    batch_size: int  # of all batches but possibly the last
    indices: Callable[[int, int], np.ndarray]  # (epoch, step) -> the samples of a batch, int64 [B]
    # (epoch, samples int64 [N]) -> the graph's inputs beside images and labels, each [N, ...]
    draws: Callable[[int, np.ndarray], dict[str, np.ndarray]] = no_draws
    prepare: Callable[[int], object] | None = None  # (epoch): what its indices need once, computed ahead
    repeats: bool = False  # every iteration is epoch 0 from its start (evaluation)
    # (epoch, step, samples, image size) -> how the batch is mixed, as pipelines.mixing says; None: it never is
    mix: Callable[[int, int, int, int], np.ndarray] | None = None

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class BufferConfig:
    """How many buffers there are, and who fills them."""

    slots: int  # each holds a group; a multiple of threads
    threads: int
    group: int = 1  # batches


class HostBatch(NamedTuple):
    """A batch in its slot."""

    images: Any
    labels: np.ndarray
    indices: np.ndarray
    draws: dict[str, np.ndarray]
    slot: int
    is_last: bool  # of its slot, which is free again once the consumer has let go of this batch
    checksum: SampleChecksum  # of its samples, in evaluation


class PrefetchThreads:
    """The threads of one iteration: batches `first` … of `epoch`, in order."""

    def __init__(
        self,
        plan: Plan,
        source: SampleSource,
        labels: np.ndarray | None,
        buffering: BufferConfig,
        slot_waits: list[Callable[[], None]],
        bad: BadSamples,
        *,
        epoch: int,
        first: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """slot_waits: per slot, a function that blocks until it may be overwritten; stream: of gathers on a GPU."""
        self.plan, self.source, self.labels, self.slot_waits, self.bad = plan, source, labels, slot_waits, bad
        self.epoch, self.stream, self.is_stopping = epoch, stream, False
        groups = _groups(first, plan.steps, buffering.group, ramp=buffering.threads)
        count = buffering.threads
        self._share = buffering.slots // count
        self._threads = [
            _GatherThread(self, groups[i::count], range(i * self._share, (i + 1) * self._share)) for i in range(count)
        ]
        self._preparer = threading.Thread(target=self._prepare_next_epoch, name="prepare", daemon=True)
        self._groups_taken = 0  # groups
        self._group: list[HostBatch] = []  # the rest of the one being handed out, last first
        self._error: BaseException | None = None  # of the thread whose turn it is

    def get(self, block: bool) -> HostBatch | None:
        """Return the next batch; None when it is not ready and `block` is false.

        An error of a thread is raised only with `block`: batches before it may still fail, and come first.
        """
        if not self._group and self._error is None:
            try:
                group = self._threads[self._groups_taken % len(self._threads)].ready.get(block=block)
            except queue.Empty:
                return None
            if isinstance(group, BaseException):
                self._error = group
            else:
                if self._groups_taken == 0:  # not before, since training waits for the first batch
                    self._preparer.start()
                self._groups_taken += 1
                self._group = group
        if self._error is not None and not self._group:
            if block:
                raise self._error
            return None
        return self._group.pop()

    def release(self, slot: int) -> None:
        """The slot may be filled again, once `slot_waits` says so."""
        self._threads[slot // self._share].free.put(slot)

    def gather(self, slot: int, wanted: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Fill a slot with samples, int64 [N], or with those that stand in for bad ones.

        Returns:
            images, labels int64 [N], who they are int64 [N], and draws: a substitute brings its own.
        """
        while True:
            indices = self.bad.substitute(wanted)
            draws = self.plan.draws(self.epoch, indices)
            labels = np.full(len(indices), -1) if self.labels is None else self.labels[indices]
            self.slot_waits[slot]()
            try:
                return fill_checked(self.source, slot, indices, draws), labels, indices, draws
            except Undecodable as found:
                self.bad.add(found.defects, self.source.defect)

    def regather(self, prepared: HostBatch) -> HostBatch:
        """A batch with substitutes for the samples that have turned out to be bad since."""
        images, labels, indices, draws = self.gather(prepared.slot, prepared.indices)
        return prepared._replace(images=images, labels=labels, indices=indices, draws=draws)

    def stop(self) -> None:
        self.is_stopping = True
        for thread in self._threads:
            thread.free.put(None)
        for thread in self._threads:
            thread.join()
        if self._preparer.ident is not None:  # it was started
            self._preparer.join()

    def _prepare_next_epoch(self) -> None:
        if self.plan.prepare is not None:
            self.plan.prepare(self.epoch + 1)


def _groups(first: int, steps: int, most: int, ramp: int) -> list[range]:
    """The batches from `first` to `steps` in groups of 1, since training waits for it, then 2, 4 … up to `most`."""
    groups: list[range] = []
    while first < steps:
        size = min(most, 2 ** (len(groups) // ramp))
        groups.append(range(first, min(first + size, steps)))
        first += size
    return groups


class _GatherThread(threading.Thread):
    """Fills its slots with its groups."""

    def __init__(self, team: PrefetchThreads, groups: list[range], slots: range) -> None:
        super().__init__(name="gather", daemon=True)
        self._team, self._groups = team, groups
        self.ready: queue.SimpleQueue[list[HostBatch] | BaseException] = queue.SimpleQueue()
        self.free: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None asks the thread to end
        for slot in slots:
            self.free.put(slot)
        self.start()

    def run(self) -> None:
        try:
            with torch.cuda.stream(self._team.stream):
                for steps in self._groups:
                    slot = self.free.get()
                    if slot is None or self._team.is_stopping:
                        return
                    self.ready.put(self._gather_group(steps, slot))
        except BaseException as error:
            self.ready.put(error)

    def _gather_group(self, steps: range, slot: int) -> list[HostBatch]:
        """A group of batches, last first."""
        plan = self._team.plan
        batches = [plan.indices(self._team.epoch, step) for step in steps]
        wanted = batches[0] if len(batches) == 1 else np.concatenate(batches)
        images, labels, indices, draws = self._team.gather(slot, wanted)

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
