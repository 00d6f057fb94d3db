"""The iterator: gather, feed, run, hand over torch tensors; counts the time that the consumer waited.

A background thread asks `order` for indices and `draws` for augmentation and gathers the bytes into reused slots; the
consumer's thread feeds them to the DALI graph, whose own threads (or GPU) work ahead, and takes finished batches. The
loader's whole state is (epoch, step). Knows no model and no process group: rank and world size are plain numbers.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.errors import UserError
from pipelines.gather import Source, undecodable
from pipelines.runner import Runner, nothing_to_wait_for

IN_FLIGHT = 2  # iterations that DALI works on at once
HANDED_OUT = 2  # batches that a consumer usually still holds when it asks for the next: its last, and the one before


class Batch(NamedTuple):
    """images: uint8 [B, 3, H, W] with channels_last strides; labels: int64 [B] (-1 where the split has none)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Work:
    """What a batch is made of, before any byte is read."""

    indices: np.ndarray  # int64 [B], samples of the split
    draws: dict[str, np.ndarray]  # the graph's inputs beside images and labels, each [B, ...]


@dataclass(frozen=True)
class Plan:
    """Which batches an epoch has. `schedule` and `prepare` are pure and are called in the background threads."""

    samples: int  # that this rank sees in an epoch
    batch_size: int  # of all batches but possibly the last
    schedule: Callable[[int, int], Work]  # (epoch, step) -> the work of a batch
    prepare: Callable[[int], object] | None = None  # (epoch): what its schedule needs once, computed ahead
    repeats: bool = False  # every iteration is epoch 0 from its start (evaluation)

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class Buffering:
    """How many buffers there are, and who fills them."""

    slots: int
    threads: int  # that gather, each its own batches in turn; slots is a multiple of it
    burst: int  # batches passed between threads at once: waking a thread can cost more than a gather


@dataclass
class _Prepared:
    slot: int
    indices: np.ndarray
    images: Any
    labels: np.ndarray
    draws: dict[str, np.ndarray]


_iterations: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_iterations() -> None:
    """End iterations left unfinished: a thread inside torch or DALI may not outlive the interpreter."""
    for iteration in list(_iterations):
        with suppress(ValueError, RuntimeError):  # running at this moment, or ended by an error
            iteration.close()


