"""Source of raw pixels in host memory. Sources of JPEG files are in `jpeg_sources`."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.cpu import batch
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.interfaces import Draws, FileMonitor, SampleSource
from pipelines.loader.buffers import LentBuffers, SlotBuffers


class HostPixels(SampleSource):
    """Source of raw images in host memory, either resident or in mapped npy shards.

    Args:
        content: uint8 [bytes].
        offsets: int64 [samples], byte offset of each sample's pixels.
        shape: (H, W, 3) of the stored images.
        buffers: Buffers to fill.
        graph: Graph that transforms the pixels, or None to copy the pixels unchanged.
        monitor: Monitor of the mapped files, or None if the pixels are resident.
    """

    def __init__(
        self,
        content: np.ndarray,
        offsets: np.ndarray,
        shape: tuple[int, int, int],
        buffers: SlotBuffers | LentBuffers,
        graph: CpuGraph | None = None,
        monitor: FileMonitor | None = None,
    ) -> None:
        self._content, self._offsets, self._buffers = content, offsets, buffers
        self._graph, self.monitor = graph, monitor
        self._heights, self._widths = (np.full(buffers.batch_size, side) for side in shape[:2])

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3]."""
        count = len(indices)
        out = self._buffers(slot, count)
        if self._graph is None:
            batch.copy(self._content, self._offsets[indices], out)
        else:
            sides = self._heights[:count], self._widths[:count]
            self._graph(Images(self._content, self._offsets[indices], *sides), draws, out)
        return torch.from_numpy(out)
