"""A runner for batches that do not need a DALI graph."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from pipelines.gpu.device_inputs import blocking_event
from pipelines.interfaces import RunnerResult, no_wait


class CopyRunner:
    """Runner that copies batches to the device. The source has already applied any transforms.

    Batches in host memory are copied to a GPU on a separate stream, so that the copy overlaps with the model's work on
    the previous batch. Batches that are already on the device are passed on without a copy.
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
            on_device = images.to(self._device, non_blocking=True)  # no copy if it is already on the device
            labels_on_device = torch.from_numpy(labels).pin_memory().to(self._device, non_blocking=True)
            self._ready.append((on_device, labels_on_device, blocking_event()))

    def result(self) -> RunnerResult:
        images, labels, copied = self._ready.popleft()
        if copied is None:
            return images, labels, no_wait
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (images, labels):
            tensor.record_stream(current)  # allocated on another stream, which must not reuse the memory early
        # The slot is free once the copy, or the gather before it, has ended, even while the batch is in use.
        return images, labels, copied.synchronize

    def restart(self) -> None:
        self._ready.clear()