class Loader:
    """Iterate over it once per epoch; `len` is the number of batches of an epoch, `state` where it stands."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        runner: Runner,
        buffering: Buffering,
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
        self.source = source
        self.labels = labels  # int64 [samples of the split]; None where it has none
        self.buffering = buffering
        self.gather_stream = gather_stream
        # Per slot, a function that blocks until the device has read it: also over the end of an iteration.
        self.released: list[Callable[[], None]] = [nothing_to_wait_for] * buffering.slots
        self._runner = runner
        self._running: Callable[[], Generator[Batch] | None] = lambda: None  # a weak reference to the last iteration
        self._epoch = self._step = 0

    def __len__(self) -> int:
        return self.plan.steps

    @property
    def state(self) -> dict[str, int]:
        """Where the next batch comes from: {"epoch": …, "step": …}, counting batches that were handed over."""
        return {"epoch": self._epoch, "step": self._step}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < max(len(self), 1):
            raise ValueError(f"loader state {state} is outside of epochs of {len(self)} steps")
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch that `state` stands in. Ends an iteration under way: there is one set of buffers."""
        if (running := self._running()) is not None:
            running.close()
        iteration = self._iterate()
        self._running = weakref.ref(iteration)
        _iterations.add(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch]:
        if self.plan.repeats:
            self._epoch = self._step = 0
        remaining = len(self) - self._step
        threads = self.buffering.threads
        team = [_Gatherer(self, self._epoch, range(self._step + i, len(self), threads), i) for i in range(threads)]
        submitted: deque[tuple[_Gatherer, int, np.ndarray]] = deque()
        handed: deque[tuple[_Gatherer, int]] = deque()
        following = 0
        try:
            while remaining:
                begin = time.perf_counter()
                while len(submitted) < min(IN_FLIGHT, remaining):
                    gatherer = team[following % len(team)]
                    prepared = gatherer.take(block=not submitted)
                    if prepared is None:
                        break
                    following += 1
                    self._runner.submit(prepared.images, prepared.labels, prepared.draws)
                    submitted.append((gatherer, prepared.slot, prepared.indices))
                gatherer, slot, indices = submitted.popleft()
                images, labels, self.released[slot] = self._result(indices)
                handed.append((gatherer, slot))
                if len(handed) > HANDED_OUT:
                    gatherer, slot = handed.popleft()
                    gatherer.give(slot)
                batch = Batch(images.permute(0, 3, 1, 2), labels)
                remaining -= 1
                self._step += 1
                if self._step == len(self):
                    self._epoch, self._step = self._epoch + 1, 0
                # On a GPU the host runs ahead and blocks here too: data is late only when the device has nothing to do.
                if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
                    self.wait_s += time.perf_counter() - begin
                yield batch
        finally:
            for _, slot, _ in submitted:  # batches under way when the consumer left
                with suppress(RuntimeError, StopIteration):  # a graph that failed has no more results
                    *_, self.released[slot] = self._runner.result()
            for gatherer in team:
                gatherer.stop()

    def _result(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """The runner's next result, or an error that names the samples which DALI could not decode, as it cannot."""
        try:
            return self._runner.result()
        except RuntimeError as error:
            if defects := self.source.defects(indices):
                raise UserError(undecodable(defects)) from error
            raise


class _Gatherer(threading.Thread):
    """Prepares some batches of one epoch ahead, as far as its share of the slots goes."""

    def __init__(self, loader: Loader, epoch: int, steps: range, number: int) -> None:
        super().__init__(name="gather", daemon=True)
        self._loader, self._epoch, self._todo = loader, epoch, steps
        self._burst = loader.buffering.burst
        self._ready: queue.SimpleQueue[list[_Prepared] | BaseException] = queue.SimpleQueue()
        self._taken: deque[_Prepared] = deque()
        # Last in, first out: the slot used last is the one that still lies in the processor's cache. Tokens count the
        # free slots; a None asks the thread to end.
        share = loader.buffering.slots // loader.buffering.threads
        self._free = [*range(number * share, (number + 1) * share)]
        self._tokens: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        for _ in self._free:
            self._tokens.put(True)
        self._started_up = threading.Event()
        threads = torch.get_num_threads()
        self.start()
        self._started_up.wait()
        torch.set_num_threads(threads)  # the gatherer lowered its own number, see `run`

    def take(self, block: bool) -> _Prepared | None:
        """The next batch; None when it is not ready and `block` is false."""
        if not self._taken:
            try:
                burst = self._ready.get(block=block)
            except queue.Empty:
                return None
            if isinstance(burst, BaseException):
                raise burst
            self._taken.extend(burst)
        return self._taken.popleft()

    def give(self, slot: int) -> None:
        self._free.append(slot)
        self._tokens.put(True)

    def stop(self) -> None:
        self._tokens.put(None)
        self.join()

    def run(self) -> None:
        # One thread gathers faster than two that meet at OpenMP's barrier while training keeps the cores busy. The
        # number belongs to the calling thread in OpenMP, but torch also keeps it for MKL: the starter sets that back.
        torch.set_num_threads(1)
        self._started_up.set()
        try:
            with torch.cuda.stream(self._loader.gather_stream):
                self._prepare_all()
        except BaseException as error:
            self._ready.put(error)

    def _prepare_all(self) -> None:
        plan, source, labels = self._loader.plan, self._loader.source, self._loader.labels
        burst: list[_Prepared] = []
        for step in self._todo:
            work = plan.schedule(self._epoch, step)
            taken = np.full(len(work.indices), -1) if labels is None else labels[work.indices]
            # The first batch goes out alone, since training waits for it.
            if burst and (len(burst) >= self._burst or self._tokens.empty() or step == self._todo[1]):
                self._ready.put(burst)
                burst = []
            if self._tokens.get() is None:
                return
            slot = self._free.pop()
            self._loader.released[slot]()
            burst.append(_Prepared(slot, work.indices, source.fill(slot, work.indices, work.draws), taken, work.draws))
        self._ready.put(burst)
        if plan.prepare is not None:
            plan.prepare(self._epoch + 1)  # while the consumer is busy with the last batches
