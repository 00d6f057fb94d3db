"""Source of raw pixels in host memory. Sources of JPEG files are in `jpeg_sources`."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch

from pipelines.cpu import batch
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.interfaces import Draws, FileMonitor, SampleSource
from pipelines.loader.buffers import LentBuffers, SlotBuffers
from pipelines.storage.split import PixelReader


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


class ReadPixels(SampleSource):
    """Source of raw images that a reader brings into the order HWC, such as those of an HDF5 file.

    Args:
        reader: Reader of the samples.
        shape: (H, W, 3) of the stored images.
        buffers: Buffers to fill.
        graph: Graph that transforms the pixels, or None to leave them unchanged.
        monitor: Monitor of the files that are read.
    """

    def __init__(
        self,
        reader: PixelReader,
        shape: tuple[int, int, int],
        buffers: SlotBuffers | LentBuffers,
        graph: CpuGraph | None,
        monitor: FileMonitor,
    ) -> None:
        self._reader, self._shape, self._buffers = reader, shape, buffers
        self._graph, self.monitor = graph, monitor
        piece_bytes = reader.piece_bytes
        size = math.prod(shape)
        self._step = buffers.batch_size if piece_bytes is None else max(1, min(piece_bytes // size, buffers.batch_size))
        self._heights, self._widths = (np.full(self._step, side) for side in shape[:2])
        self._offsets = np.arange(self._step) * size
        self._scratch: deque[np.ndarray] = deque()  # memory for pixels, one per thread

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3]."""
        out = self._buffers(slot, len(indices))
        if self._graph is None:
            self._reader.read(indices, out)
            return torch.from_numpy(out)
        pixels = self._take_scratch()
        for start in range(0, len(indices), self._step):
            piece = slice(start, start + self._step)
            count = len(indices[piece])
            self._reader.read(indices[piece], pixels[:count])
            images = Images(pixels.reshape(-1), self._offsets[:count], self._heights[:count], self._widths[:count])
            self._graph(images, {name: values[piece] for name, values in draws.items()}, out[piece])
        self._scratch.append(pixels)
        return torch.from_numpy(out)

    def _take_scratch(self) -> np.ndarray:
        try:
            return self._scratch.pop()
        except IndexError:
            return np.empty((self._step, *self._shape), np.uint8)
