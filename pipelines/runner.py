"""Turns gathered bytes into batches on the device, by a DALI graph or as they are. Knows no order and no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

# images uint8 [B, H, W, 3], labels [B], and a function that blocks until the fed slot may be overwritten
Result = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]


class Runner(Protocol):
    """Turns gathered bytes into batches on the device; first in, first out."""

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None: ...

    def result(self) -> Result: ...

    def restart(self) -> None:
        """Forget what was submitted, after an error."""
        ...


class GraphRunner:
    """Runs a DALI graph; tensors are handed over without a copy."""

    def __init__(
        self, build: Callable[[], Pipeline], device: torch.device, gather_stream: torch.cuda.Stream | None
    ) -> None:
        self._build = build
        self._pipeline = build()
        self._device = device
        self._gather_stream = gather_stream
        self._labels: deque[torch.Tensor] = deque()

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None:
        if isinstance(images, torch.Tensor) and images.is_cuda:
            self._pipeline.feed_input("images", images, layout="HWC", cuda_stream=self._gather_stream)
        elif isinstance(images, torch.Tensor):
            batch = TensorListCPU(images.numpy(), layout="HWC", is_pinned=images.is_pinned())
            self._pipeline.feed_input("images", batch)
        else:
            self._pipeline.feed_input("images", images)
        self._labels.append(torch.from_numpy(labels))
        for name, values in draws.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def result(self) -> Result:
        labels = self._labels.popleft()
        if self._device.type != "cuda":
            (images,) = self._pipeline.outputs()
            return torch.from_dlpack(images.as_tensor()), labels, nothing_to_wait_for
        stream = torch.cuda.current_stream(self._device)
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        labels = labels.pin_memory().to(self._device, non_blocking=True)
        return torch.from_dlpack(images.as_tensor()), labels, _event(stream).synchronize

    def restart(self) -> None:
        """With a graph built anew: whether one survives an error is up to the operator that failed."""
        del self._pipeline  # first, since both may not fit into a GPU's memory
        self._pipeline = self._build()
        self._labels.clear()


def runs_on(file: np.ndarray, build: Callable[[], Pipeline]) -> bool:
    """Whether a graph whose one input is `images` takes this file, uint8 [bytes], as a batch of its own."""
    pipeline = build()
    pipeline.feed_input("images", [file])
    pipeline.schedule_run()
    try:
        pipeline.outputs()
    except RuntimeError:
        return False
    return True


class PlainRunner:
    """For a graph that would do nothing: stored pixels go to the device as they are.

    On a GPU by a stream of its own, so that a batch crosses the bus while the model works on the one before.
    """

    def __init__(self, device: torch.device, gather_stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._gather_stream = gather_stream
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = deque()

    def submit(self, images: torch.Tensor, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None:
        del draws
        if self._copy_stream is None:
            self._ready.append((images, torch.from_numpy(labels), None))
            return
        self._copy_stream.wait_stream(self._gather_stream)  # type: ignore[arg-type]
        with torch.cuda.stream(self._copy_stream):
            # one copy either way: from pinned memory, or out of a slot of resident pixels
            on_device = torch.empty_like(images, device=self._device).copy_(images, non_blocking=True)
            labels_on_device = torch.from_numpy(labels).pin_memory().to(self._device, non_blocking=True)
        self._ready.append((on_device, labels_on_device, _event(self._copy_stream)))

    def result(self) -> Result:
        images, labels, copied = self._ready.popleft()
        if copied is None:
            return images, labels, nothing_to_wait_for
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (images, labels):
            tensor.record_stream(current)  # their memory came from the copying stream, which must not reuse it early
        return images, labels, copied.synchronize  # the slot was read when the copy ended, however long the batch lives

    def restart(self) -> None:
        self._ready.clear()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Recorded now; whoever waits for it sleeps, since a spinning thread would take a core from the launching one."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def nothing_to_wait_for() -> None:
    """The slot may be overwritten already."""
