"""The base class of loaders, and the iterator over one epoch.

Background threads gather groups of batches into slots. The consumer's thread submits these batches to a runner and
takes finished batches from the runner. The runner works ahead in its own threads or on the GPU.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import torch

from pipelines.interfaces import Position
from pipelines.loader.batches import Batch, BatchPlan, MixedBatch
from pipelines.loader.stage import IN_FLIGHT, HostBatch, Stage
from pipelines.storage.split import Split

Ready = SimpleQueue[list[HostBatch] | BaseException]  # holds one gathered group, or the error that ended it
Tasks = SimpleQueue[tuple[range, int, Ready] | None]  # batches to gather, slot to fill and where to put the result


class Loader(Iterable[Batch]):
    """Iterable over the batches of an epoch. It supports one iterator at a time. `len` is the number of batches.

    Attributes:
        device: Device of the batches.
        bad: Record of the bad samples to replace.
        wait_s: Total time that the consumer waited for data, in seconds; callers take differences. It includes the time
            that `augment` takes on a CPU.
        augment: Applied to the images of each batch with its position, in the consumer's thread; None: nothing.
    """

    augment: Callable[[torch.Tensor, Position], torch.Tensor] | None = None

    def __init__(self, stage: Stage) -> None:
        self.device, self.bad = stage.backend.spec.device, stage.bad
        self.wait_s = 0.0
        # Weak reference to the newest iterator, so that an iterator dropped by the consumer ends immediately.
        self._newest: Callable[[], EpochIterator | None] = lambda: None

    @property
    def stage(self) -> Stage:
        """The stage that makes the next batch."""
        raise NotImplementedError

    def start_iteration(self) -> Position:
        """Return the position at which an iterator starts. Called before its first batch."""
        raise NotImplementedError

    def count(self, indices: np.ndarray, *, is_last: bool) -> None:
        """Count a batch with the samples `indices`, int64 [B], as consumed; `is_last`: it ends the epoch."""
        raise NotImplementedError

    @property
    def plan(self) -> BatchPlan:
        return self.stage.plan

    @property
    def image_size(self) -> int:
        """Height and width of a batch's images, pixels."""
        return self.stage.image_size

    @property
    def split(self) -> Split:
        return self.bad.split

    def __len__(self) -> int:
        return len(self.stage)

    def __iter__(self) -> EpochIterator:
        """Iterate over the rest of the epoch.

        A loader has one set of buffers. An earlier iterator with batches left therefore raises RuntimeError when it is
        used again.
        """
        self.end_iteration()
        iterator = EpochIterator(self)
        self._newest = weakref.ref(iterator)
        return iterator

    def end_iteration(self, *, only_started: bool = False) -> None:
        """End the newest iterator, as creating another one would; with `only_started`, only if it has started."""
        newest = self._newest()
        if newest is not None and (newest.is_started or not only_started):
            newest.replace()

    def check_unchanged(self) -> None:
        """Raise UserError if a file of the data set has changed. Call this method before saving a checkpoint."""
        self.stage.source.check_unchanged()


