"""The data loader: iterates over batches of torch tensors on the device.

Background threads fill slots with batches. The consumer's thread submits these batches to a runner and takes finished
batches from the runner. The runner works ahead in its own threads or on the GPU. The position of a loader is the epoch
and step of the next batch.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress

import numpy as np
import torch

from configs.utils.errors import UserError
from pipelines.interfaces import Position, Runner, RunnerResult, SampleSource, no_wait
from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.batches import Batch, BatchPlan, MixedBatch
from pipelines.loader.coverage import EMPTY, SampleChecksum
from pipelines.loader.epoch_iterator import EpochIterator
from pipelines.loader.prefetch import BufferConfig, HostBatch, PrefetchThreads
from pipelines.storage.split import Split

IN_FLIGHT = 2  # maximum number of batches in the runner
CONSUMER_HELD = 2  # batches that a consumer usually still holds when it requests the next


class Loader:
    """Iterable over the batches of an epoch. It supports one iterator at a time. `len` is the number of batches.

    Args:
        plan: Plan that determines the batches.
        source: Source that fills the slots.
        runner: Runner that turns filled slots into batches on the device.
        buffers: Number of slots and gather threads, and size of a slot.
        bad: Record of the bad samples to replace.
        labels: int64 [samples of the split], or None if the split has no labels.
        image_size: Height and width of a batch's images, pixels.
        device: Device of the batches.
        gather_stream: CUDA stream on which samples are gathered, or None on the CPU.
    """

    def __init__(
        self,
        plan: BatchPlan,
        source: SampleSource,
        runner: Runner,
        buffers: BufferConfig,
        bad: BadSamples,
        *,
        labels: np.ndarray | None,
        image_size: int,
        device: torch.device,
        gather_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.plan = plan
        self.image_size = image_size
        self.device = device
        self.wait_s = 0.0  # total time that the consumer waited for data; callers take differences
        self.seen: SampleChecksum = EMPTY  # samples of the last evaluation iteration
        self.source = source
        self.bad = bad
        self.labels = labels
        self.buffers = buffers
        self.gather_stream = gather_stream
        # Wait function per slot: blocks until the device has finished reading the slot. Kept across epochs.
        self.slot_waits: list[Callable[[], None]] = [no_wait] * buffers.slots
        self._runner = runner
        # Weak reference to the last iterator, so that an iterator dropped by the consumer ends immediately.
        self._running: Callable[[], EpochIterator[Batch] | None] = lambda: None
        self._position = Position(0)

    def __len__(self) -> int:
        return self.plan.steps

    def at(self, epoch: int) -> Loader:
        """Return this loader, which serves all epochs. See `StagedLoader.at`."""
        del epoch
        return self

    @property
    def stages(self) -> Sequence[Loader]:
        """The loaders of all stages, here only this loader. See `StagedLoader.stages`."""
        return (self,)

    @property
    def split(self) -> Split:
        return self.bad.split

    @property
    def position(self) -> Position:
        """Position of the next batch. The step is the number of batches of the epoch that have been consumed.

        Setting the position ends an iterator that has started, and raises ValueError if the epoch or step is out of
        range.
        """
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        if position.epoch < 0 or not 0 <= position.step < max(len(self), 1):
            raise ValueError(f"loader position {position} is outside of epochs of {len(self)} steps")
        running = self._running()
        if running is not None and running.is_started:  # an iterator that has not started begins at the new position
            running.replace()
        self._position = position

    def check_unchanged(self) -> None:
        """Raise UserError if a file of the data set has changed. Call this method before saving a checkpoint."""
        self.source.check_unchanged()

    def __iter__(self) -> EpochIterator[Batch]:
        """Iterate over the rest of the epoch, starting at `position`. Evaluation always starts at the first batch.

        A loader has one set of buffers. An earlier iterator with batches left therefore raises RuntimeError when it is
        used again.
        """
        self.end_iteration()
        iterator = EpochIterator(self._iterate())
        self._running = weakref.ref(iterator)
        return iterator

    def end_iteration(self) -> None:
        """End the newest iterator, as creating another iterator would."""
        if (running := self._running()) is not None:
            running.replace()

    def _iterate(self) -> Generator[tuple[Batch, bool]]:
        """Yield pairs (batch, is_last)."""
        if self.plan.repeats:
            self._position = Position(0)
            self.seen = EMPTY
        remaining = len(self) - self._position.step
        threads = PrefetchThreads(
            self.plan,
            self.source,
            self.labels,
            self.buffers,
            self.slot_waits,
            self.bad,
            epoch=self._position.epoch,
            first=self._position.step,
            stream=self.gather_stream,
        )
        submitted: deque[HostBatch] = deque()
        held: deque[HostBatch] = deque()  # batches that the consumer may still use
        try:
            while remaining:
                start = time.perf_counter()
                while len(submitted) < min(IN_FLIGHT, remaining):
                    host_batch = threads.get(block=not submitted)
                    if host_batch is None:
                        break
                    self._submit(host_batch, submitted)
                host_batch, (images, labels, self.slot_waits[host_batch.slot]) = self._result(submitted, threads)
                held.append(host_batch._replace(images=None))  # a reference here would count as the consumer's
                if len(held) > CONSUMER_HELD and (oldest := held.popleft()).is_last:
                    threads.release(oldest.slot)
                batch = self._batch(images, labels)
                if self.plan.repeats:
                    self.seen += host_batch.checksum
                remaining -= 1
                epoch, step = self._position.epoch, self._position.step + 1
                self._position = Position(epoch, step) if step < len(self) else Position(epoch + 1)
                # On a GPU the host also blocks here when it runs ahead; data is late only if the device is idle.
                if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                    self.wait_s += time.perf_counter() - start
                yield batch, not remaining
        finally:
            for host_batch in submitted:  # still in flight when the iteration ended
                with suppress(RuntimeError, StopIteration):  # a graph that failed has no more results
                    *_, self.slot_waits[host_batch.slot] = self._runner.result()
            threads.stop()

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return images uint8 [B, H, W, 3] and labels int64 [B] as a Batch, or as a MixedBatch if the plan mixes."""
        batch = Batch(images.permute(0, 3, 1, 2), labels)
        mix = self.plan.mix(self._position.epoch, self._position.step, len(labels), images.shape[1])
        if mix is None:
            return batch
        table = torch.from_numpy(mix)
        if self.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            table = table.pin_memory().to(self.device, non_blocking=True)
        return MixedBatch(*batch, table)

    def _submit(self, host_batch: HostBatch, submitted: deque[HostBatch]) -> None:
        self._runner.submit(host_batch.images, host_batch.labels, host_batch.draws)
        submitted.append(host_batch)

    def _result(self, submitted: deque[HostBatch], threads: PrefetchThreads) -> tuple[HostBatch, RunnerResult]:
        """Return the oldest submitted batch and its result.

        DALI's errors do not name a sample. After an error, this method therefore searches the batches in flight for the
        first one with samples that cannot be decoded, and runs all batches in flight again with substitutes.

        Raises:
            UserError: A file has changed, or bad samples cannot be replaced.
            RuntimeError: The runner failed for another reason.
        """
        while True:
            host_batch = submitted.popleft()
            try:
                result = self._runner.result()
                self.source.poll()  # DALI has read the encoded images only now
                return host_batch, result
            except RuntimeError as error:
                self.check_unchanged()  # report a changed file rather than the sample that it broke
                in_flight = [host_batch, *submitted]
                defects = next(filter(None, map(self._defects, in_flight)), None)  # usually in the first batch
                if defects is None:
                    raise
                try:
                    self.bad.add(defects, self.source.defect)
                except UserError as refusal:
                    raise refusal from error
            self._runner.restart()
            submitted.clear()
            for one in in_flight:
                self._submit(threads.regather(one), submitted)

    def _defects(self, host_batch: HostBatch) -> dict[int, str]:
        """Return the reason for each bad sample of a batch, keyed by the index of the sample.

        This is slow, since the samples are decoded one by one.
        """
        found = ((sample, self.source.defect(sample)) for sample in host_batch.indices.tolist())
        return {sample: reason for sample, reason in found if reason is not None}
