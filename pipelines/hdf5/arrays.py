"""Read arrays of images from front to back, as a conversion does.

A file is read sequentially and in large pieces, since reading random rows takes a hundred times as long if the file is
chunked, compressed or on a spinning disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from pipelines.hdf5.checks import Layout, chunk_bytes
from pipelines.hdf5.file import open_file, report_damage

READ_BYTES = 64 << 20  # per read; large enough that disk seeks take little of the time


class Hdf5Images:
    """One split of images in an HDF5 file. Each process opens the file on its first read and keeps it open."""

    def __init__(self, path: Path, images: h5py.Dataset, layout: Layout, labels: np.ndarray | None) -> None:
        self._path, self._key = path, images.name.lstrip("/")
        self._shape, self._layout = images.shape, layout
        self.labels = labels
        self.bytes_per_row = math.prod(images.shape[1:])
        rows = max(READ_BYTES // self.bytes_per_row, 1)
        chunk_rows = images.chunks[0] if images.chunks else 1
        self._rows_per_read = max(rows // chunk_rows, 1) * chunk_rows  # whole chunks, each decompressed once
        self._chunk_bytes = chunk_bytes(images)
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return self._shape[0]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the images from `start` up to `stop` (exclusive), uint8 [H, W, 3].

        The file is read in pieces of at most `READ_BYTES`, or of one row or chunk if that is larger.

        Raises:
            UserError: The file cannot be read or is damaged.
        """
        if self._file is None:
            with report_damage(str(self._path)):
                self._file = open_file(self._path)
        step = self._rows_per_read
        buffer = np.empty((min(step, stop - start), *self._shape[1:]), np.uint8)
        while start < stop:
            end = min((start // step + 1) * step, stop)
            with report_damage(f"{self._path}: {self._key}[{start}:{end}]", self._chunk_bytes):
                self._file[self._key].read_direct(buffer, np.s_[start:end], np.s_[: end - start])
            for row in buffer[: end - start]:
                yield _to_rgb(row, self._layout)
            start = end

    def describe(self, row: int) -> str:
        return f"{self._key}[{row}]"


def _to_rgb(image: np.ndarray, layout: Layout) -> np.ndarray:
    """Copy an image as stored to a new array, uint8 [H, W, 3]."""
    if layout == "channels first":
        return _channels_last(image)
    if layout == "greyscale":
        grey = image if image.ndim == 2 else image.squeeze(0 if image.shape[0] == 1 else 2)
        return np.repeat(grey[..., None], 3, axis=2)
    return image.copy()


def _channels_last(image: np.ndarray) -> np.ndarray:
    """Transpose [3, H, W] to contiguous [H, W, 3]. This is three times as fast as np.ascontiguousarray."""
    result = np.empty((*image.shape[1:], 3), np.uint8)
    for channel in range(3):
        result[..., channel] = image[channel]
    return result
