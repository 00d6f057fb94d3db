"""The base class of loaders, and the iterator over one epoch.

Background threads gather groups of batches into slots. The consumer's thread submits these batches to a runner and
takes finished batches from the runner. The runner works ahead in its own threads or on the GPU. At the end of an epoch,
the threads gather the first batches of the next one.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from pipelines.interfaces import Position
from pipelines.loader.batches import Batch, BatchPlan, MixedBatch
from pipelines.loader.gathering import Gathering
from pipelines.loader.stage import IN_FLIGHT, HostBatch, Stage
from pipelines.storage.split import Split


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
        self._ahead: tuple[Position, Gathering] | None = None  # batches of the next epoch, and their position

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

    def next_stage(self) -> Stage | None:
        """Return the stage of the epoch after the current one, or None if that epoch is not to be read ahead."""
        return None

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

    def gather_from(self, position: Position) -> Gathering:
        """Return the batches from `position` on: those that were read ahead if they start there, or new ones."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position and ahead[1].stage is self.stage and not ahead[1].is_closed:
            return ahead[1]
        if ahead is not None:
            ahead[1].close()
        return Gathering(self.stage, position)

    def keep_ahead(self, position: Position, gathering: Gathering) -> None:
        """Keep the batches of the next epoch, which start at `position`, for the next iterator."""
        self._ahead = position, gathering

    def drop_ahead(self) -> None:
        """End the threads that read the next epoch ahead, and drop its batches."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def check_unchanged(self) -> None:
        """Raise UserError if a file of the data set has changed. Call this method before saving a checkpoint."""
        self.stage.source.check_unchanged()


class EpochIterator(Iterator[Batch]):
    """Iterator over the rest of an epoch. While it runs, it owns the threads and the batches that they gather.

    All of them end with an error, with `close`, and when the iterator is dropped. After the last batch, the loader
    keeps them if they have started on the next epoch.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._remaining: int | None = None  # batches; None: not started
        self._is_replaced = False
        self._gathering: Gathering | None = None  # None: not started, or ended

    @property
    def is_started(self) -> bool:
        return self._remaining is not None

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            RuntimeError: The iterator was replaced before its last batch, or the runner failed.
            UserError: A file of the data set has changed, or a sample can be neither decoded nor replaced.
        """
        if self._is_replaced or (self._gathering is not None and self._gathering.is_closed):
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
        if self._gathering is not None:
            self._gathering.close()
            self._gathering = None

    def replace(self) -> None:
        """Close the iterator. `next` then raises RuntimeError if batches were left, otherwise StopIteration."""
        self._is_replaced = self._is_replaced or self._remaining != 0
        self.close()

    def _start(self) -> int:
        """Start to gather, unless the end of the last epoch has done so, and return the number of batches."""
        loader = self._loader
        position = loader.start_iteration()
        self._stage, self._epoch, self._step = loader.stage, position.epoch, position.step
        self._steps, self._next_stage = len(self._stage), loader.next_stage()
        self._group: list[HostBatch] = []  # remaining batches of the group taken last, in reverse order
        self._to_take = remaining = self._steps - position.step  # batches of this epoch that are not in a taken group
        self._gathering = loader.gather_from(position)
        if self._next_stage is self._stage:
            self._gathering.add_epoch(self._epoch + 1)
        return remaining

    def _next_batch(self) -> Batch:
        start_s, loader, gathering = time.perf_counter(), self._loader, self._gathering
        assert gathering is not None
        while len(gathering.in_flight) < IN_FLIGHT and (host_batch := self._gathered(gathering)) is not None:
            self._submit(gathering, host_batch)
        host_batch, images, labels = self._result(gathering)
        if host_batch.is_last:
            gathering.release(host_batch.slot)
        batch = self._batch(images, labels)
        self._step += 1
        self._remaining = remaining = self._steps - self._step
        loader.count(host_batch.indices, is_last=not remaining)
        if not remaining:
            self._finish(gathering)
        # On a GPU the host also blocks here when it runs ahead; data is late only if the device is idle.
        if loader.device.type != "cuda" or torch.cuda.current_stream(loader.device).query():
            loader.wait_s += time.perf_counter() - start_s
        return batch

    def _finish(self, gathering: Gathering) -> None:
        """Leave the threads to the loader if they gather the next epoch. Otherwise end them."""
        if self._next_stage is self._stage:
            self._loader.keep_ahead(Position(self._epoch + 1), gathering)
            self._gathering = None
        else:
            self.close()

    def _gathered(self, gathering: Gathering) -> HostBatch | None:
        """Return the next gathered batch of the epoch, or None if there is none or none yet; see `Gathering.take`."""
        if not self._group:
            if not self._to_take or (group := gathering.take()) is None:
                return None
            if self._to_take == self._remaining and self._next_stage is not None:
                gathering.prepare(self._epoch + 1)  # not earlier, since training waits for the first batch
            self._to_take -= len(group)
            self._group = group
        return self._group.pop()

    def _submit(self, gathering: Gathering, host_batch: HostBatch) -> None:
        self._stage.runner.submit(host_batch.images, host_batch.labels, host_batch.draws)
        # Lent buffers return when nothing refers to the images.
        gathering.in_flight.append(HostBatch([], *host_batch[1:]))

    def _result(self, gathering: Gathering) -> tuple[HostBatch, torch.Tensor, torch.Tensor]:
        """Return the oldest batch in flight, and its images and labels on the device."""
        stage = self._stage
        while True:
            host_batch = gathering.in_flight.popleft()
            try:
                images, labels, stage.slot_waits[host_batch.slot] = stage.runner.result()
                stage.source.poll()  # DALI has read the encoded images only now
                return host_batch, images, labels
            except RuntimeError as error:
                in_flight = [host_batch, *gathering.in_flight]
                stage.add_bad_samples(in_flight, error)
                stage.runner.restart()
                gathering.in_flight.clear()  # not earlier: after an error, closing takes them out of the runner
                for one in in_flight:
                    again = stage.gather(self._epoch, one.indices, one.slot)
                    self._submit(gathering, again._replace(is_last=one.is_last))

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return images uint8 [N, H, W, 3] and labels int64 [B] as a Batch, or as a MixedBatch if the plan mixes."""
        batch = Batch(images.permute(0, 3, 1, 2), labels)
        if self._loader.augment is not None:
            batch = Batch(self._loader.augment(batch.images, Position(self._epoch, self._step)), labels)
        if self._stage.splits_views:
            return Batch(batch.images.unflatten(0, (labels.shape[0], -1)), labels)
        mix = self._stage.plan.mix(self._epoch, self._step, labels.shape[0], images.shape[1])
        if mix is None:
            return batch
        table = torch.from_numpy(mix)
        if self._loader.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            table = table.pin_memory().to(self._loader.device, non_blocking=True)
        return MixedBatch(*batch, table)
