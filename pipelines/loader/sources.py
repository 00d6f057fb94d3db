"""Sources of raw pixels in mapped files or in memory. Sources of JPEG files are in `jpeg_sources`.

A source in host memory fills one of a few reused slots. A source in GPU memory allocates a new tensor for each batch.
"""

from __future__ import annotations

import numpy as np
import torch

from pipelines.cpu import batch
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.gpu.device_inputs import DeviceInputs, blocking_event
from pipelines.interfaces import FileMonitor, SampleSource
from pipelines.loader.buffers import SlotBuffers


class HostPixels(SampleSource):
    """Source of raw images in host memory, either resident or in mapped npy shards.

    Args:
        content: uint8 [bytes].
        offsets: int64 [samples], byte offset of each sample's pixels.
        shape: (H, W, 3) of the stored images.
        slots: Buffers to fill.
        graph: Graph that transforms the pixels, or None to copy the pixels unchanged.
        monitor: Monitor of the mapped files, or None if the pixels are resident.
    """

    def __init__(
        self,
        content: np.ndarray,
        offsets: np.ndarray,
        shape: tuple[int, int, int],
        slots: SlotBuffers,
        graph: CpuGraph | None = None,
        monitor: FileMonitor | None = None,
    ) -> None:
        self._content, self._offsets, self._slots, self._graph, self.monitor = content, offsets, slots, graph, monitor
        self._heights, self._widths = (np.full(slots.batch_size, side) for side in shape[:2])

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3]."""
        count = len(indices)
        out = self._slots(slot, count)
        if self._graph is None:
            batch.copy(self._content, self._offsets[indices], out)
        else:
            sides = self._heights[:count], self._widths[:count]
            self._graph(Images(self._content, self._offsets[indices], *sides), draws, out)
        return torch.from_numpy(out)


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

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3], written on the current stream."""
        samples = len(indices)
        self._indices.host(slot)[:samples] = indices
        rows = self._pixels.index_select(0, self._indices.to_device(slot)[:samples])
        if self._waits:
            blocking_event().synchronize()
        return rows.view(samples, *self._shape)
