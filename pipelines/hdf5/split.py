"""Open a split of an HDF5 file, in the stored order of its conversion."""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.cpu import batch, planes
from pipelines.hdf5.chunks import ChunkCache, ChunkReader
from pipelines.hdf5.dataset import Hdf5Dataset, shard_rows
from pipelines.hdf5.file_record import FileRecord
from pipelines.hdf5.storage import Storage, convert_command
from pipelines.storage import tar_format
from pipelines.storage.dataset import STORING_SEED
from pipelines.storage.index import stored_order
from pipelines.storage.memory_map import map_files
from pipelines.storage.monitor import ShardMonitor
from pipelines.storage.split import PixelReader, Split

PROBED_SAMPLES, PROBE_S = 32, 0.5  # most of a probe of the reading speed
PIECE_BYTES = 2**20  # of pixels that are reordered and then transformed while they are in the CPU cache


@dataclass(frozen=True, kw_only=True)
class Hdf5Split(Split):
    """A split whose images are in an HDF5 file. `content` is the whole file."""

    rows: np.ndarray  # int64 [samples]: row of each sample in the file
    storage: Storage
    cache: ChunkCache | None  # None: `address` is the start of each row in `content`

    def subset(self, samples: np.ndarray) -> Hdf5Split:
        chosen = super().subset(samples)
        assert isinstance(chosen, Hdf5Split)
        return replace(chosen, rows=self.rows[samples])

    def pixel_reader(self, *, is_random: bool = False) -> PixelReader | None:
        stride = self.storage.plane_stride
        if self.cache is not None:
            if is_random and self.info.shuffled:
                _note_speed(self.files[0], self.storage, self.content)
            return ChunkReader(self.storage, self.rows, self.cache)
        return None if stride is None else PlaneReader(self.content, self.address, stride)

    def image_bytes(self, sample: int) -> np.ndarray:
        """Return the pixels of an image in the order HWC: uint8 [bytes]."""
        out = np.empty((1, *self.storage.image_shape), np.uint8)
        self.read_pixels(np.array([sample]), out)
        return out.reshape(-1)

    def pixel_rows(self) -> tuple[np.ndarray, np.ndarray]:
        raise ValueError(f"split {self.name!r} is not stored in shards")

    def pixel_starts(self) -> np.ndarray:
        return self.address

    def keys(self, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        return tar_format.digits(self.rows[samples], tar_format.KEY_DIGITS)

    def source_rows(self, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        return self.rows[samples]

    def advise(self, shards: np.ndarray, advice: int) -> None:
        """Do nothing, since the rows of a shard are anywhere in the file."""

    def describe(self, sample: int) -> str:
        return f"sample {sample} of split {self.name!r} ({self.files[0].name}, {self.storage.key}[{self.rows[sample]}])"


class PlaneReader:
    """Reader of rows that are stored as one or three planes; see `pipelines.storage.split.PixelReader`."""

    piece_bytes: int | None = PIECE_BYTES

    def __init__(self, content: np.ndarray, address: np.ndarray, stride: int) -> None:
        self._content, self._address, self._stride = content, address, stride

    def read(self, samples: np.ndarray, out: np.ndarray) -> None:
        planes.join_planes(self._content, self._address[samples], self._stride, out)


def map_split(dataset: Hdf5Dataset, name: str, *, verify: Literal["changed", "off"] = "off") -> Hdf5Split:
    """Map a file and return one of its splits.

    Args:
        dataset: Description of the file.
        name: Name of the split.
        verify: "changed" warns if the file has changed since `zhu convert verify` recorded its sha256.

    Raises:
        UserError: The file has no such split, or is being changed.
        ValueError, OSError: See `map_files`.
    """
    path = dataset.contents.path
    if name not in dataset.splits:
        raise UserError(f"{str(path)!r} has no split {name!r}; it has {', '.join(dataset.splits)}")
    stamp = dataset.contents.stamp
    sha256 = FileRecord(path).recorded_sha256(stamp, warns=verify == "changed")
    slot_bytes = -(-stamp.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    mapped = map_files((path,), [stamp.bytes], slot_bytes)
    mapped_as = mapped.stamps[0]
    if mapped_as is None or mapped_as.content_key != stamp.content_key:
        raise UserError(f"{path} was changed while it was being opened; start again when nothing writes to it")
    return _build_split(dataset, name, mapped.content, ShardMonitor(name, (path,), [sha256], mapped))


def _build_split(dataset: Hdf5Dataset, name: str, content: np.ndarray, monitor: ShardMonitor) -> Hdf5Split:
    path, stored = dataset.contents.path, dataset.contents.splits[name]
    storage = stored.storage
    count, (height, width, _) = storage.shape[0], storage.image_shape
    rows = stored_order(count, STORING_SEED, dataset.splits[name].shuffled)
    address = storage.row_offsets(rows)

    def constant(value: int, kind: type = np.int32) -> np.ndarray:
        return np.broadcast_to(kind(value), count)

    return Hdf5Split(
        dataset=dataset,
        name=name,
        labels=None if stored.labels is None else stored.labels[rows],
        shard=(np.arange(count) // shard_rows(stored, len(dataset.classes))).astype(np.int32),
        files=(path,),
        heights=constant(height),
        widths=constant(width),
        address=constant(0, np.int64) if address is None else address,
        size=constant(height * width * 3),
        content=content,
        slot_bytes=len(content),
        monitor=monitor,
        rows=rows,
        storage=storage,
        cache=ChunkCache(path, storage, content) if address is None else None,
    )


_noted: set[tuple[Path, str]] = set()  # files and keys


def _note_speed(path: Path, storage: Storage, content: np.ndarray) -> None:
    """Print how fast random samples are read, and how fast they would be read from shards, once per process."""
    if (path, storage.key) in _noted:
        return
    _noted.add((path, storage.key))
    count = storage.shape[0]
    cache = ChunkCache(path, storage, content)
    reader = ChunkReader(storage, np.arange(count), cache)
    samples = np.random.default_rng(0).integers(0, count, PROBED_SAMPLES)
    out = np.empty((PROBED_SAMPLES, *storage.image_shape), np.uint8)
    copied, offsets = np.empty_like(out), np.arange(PROBED_SAMPLES) * out[0].size
    reader.read(samples[:1], out[:1])  # load the kernels
    batch.copy(out.reshape(-1), offsets, copied)
    done, start = 0, time.perf_counter()
    while done < PROBED_SAMPLES and time.perf_counter() - start < PROBE_S:
        reader.read(samples[done : done + 1], out[:1])
        done += 1
    seconds, start = (time.perf_counter() - start) / done, time.perf_counter()
    batch.copy(out.reshape(-1), offsets, copied)
    ratio = seconds * PROBED_SAMPLES / (time.perf_counter() - start)
    warn(
        f"{path}: {storage.key} is stored in chunks of {cache.chunks.shape}, so that each thread reads about "
        f"{1 / seconds:,.0f} random images per second; from shards in memory it would read about {ratio:,.0f} times as "
        f"many: {convert_command(path)}"
    )
