"""The iterator: gather, feed, run, hand over torch tensors; counts the time that the consumer waited.

A background thread asks `order` for indices and `draws` for augmentation and gathers the bytes into reused slots; the
consumer's thread feeds them to the DALI graph, whose own threads (or GPU) work ahead, and takes finished batches. The
loader's whole state is (epoch, step). Knows no model and no process group: rank and world size are plain numbers.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from configs.utils.errors import UserError
from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.coverage import EMPTY, SampleChecksum
from pipelines.loader.epoch_iterator import EpochIterator
from pipelines.loader.prefetch import BufferConfig, HostBatch, Plan, PrefetchThreads
from pipelines.loader.runner import Result, Runner, no_wait
from pipelines.loader.sources import SampleSource
from pipelines.storage.split import Split

IN_FLIGHT = 2  # iterations that DALI works on at once
CONSUMER_HELD = 2  # batches that a consumer usually still holds when it asks for the next: its last, and the one before


class Batch(NamedTuple):
    """images: uint8 [B, 3, H, W] with channels_last strides; labels: int64 [B] (-1 where the split has none)."""

    images: torch.Tensor
    labels: torch.Tensor


class MixedBatch(Batch):
    """A batch whose samples are to be mixed with their neighbours; mix: float32 [B, 5], see pipelines.mixing."""

    mix: torch.Tensor

    def __new__(cls, images: torch.Tensor, labels: torch.Tensor, mix: torch.Tensor) -> MixedBatch:
        batch = super().__new__(cls, images, labels)
        batch.mix = mix
        return batch


class Loader:
    """Iterate over it once per epoch, with one iterator at a time; `len` is the number of batches of an epoch."""

    def __init__(
        self,
        plan: Plan,
        source: SampleSource,
        runner: Runner,
        buffering: BufferConfig,
        bad: BadSamples,
        *,
        labels: np.ndarray | None,
        image_size: int,
        device: torch.device,
        gather_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.plan = plan
        self.image_size = image_size  # height and width of the images it gives, pixels
        self.device = device
        self.wait_s = 0.0  # time that the consumer waited for data, since the start; the caller takes differences
        self.seen: SampleChecksum = EMPTY  # in evaluation, what the last iteration has handed over
        self.source = source
        self.bad = bad
        self.labels = labels  # int64 [samples of the split]; None where it has none
        self.buffering = buffering
        self.gather_stream = gather_stream
        # Per slot, a function that blocks until the device has read it: also over the end of an iteration.
        self.slot_waits: list[Callable[[], None]] = [no_wait] * buffering.slots
        self._runner = runner
        # A weak reference to the last iterator: one that the consumer dropped ends at once.
        self._running: Callable[[], EpochIterator[Batch] | None] = lambda: None
        self._epoch = self._step = 0

    def __len__(self) -> int:
        return self.plan.steps

    def at(self, epoch: int) -> Loader:
        """The loader of an epoch: itself, of any; `staged` has loaders that change."""
        del epoch
        return self

    @property
    def stages(self) -> Sequence[Loader]:
        """Itself alone."""
        return (self,)

    @property
    def split(self) -> Split:
        return self.bad.split

    @property
    def state(self) -> dict[str, int]:
        """Where the next batch comes from: {"epoch": …, "step": …}, counting batches that were handed over."""
        return {"epoch": self._epoch, "step": self._step}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < max(len(self), 1):
            raise ValueError(f"loader state {state} is outside of epochs of {len(self)} steps")
        running = self._running()
        if running is not None and running.is_started:  # one that is not started begins at the new state
            running.replace()
        self._epoch, self._step = epoch, step

    def check_unchanged(self) -> None:
        """Raise a UserError if a file that batches come from is not what it was: before anything trained is saved."""
        self.source.check_unchanged()

    def __iter__(self) -> EpochIterator[Batch]:
        """Iterate over the rest of the current epoch, from `state` on.

        There is one set of buffers: an iterator made before raises RuntimeError when it is used again, unless it had
        no batch left.
        """
        self.end_iteration()
        iteration = EpochIterator(self._iterate())
        self._running = weakref.ref(iteration)
        return iteration

    def end_iteration(self) -> None:
        """End the last iterator, as a new one would."""
        if (running := self._running()) is not None:
            running.replace()

    def _iterate(self) -> Generator[tuple[Batch, bool]]:
        """Yield each batch, and whether it is the last one."""
        if self.plan.repeats:
            self._epoch = self._step = 0
            self.seen = EMPTY
        remaining = len(self) - self._step
        team = PrefetchThreads(self.plan, self.source, self.labels, self.buffering, self.slot_waits, self.bad,
                    epoch=self._epoch, first=self._step, stream=self.gather_stream)  # fmt: skip
        submitted: deque[HostBatch] = deque()
        handed: deque[HostBatch] = deque()
        try:
            while remaining:
                begin = time.perf_counter()
                while len(submitted) < min(IN_FLIGHT, remaining):
                    prepared = team.get(block=not submitted)
                    if prepared is None:
                        break
                    self._submit(prepared, submitted)
                prepared, (images, labels, self.slot_waits[prepared.slot]) = self._result(submitted, team)
                handed.append(prepared._replace(images=None))  # else the slot would seem to be held by the user
                if len(handed) > CONSUMER_HELD and (oldest := handed.popleft()).is_last:
                    team.release(oldest.slot)
                batch = self._batch(images, labels)
                if self.plan.repeats:
                    self.seen += prepared.checksum
                remaining -= 1
                self._step += 1
                if self._step == len(self):
                    self._epoch, self._step = self._epoch + 1, 0
                # On a GPU the host runs ahead and blocks here too: data is late only when the device has nothing to do.
                if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                    self.wait_s += time.perf_counter() - begin
                yield batch, not remaining
        finally:
            for prepared in submitted:  # batches under way when the consumer left
                with suppress(RuntimeError, StopIteration):  # a graph that failed has no more results
                    *_, self.slot_waits[prepared.slot] = self._runner.result()
            team.stop()

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Of images uint8 [B, H, W, 3]; with the table of its mixing where the plan has one."""
        batch = Batch(images.permute(0, 3, 1, 2), labels)
        if self.plan.mix is None:
            return batch
        table = torch.from_numpy(self.plan.mix(self._epoch, self._step, len(labels), images.shape[1]))
        if self.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            table = table.pin_memory().to(self.device, non_blocking=True)
        return MixedBatch(*batch, table)

    def _submit(self, prepared: HostBatch, submitted: deque[HostBatch]) -> None:
        self._runner.submit(prepared.images, prepared.labels, prepared.draws)
        submitted.append(prepared)

    def _result(self, submitted: deque[HostBatch], team: PrefetchThreads) -> tuple[HostBatch, Result]:
        """The oldest of the batches under way, and what became of it.

        DALI's error names no sample: those that it could not decode are looked for, and all that was under way is run
        again with substitutes; where none is allowed, the error names them.
        """
        while True:
            prepared = submitted.popleft()
            try:
                result = self._runner.result()
                self.source.look()  # DALI has read encoded images only now
                return prepared, result
            except RuntimeError as error:
                self.check_unchanged()  # a file that was changed says more than the sample that could not be used
                under_way = [prepared, *submitted]
                defects = next(filter(None, map(self._defects, under_way)), None)  # the first batch's, as a rule
                if defects is None:
                    raise
                try:
                    self.bad.add(defects, self.source.defect)
                except UserError as refusal:
                    raise refusal from error
            self._runner.restart()
            submitted.clear()
            for one in under_way:
                self._submit(team.regather(one), submitted)

    def _defects(self, prepared: HostBatch) -> dict[int, str]:
        """What is wrong with samples of a batch; decodes them one by one, which only an error can afford."""
        found = ((sample, self.source.defect(sample)) for sample in prepared.indices.tolist())
        return {sample: wrong for sample, wrong in found if wrong is not None}
