"""Run DALI graphs on a stream of batches, or on individual files to test whether DALI can decode them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from pipelines.gpu.device_inputs import blocking_event, to_device
from pipelines.interfaces import Draws, RunnerResult, StoredImages, no_wait

DECODE_ERRORS = ("nvImageCodec failure", "Failed to decode")  # parts of the messages of DALI's RuntimeErrors


class DaliRunner:
    """Runner that passes batches through a DALI graph. The images in a result share memory with DALI's outputs."""

    def __init__(self, build: Callable[[], Pipeline], device: torch.device) -> None:
        self._build = build
        self._pipeline = build()
        self._device = device
        self._labels: deque[np.ndarray] = deque()
        self._fed: deque[StoredImages] = deque()  # DALI reads inputs in place until the result is ready

    def submit(self, images: StoredImages, labels: np.ndarray, draws: Draws) -> None:
        self._fed.append(images)
        if isinstance(images, torch.Tensor) and images.is_cuda:
            self._pipeline.feed_input("images", images, layout="HWC")  # gathered already, see DevicePixels
        elif isinstance(images, torch.Tensor):
            batch = TensorListCPU(images.numpy(), layout="HWC", is_pinned=images.is_pinned())
            self._pipeline.feed_input("images", batch)
        else:
            self._pipeline.feed_input("images", images)
        self._labels.append(labels)
        for name, values in draws.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def result(self) -> RunnerResult:
        labels, fed = self._labels.popleft(), self._fed.popleft()
        if self._device.type != "cuda":
            (images,) = self._pipeline.outputs()
            return torch.from_dlpack(images.as_tensor()), torch.from_numpy(labels), no_wait
        stream = torch.cuda.current_stream(self._device)
        (images,) = self._pipeline.outputs(cuda_stream=stream)
        if isinstance(fed, torch.Tensor) and fed.is_cuda:
            fed.record_stream(stream)  # waits for the outputs; the allocator keeps the input until then
        (labels_on_device,) = to_device([labels], self._device)
        return torch.from_dlpack(images.as_tensor()), labels_on_device, blocking_event(stream).synchronize

    def restart(self) -> None:
        """Drop all submitted batches and rebuild the graph, since some DALI operators do not recover from an error."""
        del self._pipeline  # freed first, since two graphs may not fit into GPU memory
        self._pipeline = self._build()
        self._labels.clear()
        self._fed.clear()


class DecodeCheck:
    """Test whether DALI can decode individual files. Thread-safe.

    Args:
        build: Function that returns a graph with a batch size of 1 whose only input is `images`. It is called for the
            first file, and again for the first file after an error.
    """

    def __init__(self, build: Callable[[], Pipeline]) -> None:
        self._build = build
        self._pipeline: Pipeline | None = None
        self._lock = Lock()

    def decodes(self, file: np.ndarray) -> bool:
        """Return True if DALI can decode a file, uint8 [bytes].

        Raises:
            RuntimeError: DALI failed for another reason, such as insufficient memory.
        """
        with self._lock:
            self._pipeline = pipeline = self._pipeline or self._build()
            pipeline.feed_input("images", [file])
            pipeline.schedule_run()
            try:
                pipeline.outputs()
            except RuntimeError as error:
                self._pipeline = None  # a graph is unusable after an error
                if not any(text in str(error) for text in DECODE_ERRORS):
                    raise
                return False
        return True
