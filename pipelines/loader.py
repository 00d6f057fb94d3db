"""The iterator: gather, feed, run, hand over torch tensors; counts the time that the consumer waited.

A background thread asks `order` for indices and `draws` for augmentation and gathers the bytes into reused slots; the
consumer's thread feeds them to the DALI graph, whose own threads (or GPU) work ahead, and takes finished batches. The
loader's whole state is (epoch, step). Knows no model and no process group: rank and world size are plain numbers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from pipelines.gather import Source

IN_FLIGHT = 2  # iterations that DALI works on at once


class Batch(NamedTuple):
    """images: uint8 [B, 3, H, W] with channels_last strides; labels: int64 [B] (-1 where the split has none)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Work:
    """What a batch is made of, before any byte is read."""

    indices: np.ndarray  # int64 [B], samples of the split
    draws: dict[str, np.ndarray]  # the graph's inputs beside images and labels, each [B, ...]


@dataclass
class _Prepared:
    slot: int
    images: Any
    labels: torch.Tensor
    draws: dict[str, np.ndarray]


class Runner(Protocol):
    """Turns gathered bytes into batches on the device; first in, first out."""

    def submit(self, images: Any, labels: torch.Tensor, draws: dict[str, np.ndarray]) -> None: ...

    def result(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """images uint8 [B, H, W, 3], labels [B], and a function that blocks until the fed slot may be overwritten."""
        ...


class GraphRunner:
    """Runs a DALI graph; tensors are handed over without a copy."""

    def __init__(self, pipeline: Pipeline, device: torch.device, gather_stream: torch.cuda.Stream | None) -> None:
        self._pipeline = pipeline
        self._device = device
        self._gather_stream = gather_stream

    def submit(self, images: Any, labels: torch.Tensor, draws: dict[str, np.ndarray]) -> None:
        if isinstance(images, torch.Tensor) and images.is_cuda:
            self._pipeline.feed_input("images", images, layout="HWC", cuda_stream=self._gather_stream)
        elif isinstance(images, torch.Tensor):
            batch = TensorListCPU(images.numpy(), layout="HWC", is_pinned=images.is_pinned())
            self._pipeline.feed_input("images", batch)
        else:
            self._pipeline.feed_input("images", images)
        self._pipeline.feed_input("labels", labels.numpy())
        for name, values in draws.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def result(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        if self._device.type != "cuda":
            images, labels = (torch.from_dlpack(output.as_tensor()) for output in self._pipeline.outputs())
            return images, labels, _nothing
        stream = torch.cuda.current_stream(self._device)
        outputs = self._pipeline.outputs(cuda_stream=stream)
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        return images, labels, stream.record_event().synchronize


class PlainRunner:
    """For a graph that would do nothing: stored pixels go to the device as they are."""

    def __init__(self, device: torch.device, gather_stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._gather_stream = gather_stream
        self._ready: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    def submit(self, images: torch.Tensor, labels: torch.Tensor, draws: dict[str, np.ndarray]) -> None:
        del draws
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._gather_stream)  # type: ignore[arg-type]
            # one copy either way: from pinned memory, or out of a slot of resident pixels
            images = torch.empty_like(images, device=self._device).copy_(images, non_blocking=True)
            labels = labels.to(self._device, non_blocking=True)
        self._ready.append((images, labels))

    def result(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        images, labels = self._ready.popleft()
        if self._device.type != "cuda":
            return images, labels, _nothing
        return images, labels, torch.cuda.current_stream(self._device).record_event().synchronize


def _nothing() -> None:
    pass


class Loader:
    """Iterate over it once per epoch; `len` is the number of batches of an epoch, `state` where it stands.

    schedule(epoch, step) gives the work of a batch, a pure function; it is called in the background thread, in order.
    `prepare(epoch)`, called there too, is the place for what an epoch needs once.
    """

    def __init__(
        self,
        *,
        steps: int,
        samples: int,
        image_size: int,
        schedule: Callable[[int, int], Work],
        labels: np.ndarray | None,
        source: Source,
        runner: Runner,
        slots: int,
        device: torch.device,
        gather_stream: torch.cuda.Stream | None = None,
        repeats: bool = False,
    ) -> None:
        self.samples = samples  # that this rank sees in an epoch
        self.image_size = image_size  # height and width of the images it gives, pixels
        self.device = device
        self.wait_s = 0.0  # time that the consumer waited for data, since the start; the caller takes differences
        self._steps = steps
        self._schedule = schedule
        self._labels = torch.from_numpy(labels) if labels is not None else None
        self._source = source
        self._runner = runner
        self._slots = slots
        self._gather_stream = gather_stream
        self._repeats = repeats  # every iteration begins at step 0 of epoch 0 (evaluation)
        self._epoch = self._step = 0

    def __len__(self) -> int:
        return self._steps

    @property
    def state(self) -> dict[str, int]:
        """Where the next batch comes from: {"epoch": …, "step": …}, counting batches that were handed over."""
        return {"epoch": self._epoch, "step": self._step}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < max(self._steps, 1):
            raise ValueError(f"loader state {state} is outside of epochs of {self._steps} steps")
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch that `state` stands in."""
        if self._repeats:
            self._epoch = self._step = 0
        thread = _Gatherer(self, self._epoch, range(self._step, self._steps))
        pending: deque[int] = deque()
        remaining = self._steps - self._step
        try:
            while remaining:
                begin = time.perf_counter()
                while len(pending) < min(IN_FLIGHT, remaining):
                    prepared = thread.take(block=not pending)
                    if prepared is None:
                        break
                    self._runner.submit(prepared.images, prepared.labels, prepared.draws)
                    pending.append(prepared.slot)
                images, labels, released = self._runner.result()
                slot = pending.popleft()
                batch = Batch(images.permute(0, 3, 1, 2), labels)
                remaining -= 1
                self._step += 1
                if self._step == self._steps:
                    self._epoch, self._step = self._epoch + 1, 0
                self.wait_s += time.perf_counter() - begin
                thread.give(slot, released)
                yield batch
        finally:
            for _ in pending:  # batches under way when the consumer left
                self._runner.result()
            thread.stop()


class _Gatherer(threading.Thread):
    """Prepares the batches of one epoch ahead, as far as there are free slots."""

    def __init__(self, loader: Loader, epoch: int, steps: range) -> None:
        super().__init__(name="gather", daemon=True)
        self._loader, self._epoch, self._todo = loader, epoch, steps
        self._ready: queue.SimpleQueue[_Prepared | BaseException] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        for slot in range(loader._slots):
            self._free.put((slot, _nothing))
        self._started_up = threading.Event()
        threads = torch.get_num_threads()
        self.start()
        self._started_up.wait()
        torch.set_num_threads(threads)  # the gatherer lowered its own number, see `run`

    def take(self, block: bool) -> _Prepared | None:
        """The next batch; None when it is not ready and `block` is false."""
        try:
            prepared = self._ready.get(block=block)
        except queue.Empty:
            return None
        if isinstance(prepared, BaseException):
            raise prepared
        return prepared

    def give(self, slot: int, released: Callable[[], None]) -> None:
        self._free.put((slot, released))

    def stop(self) -> None:
        self._free.put(None)
        self.join()

    def run(self) -> None:
        # One thread gathers faster than two that meet at OpenMP's barrier while training keeps the cores busy. The
        # number belongs to the calling thread in OpenMP, but torch also keeps it for MKL: the starter sets that back.
        torch.set_num_threads(1)
        self._started_up.set()
        try:
            with torch.cuda.stream(self._loader._gather_stream):
                self._prepare_all()
        except BaseException as error:
            self._ready.put(error)

    def _prepare_all(self) -> None:
        loader = self._loader
        for step in self._todo:
            work = loader._schedule(self._epoch, step)
            labels = loader._labels
            taken = torch.full((len(work.indices),), -1) if labels is None else labels[torch.from_numpy(work.indices)]
            free = self._free.get()
            if free is None:
                return
            slot, released = free
            released()
            images = loader._source.fill(slot, work.indices)
            self._ready.put(_Prepared(slot, images, taken, work.draws))