class EpochIterator(Iterator[Batch]):
    """Iterator over the rest of an epoch. It owns the threads, the free slots and the batches in flight.

    All of them end with the last batch, with an error, with `close`, and when the iterator is dropped.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._remaining: int | None = None  # batches; None: not started
        self._is_replaced = False
        self._stop: Callable[[], object] = lambda: None

    @property
    def is_started(self) -> bool:
        return self._remaining is not None

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            RuntimeError: The iterator was replaced before its last batch, or the runner failed.
            UserError: A file of the data set has changed, or a sample can be neither decoded nor replaced.
        """
        if self._is_replaced:
            raise RuntimeError(
                "this iterator was ended by a newer one or by setting the loader's position; a loader has one set of "
                "buffers, so use one iterator at a time, or build a second loader"
            )
        try:
            if self._remaining is None:
                self._remaining = self._start()
            if not self._remaining:
                raise StopIteration
            return self._next_batch()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the iterator and its threads, so that `next` raises StopIteration. Batches remain valid."""
        self._remaining = 0
        self._stop()
        atexit.unregister(self._stop)

    def replace(self) -> None:
        """Close the iterator. `next` then raises RuntimeError if batches were left, otherwise StopIteration."""
        self._is_replaced = self._is_replaced or self._remaining != 0
        self.close()

    def _start(self) -> int:
        """Start the threads and return the number of batches."""
        position = self._loader.start_iteration()
        self._stage, self._epoch, self._step = self._loader.stage, position.epoch, position.step
        self._steps, self._groups = len(self._stage), self._stage.groups(position.step)
        self._tasks: Tasks = SimpleQueue()
        self._gathering: deque[Ready] = deque()  # in the order of the batches
        self._group: list[HostBatch] = []  # remaining batches of the group taken last, in reverse order
        self._in_flight: deque[HostBatch] = deque()  # in the runner
        for slot in range(self._stage.slots):
            self._refill(slot)
        # Daemons, since Python waits for other threads before it finalizes the iterator.
        threads = [
            Thread(target=_gather, args=(self._stage, self._epoch, self._tasks), name="gather", daemon=True)
            for _ in range(self._stage.backend.threads)
        ]
        prepare = self._stage.plan.prepare
        self._preparer = Thread(target=prepare, args=(self._epoch + 1,), name="prepare", daemon=True)
        # Threads do not refer to the iterator, so that it is finalized when the consumer drops it.
        self._stop = weakref.finalize(
            self, _stop, self._stage, self._in_flight, self._tasks, [*threads, self._preparer]
        )
        # At exit, `finalize` may be called after DALI has shut its graphs down. Functions of atexit run newest first.
        atexit.register(self._stop)
        for thread in threads:
            thread.start()
        return self._steps - position.step

    def _refill(self, slot: int) -> None:
        """Let a thread fill a free slot with the next group. If there is none left, let the thread end."""
        if (steps := next(self._groups, None)) is None:
            self._tasks.put(None)
        else:
            self._gathering.append(SimpleQueue())
            self._tasks.put((steps, slot, self._gathering[-1]))

    def _next_batch(self) -> Batch:
        start_s, loader = time.perf_counter(), self._loader
        while len(self._in_flight) < IN_FLIGHT and (host_batch := self._gathered()) is not None:
            self._submit(host_batch)
        host_batch, images, labels = self._result()
        if host_batch.is_last:
            self._refill(host_batch.slot)
        batch = self._batch(images, labels)
        self._step += 1
        self._remaining = remaining = self._steps - self._step
        loader.count(host_batch.indices, is_last=not remaining)
        if not remaining:
            self.close()
        # On a GPU the host also blocks here when it runs ahead; data is late only if the device is idle.
        if loader.device.type != "cuda" or torch.cuda.current_stream(loader.device).query():
            loader.wait_s += time.perf_counter() - start_s
        return batch

    def _gathered(self) -> HostBatch | None:
        """Return the next gathered batch, or None if there is none yet. Wait for it if no other batch is in flight.

        The error of a thread is raised only if no other batch is in flight, since that batch's error comes first.
        """
        if not self._group:
            if not self._gathering or (self._in_flight and self._gathering[0].empty()):
                return None
            group = self._gathering[0].get()
            if isinstance(group, BaseException):
                if not self._in_flight:
                    raise group
                self._gathering[0].put(group)
                return None
            self._gathering.popleft()
            self._group = group
            if self._preparer.ident is None:  # not earlier, since training waits for the first batch
                self._preparer.start()
        return self._group.pop()

    def _submit(self, host_batch: HostBatch) -> None:
        self._stage.runner.submit(host_batch.images, host_batch.labels, host_batch.draws)
        self._in_flight.append(host_batch._replace(images=[]))  # lent buffers return when nothing refers to the images

    def _result(self) -> tuple[HostBatch, torch.Tensor, torch.Tensor]:
        """Return the oldest batch in flight, and its images and labels on the device."""
        stage = self._stage
        while True:
            host_batch = self._in_flight.popleft()
            try:
                images, labels, stage.slot_waits[host_batch.slot] = stage.runner.result()
                stage.source.poll()  # DALI has read the encoded images only now
                return host_batch, images, labels
            except RuntimeError as error:
                in_flight = [host_batch, *self._in_flight]
                stage.add_bad_samples(in_flight, error)
                stage.runner.restart()
                self._in_flight.clear()  # not earlier: after an error, `_stop` takes them out of the runner
                for one in in_flight:
                    again = stage.gather(self._epoch, one.indices, one.slot)
                    self._submit(again._replace(is_last=one.is_last))

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return images uint8 [B, H, W, 3] and labels int64 [B] as a Batch, or as a MixedBatch if the plan mixes."""
        batch = Batch(images.permute(0, 3, 1, 2), labels)
        if self._loader.augment is not None:
            batch = Batch(self._loader.augment(batch.images, Position(self._epoch, self._step)), labels)
        mix = self._stage.plan.mix(self._epoch, self._step, len(labels), images.shape[1])
        if mix is None:
            return batch
        table = torch.from_numpy(mix)
        if self._loader.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            table = table.pin_memory().to(self._loader.device, non_blocking=True)
        return MixedBatch(*batch, table)


def _gather(stage: Stage, epoch: int, tasks: Tasks) -> None:
    """Gather groups until there is a None."""
    while (task := tasks.get()) is not None:
        steps, slot, ready = task
        try:
            ready.put(stage.gather_group(epoch, steps, slot))
        except BaseException as error:
            ready.put(error)


def _stop(stage: Stage, in_flight: deque[HostBatch], tasks: Tasks, threads: Sequence[Thread]) -> None:
    """Take the batches in flight out of the runner, and end the threads after the groups that they are gathering."""
    for host_batch in in_flight:
        with suppress(RuntimeError, StopIteration):  # a graph that failed has no more results
            *_, stage.slot_waits[host_batch.slot] = stage.runner.result()
    with suppress(Empty):
        while True:
            tasks.get_nowait()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread.ident is not None:  # only if it was started
            thread.join()
