"""Run DALI graphs: a stream of batches, or single files to test whether DALI decodes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from pipelines.gpu.device_inputs import blocking_event
from pipelines.interfaces import RunnerResult, no_wait

DECODE_ERRORS = ("nvImageCodec failure", "Failed to decode")  # parts of DALI's messages; the error type is RuntimeError


class DaliRunner:
    """Runs batches through a DALI graph. Its output tensors are passed on without a copy."""

    def __init__(self, build: Callable[[], Pipeline], device: torch.device) -> None:
        self._build = build
        self._pipeline = build()
        self._device = device
        self._labels: deque[torch.Tensor] = deque()
        self._fed: deque[Any] = deque()  # DALI reads fed images in place until their result is ready

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

    def result(self) -> RunnerResult:
        labels, fed = self._labels.popleft(), self._fed.popleft()
        if self._device.type != "cuda":
            (images,) = self._pipeline.outputs()
            return torch.from_dlpack(images.as_tensor()), labels, no_wait
        stream = torch.cuda.current_stream(self._device)
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        if isinstance(fed, torch.Tensor) and fed.is_cuda:
            fed.record_stream(stream)  # waits for the outputs, so the allocator keeps the input until then
        labels = labels.pin_memory().to(self._device, non_blocking=True)
        return torch.from_dlpack(images.as_tensor()), labels, blocking_event(stream).synchronize

    def restart(self) -> None:
        """Build the graph again: not every DALI operator survives an error."""
        del self._pipeline  # first, since both may not fit into GPU memory
        self._pipeline = self._build()
        self._labels.clear()
        self._fed.clear()


class DecodeCheck:
    """Tests whether a graph with the single input `images` decodes a file. Thread-safe."""

    def __init__(self, build: Callable[[], Pipeline]) -> None:
        """build: Returns the graph for batches of one; called for the first file and again after each failure."""
        self._build = build
        self._pipeline: Pipeline | None = None
        self._lock = Lock()

    def decodes(self, file: np.ndarray) -> bool:
        """Return whether DALI decodes a file, uint8 [bytes]. Other errors, e.g. out of memory, are raised."""
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
