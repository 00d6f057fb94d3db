"""Turns gathered bytes into batches on the device, by a DALI graph or as they are. Knows no order and no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from pipelines.loader.sources import blocking_event

# images uint8 [B, H, W, 3], labels [B], and a function that blocks until the fed slot may be overwritten
Result = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]
DECODE_ERRORS = ("nvImageCodec failure", "Failed to decode")  # in DALI's message, which gives no other type


class Runner(Protocol):
    """Turns gathered bytes into batches on the device; first in, first out."""

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None: ...

    def result(self) -> Result: ...

    def restart(self) -> None:
        """Forget what was submitted, after an error."""
        ...


class DaliRunner:
    """Runs a DALI graph; tensors are handed over without a copy."""

    def __init__(self, build: Callable[[], Pipeline], device: torch.device) -> None:
        self._build = build
        self._pipeline = build()
        self._device = device
        self._labels: deque[torch.Tensor] = deque()
        self._fed: deque[Any] = deque()  # DALI reads fed images in place until their result is there

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None:
        self._fed.append(images)
        if isinstance(images, torch.Tensor) and images.is_cuda:
            self._pipeline.feed_input("images", images, layout="HWC")  # complete: see DevicePixels
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
        labels, fed = self._labels.popleft(), self._fed.popleft()
        if self._device.type != "cuda":
            (images,) = self._pipeline.outputs()
            return torch.from_dlpack(images.as_tensor()), labels, no_wait
        stream = torch.cuda.current_stream(self._device)
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        if isinstance(fed, torch.Tensor) and fed.is_cuda:
            fed.record_stream(stream)  # which waits for the outputs: the allocator keeps the input until then
        labels = labels.pin_memory().to(self._device, non_blocking=True)
        return torch.from_dlpack(images.as_tensor()), labels, blocking_event(stream).synchronize

    def restart(self) -> None:
        """With a graph built anew: whether one survives an error is up to the operator that failed."""
        del self._pipeline  # first, since both may not fit into a GPU's memory
        self._pipeline = self._build()
        self._labels.clear()
        self._fed.clear()


class DecodeCheck:
    """Tells whether a graph whose one input is `images` decodes a file. Several threads may ask."""

    def __init__(self, build: Callable[[], Pipeline]) -> None:
        """build: the graph, for batches of one; called with the first file and after each one that fails."""
        self._build = build
        self._pipeline: Pipeline | None = None
        self._lock = Lock()

    def decodes(self, file: np.ndarray) -> bool:
        """file: uint8 [bytes]. Errors that no file causes, such as a lack of memory, are raised."""
        with self._lock:
            self._pipeline = pipeline = self._pipeline or self._build()
            pipeline.feed_input("images", [file])
            pipeline.schedule_run()
            try:
                pipeline.outputs()
            except RuntimeError as error:
                self._pipeline = None  # no longer valid
                if not any(text in str(error) for text in DECODE_ERRORS):
                    raise
                return False
        return True


class CopyRunner:
    """Hand over batches that need no graph: stored pixels, or those that a source has already augmented.

    Batches in host memory are copied to a GPU on a separate stream, so that the copy overlaps with the model's work on
    the batch before. Batches that are on the device are handed over without a copy.
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
            on_device = images.to(self._device, non_blocking=True)  # itself where it is there
            labels_on_device = torch.from_numpy(labels).pin_memory().to(self._device, non_blocking=True)
            self._ready.append((on_device, labels_on_device, blocking_event()))

    def result(self) -> Result:
        images, labels, copied = self._ready.popleft()
        if copied is None:
            return images, labels, no_wait
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (images, labels):
            tensor.record_stream(current)  # allocated on another stream, which must not reuse their memory early
        # The slot was read when the copy, or the gather before it, ended, however long the batch lives.
        return images, labels, copied.synchronize

    def restart(self) -> None:
        self._ready.clear()


def no_wait() -> None:
    """The slot may be overwritten already."""
