"""Read rows of arrays that are stored in chunks, and undo HDF5's filters.

HDF5's library has one lock, and its cache decompresses a chunk again for every read. Here, threads decompress different
chunks at the same time, and each chunk once per batch at most.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from threading import Lock

import h5py
import numpy as np

from configs.utils.errors import UserError
from pipelines.cpu import planes
from pipelines.hdf5.storage import Chunks, Storage

CACHE_BYTES = 2**28  # of decompressed chunks per split and process; at least one chunk
CHECKSUM_BYTES = 4  # at the end of a chunk with the filter fletcher32


class ChunkCache:
    """The decompressed chunks of one array that were used last. Thread-safe.

    Args:
        path: The HDF5 file, for messages.
        storage: Storage of the array.
        content: The mapped file, uint8 [bytes].
    """

    def __init__(self, path: Path, storage: Storage, content: np.ndarray) -> None:
        assert storage.chunks is not None
        self._path, self._key, self._content = path, storage.key, content
        self.chunks: Chunks = storage.chunks
        self._most = max(1, CACHE_BYTES // self.chunks.bytes)
        self._held: OrderedDict[int, Future[np.ndarray]] = OrderedDict()  # by number, the last used at the end
        self._lock = Lock()

    def __call__(self, number: int) -> np.ndarray:
        """Return a chunk, uint8 [*chunks.shape]. A second thread that asks for it meanwhile waits for the first.

        Raises:
            UserError: The chunk is damaged.
        """
        with self._lock:
            found = self._held.pop(number, None)
            future = self._held[number] = found or Future()
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        if found is None:
            try:
                future.set_result(self._load(number))
            except BaseException as error:
                with self._lock:
                    self._held.pop(number, None)
                future.set_exception(error)
        return future.result()

    def _load(self, number: int) -> np.ndarray:
        chunks, start = self.chunks, int(self.chunks.offsets[number])
        stored = self._content[start : start + int(chunks.sizes[number])]
        try:
            return _undo_filters(stored, chunks, int(chunks.masks[number])).reshape(chunks.shape)
        except (ValueError, zlib.error) as error:
            row = number // math.prod(chunks.grid[1:]) * chunks.shape[0]
            raise UserError(
                f"{self._path}: a chunk of {self._key} from row {row} on cannot be read ({error}); the file is "
                "damaged: check it with `zhu convert verify`, and fetch it again"
            ) from None


def _undo_filters(stored: np.ndarray, chunks: Chunks, skipped: int) -> np.ndarray:
    """Return the bytes of a chunk, uint8 [chunks.bytes].

    Args:
        stored: Its bytes in the file.
        chunks: The chunks of the array.
        skipped: Bit mask of filters that were not applied to this chunk.

    Raises:
        ValueError, zlib.error: The chunk is damaged.
    """
    for place in reversed([place for place in range(len(chunks.filters)) if not skipped >> place & 1]):
        if chunks.filters[place] == h5py.h5z.FILTER_DEFLATE:
            inflated = zlib.decompressobj().decompress(stored.data, chunks.bytes + CHECKSUM_BYTES + 1)
            stored = np.frombuffer(inflated, np.uint8)
        elif chunks.filters[place] == h5py.h5z.FILTER_LZF:
            buffer = np.empty(chunks.bytes + CHECKSUM_BYTES, np.uint8)
            stored = buffer[: max(planes.decompress_lzf(stored, buffer), 0)]
        elif chunks.filters[place] == h5py.h5z.FILTER_FLETCHER32:
            stored, checksum = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
            if planes.fletcher32(stored) != int.from_bytes(checksum.tobytes(), "little"):
                raise ValueError("its checksum is wrong")
    if len(stored) != chunks.bytes:
        raise ValueError(f"it has {len(stored):,} bytes instead of {chunks.bytes:,}")
    return stored


class ChunkReader:
    """Reader of rows from chunks; see `pipelines.storage.split.PixelReader`."""

    piece_bytes: int | None = None

    def __init__(self, storage: Storage, rows: np.ndarray, cache: ChunkCache) -> None:
        self._storage, self._rows, self._cache = storage, rows, cache

    def read(self, samples: np.ndarray, out: np.ndarray) -> None:
        """Write the images of `samples`, int64 [B], to `out`, uint8 [B, H, W, 3], contiguous.

        Raises:
            UserError: A chunk is damaged.
        """
        storage, stride = self._storage, self._storage.plane_stride
        shape = (len(samples), *storage.shape[1:])
        stored = out if stride is None else np.empty(shape, np.uint8)
        self._copy_rows(self._rows[samples], stored.reshape(shape))
        if stride is not None:
            planes.join_planes(stored.reshape(-1), np.arange(len(samples)) * storage.row_bytes, stride, out)

    def _copy_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows as they are stored, uint8 [B, ...], each chunk at once."""
        chunks = self._cache.chunks
        block, place = np.divmod(rows, chunks.shape[0])
        order = np.argsort(block, kind="stable")
        starts = np.flatnonzero(np.diff(block[order], prepend=-1))
        per_block = math.prod(chunks.grid[1:])
        parts = list(product(*(range(count) for count in chunks.grid[1:])))
        for some in np.split(order, starts[1:]):
            for number, part in enumerate(parts, int(block[some[0]]) * per_block):
                first = [index * length for index, length in zip(part, chunks.shape[1:], strict=True)]
                counts = [min(b, c - a) for a, b, c in zip(first, chunks.shape[1:], out.shape[1:], strict=True)]
                target = (slice(None), *(slice(a, a + b) for a, b in zip(first, counts, strict=True)))
                source = (slice(None), *map(slice, counts))
                out[target][some] = self._cache(number)[source][place[some]]
