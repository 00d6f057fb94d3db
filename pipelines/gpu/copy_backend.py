"""The backend for stored pixels that need no transforms: copies to the device, or gathers from its memory."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from pipelines.gpu.device_inputs import DeviceInputs, blocking_event, to_device
from pipelines.interfaces import Draws, Runner, RunnerResult, SampleSource, StoredImages
from pipelines.loader.backend import MAX_COPY_THREADS, Backend, LoaderSpec, pixels_on_host
from pipelines.loader.buffers import SlotBuffers


class CopyBackend(Backend):
    """Pixels in host memory are copied to the GPU; those of a resident split are gathered on the GPU."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self.image_shape = spec.split.image_shape or (0, 0, 0)
        # The thread of a resident split only launches kernels.
        self.threads = min(MAX_COPY_THREADS, spec.threads) if spec.pixels is None else 1
        self.stream = torch.cuda.Stream(spec.device)
        self.source_views = 1 if spec.pixels is None else spec.views  # a sample is copied to the device once

    def source(self, slots: int, slot_size: int) -> SampleSource:
        if self.spec.pixels is not None:
            return DevicePixels(self.spec.pixels, self.image_shape, slot_size, slots, waits=False)
        return pixels_on_host(self.spec, SlotBuffers(slots, slot_size, self.image_shape, pinned=True))

    def runner(self) -> Runner:
        assert self.stream is not None
        return CopyRunner(self.spec.device, self.stream, self.spec.views // self.source_views)


class DevicePixels(SampleSource):
    """Source that gathers batches of a split in GPU memory, without copying pixels from the host.

    Each batch is a new tensor, so it can be passed on without a copy. torch's allocator reuses the memory of a batch
    once the streams on which the tensor was recorded are done with it.

    Args:
        pixels: uint8 [N, H * W * 3].
        shape: (H, W, 3) of the stored images.
        batch_size: Images per slot.
        slots: Number of slots.
        waits: Whether `fill` blocks until the batch is written. DALI needs this, since it does not wait for a stream
            before reading an input that was fed with no_copy.
    """

    def __init__(
        self, pixels: torch.Tensor, shape: tuple[int, int, int], batch_size: int, slots: int, *, waits: bool
    ) -> None:
        self._pixels, self._shape, self._waits = pixels, shape, waits and pixels.is_cuda
        self._indices = DeviceInputs(slots, (batch_size,), pixels.device)

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3], written on the current stream."""
        samples = len(indices)
        self._indices.host(slot)[:samples] = indices
        rows = self._pixels.index_select(0, self._indices.to_device(slot)[:samples])
        if self._waits:
            blocking_event().synchronize()
        return rows.view(samples, *self._shape)


class CopyRunner:
    """Runner that copies batches to a GPU. The source has already applied any transforms.

    Batches in host memory are copied on a separate stream, so that the copy overlaps with the model's work on the
    previous batch. Batches that are already on the device are passed on without a copy.

    Args:
        device: Device of the batches.
        stream: Stream on which the source gathers batches on the device. Copies run on it as well.
        views: Number of equal images to make of each image.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, views: int = 1) -> None:
        self._device, self._stream, self._views = device, stream, views
        self._ready: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()

    def submit(self, images: StoredImages, labels: np.ndarray, draws: Draws) -> None:
        assert isinstance(images, torch.Tensor)
        with torch.cuda.stream(self._stream):
            *tables, labels_on_device = to_device([*self.tables(draws), labels], self._device)
            # no copy if they are already on the device
            on_device = self.transform(images.to(self._device, non_blocking=True), tables)
            self._ready.append((on_device, labels_on_device, blocking_event()))

    def tables(self, draws: Draws) -> list[np.ndarray]:
        """Return the arrays that `transform` reads, int64. They are copied to the device together with the labels."""
        return []

    def transform(self, images: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
        """Transform images that are on the device, on the current stream. This class only repeats them."""
        return images if self._views == 1 else images.repeat_interleave(self._views, 0)

    def result(self) -> RunnerResult:
        images, labels, copied = self._ready.popleft()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (images, labels):
            tensor.record_stream(current)  # allocated on another stream, which must not reuse the memory early
        # The slot is free once the copy, or the gather before it, has ended, even while the batch is in use.
        return images, labels, copied.synchronize

    def restart(self) -> None:
        self._ready.clear()
