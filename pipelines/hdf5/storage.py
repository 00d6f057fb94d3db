"""Where the pixels of a data set are in an HDF5 file, so that they can be read without HDF5's library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError
from pipelines.hdf5.checks import Layout


@dataclass(frozen=True)
class Chunks:
    """The chunks of a data set, in C order of their places in it."""

    shape: tuple[int, ...]  # of a chunk
    grid: tuple[int, ...]  # number of chunks along each axis
    offsets: np.ndarray  # int64 [chunks]: start in the file, bytes
    sizes: np.ndarray  # int64 [chunks]: stored bytes
    masks: np.ndarray  # uint32 [chunks]: bit k is set if filter k was skipped
    filters: tuple[int, ...]  # HDF5's numbers, in the order of writing

    @property
    def bytes(self) -> int:
        """Size of a chunk after decompression."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Storage:
    """The storage of one array of images, uint8 [rows, ...]."""

    key: str
    layout: Layout
    shape: tuple[int, ...]
    offset: int | None  # of the first byte in the file, for a contiguous array
    chunks: Chunks | None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, 3) of the images."""
        sides = [side for axis, side in enumerate(self.shape[1:]) if axis != self._channel_axis]
        return sides[0], sides[1], 3

    @property
    def _channel_axis(self) -> int | None:
        """Axis of a row that holds the channels, or None."""
        if len(self.shape) == 3:
            return None
        if self.layout == "greyscale":
            return 0 if self.shape[1] == 1 else 2
        return 0 if self.layout == "channels first" else 2

    @property
    def plane_stride(self) -> int | None:
        """Bytes between the planes of a row's channels, or None if the channels of a pixel are next to each other."""
        height, width, _ = self.image_shape
        return {"channels first": height * width, "greyscale": 0}.get(self.layout)

    def row_offsets(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the offset of each of `rows`, int64 [N], in the file: int64 [N], bytes.

        Return None if rows are not stored as a whole and unchanged, but in chunks with filters or with parts of rows.
        """
        chunks = self.chunks
        if self.offset is not None:
            return self.offset + rows * self.row_bytes
        if chunks is None or chunks.filters or chunks.shape[1:] != self.shape[1:]:
            return None
        chunk, place = np.divmod(rows, chunks.shape[0])
        return chunks.offsets[chunk] + place * self.row_bytes


def find_storage(path: Path, images: h5py.Dataset, layout: Layout) -> Storage:
    """Locate the bytes of a data set that `checks.checked_dataset` has accepted.

    Raises:
        UserError: The data set is stored in the header of the file, or a byte would be outside of the file.
    """
    key, size = images.name.lstrip("/"), path.stat().st_size
    if images.file.id.get_create_plist().get_userblock():
        raise UserError(f"{path} begins with a user block, which is not read in place; {convert_command(path)}")
    offset = images.id.get_offset() if images.chunks is None else None
    chunks = None if images.chunks is None else _find_chunks(images)
    if offset is None and chunks is None:
        raise UserError(f"{path}: {key} is stored in the header of the file (compact); {convert_command(path)}")
    ends = np.array([offset + images.size]) if chunks is None else chunks.offsets + chunks.sizes
    if ends.max() > size:
        raise UserError(f"{path} has {size:,} bytes, but {key} needs {int(ends.max()):,} (truncated?); fetch it again")
    if chunks is not None and not chunks.filters and chunks.sizes.min() < chunks.bytes:
        raise UserError(f"{path}: {key} has a chunk of too few bytes; the file is damaged: fetch it again")
    return Storage(key, layout, images.shape, offset, chunks)


def _find_chunks(images: h5py.Dataset) -> Chunks:
    grid = tuple(-(-length // chunk) for length, chunk in zip(images.shape, images.chunks, strict=True))
    offsets, sizes = np.full(grid, -1), np.zeros(grid, np.int64)
    masks = np.zeros(grid, np.uint32)

    def add(chunk: h5py.h5d.StoreInfo) -> None:
        place = tuple(start // length for start, length in zip(chunk.chunk_offset, images.chunks, strict=True))
        offsets[place], sizes[place], masks[place] = chunk.byte_offset, chunk.size, chunk.filter_mask

    images.id.chunk_iter(add)
    if offsets.min() < 0:
        raise ValueError("the index of chunks is incomplete")
    plan = images.id.get_create_plist()
    filters = tuple(plan.get_filter(number)[0] for number in range(plan.get_nfilters()))
    # Shuffling bytes of one-byte elements changes nothing.
    masks, shuffles = masks.reshape(-1), h5py.h5z.FILTER_SHUFFLE
    if filters and all(number == shuffles for number in filters):
        filters = ()
    return Chunks(images.chunks, grid, offsets.reshape(-1), sizes.reshape(-1), masks, filters)


def convert_command(path: Path) -> str:
    """Return the end of an error message: how to convert the file."""
    return f"convert it: zhu convert hdf5 --source {path} --out data/{path.stem}"
