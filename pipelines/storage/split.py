"""An opened split, with its index and its mapped shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.cpu import batch
from pipelines.order import ShardSchedule
from pipelines.storage import tar_format
from pipelines.storage.dataset import DatasetInfo, SplitInfo
from pipelines.storage.memory_map import advise
from pipelines.storage.monitor import ShardMonitor


class Residency(Protocol):
    """The shards of a split of which only some are on this machine at a time."""

    evicts: bool  # whether shards are unmapped when they are not in use
    is_complete: bool  # whether all shards are mapped and stay so, so that the methods have nothing to do

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this process has received for the data set."""
        ...

    def hold(self, shards: np.ndarray) -> AbstractContextManager[None]:
        """Wait until `shards`, int [N], are mapped, and keep them mapped in the context.

        Raises:
            UserError: A shard cannot be fetched.
        """
        ...

    def follow(self, plan: ReadingPlan, epoch: int, step: int) -> object:
        """Fetch the shards ahead of batch `step` of `epoch`, and return a key for `unfollow`."""
        ...

    def add_epoch(self, epoch: int) -> None:
        """Fetch the shards of another epoch after those of the ones before."""
        ...

    def advance(self, epoch: int, step: int) -> None:
        """Report that batch `step` of `epoch` will be held, and that earlier ones are held already or not needed."""
        ...

    def unfollow(self, key: object) -> None:
        """End the transfers, and all waiting in `hold`, unless a newer call of `follow` has started others."""
        ...

    def check_space(self, plan: ReadingPlan, ahead: int) -> None:
        """Raise UserError if the limit of the cache is too small for the shards that a plan needs at once.

        `ahead` is the maximum number of batches that are being made at a time.
        """
        ...


class ReadingPlan(NamedTuple):
    """When the shards of a split are read, for `Residency`."""

    schedule: Callable[[int], ShardSchedule]  # that of an epoch
    steps: int  # batches per epoch
    order: str  # data.order, or "" for an evaluation, which repeats epoch 0


class PixelReader(Protocol):
    """Reader of pixels that are not stored in the order HWC, or are compressed. Thread-safe."""

    @property
    def piece_bytes(self) -> int | None:
        """Bytes of pixels to read at once, so that they stay in the CPU cache. None: all of a batch."""
        ...

    def read(self, samples: np.ndarray, out: np.ndarray) -> None:
        """Write the images of `samples`, int64 [B], to `out`, uint8 [B, H, W, 3], contiguous."""
        ...


@dataclass(frozen=True)
class Split:
    """One opened split. Arrays [samples] are in stored order. Image bytes are mapped, not copied into the process."""

    dataset: DatasetInfo
    name: str
    labels: np.ndarray | None  # int64 [samples], or None for a split without labels
    shard: np.ndarray  # int32 [samples]: position in `files` of the sample's shard
    files: tuple[Path, ...]
    heights: np.ndarray  # int32 [samples], pixels
    widths: np.ndarray  # int32 [samples], pixels
    address: np.ndarray  # int64 [samples]: start of the sample's image in `content`, bytes
    size: np.ndarray  # int32 [samples]: bytes of the image, .npy header included
    content: np.ndarray  # uint8: all shards, mapped one after another in slots of equal size
    slot_bytes: int  # shard k starts at k * slot_bytes of `content`
    monitor: ShardMonitor  # monitor of `files`; poll it while reading `content`
    residency: Residency | None = None  # None: all shards are mapped; otherwise, `hold` what is read

    def __len__(self) -> int:
        return len(self.address)

    @property
    def info(self) -> SplitInfo:
        """The split's entry in dataset.json."""
        return self.dataset.splits[self.name]

    @property
    def encoding(self) -> str:
        return self.dataset.encoding

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Shape (height, width, 3) of all images of the data set, or None if the images differ in shape."""
        return self.dataset.image_shape

    def subset(self, samples: np.ndarray) -> Split:
        """Return a split of only these samples, whose indices are then counted from 0.

        `samples` are indices in stored order, int64 [N].
        """
        columns = {name: getattr(self, name)[samples] for name in ("shard", "heights", "widths", "address", "size")}
        return replace(self, labels=None if self.labels is None else self.labels[samples], **columns)

    def hold(self, samples: np.ndarray | slice) -> AbstractContextManager[None]:
        """Return a context in which the shards of samples are mapped. Wait for them if they have to be fetched."""
        if self.residency is None or self.residency.is_complete:
            return nullcontext()
        return self.residency.hold(self.shard[samples])

    def image_bytes(self, sample: int) -> np.ndarray:
        """Return the stored bytes of an image, including the .npy header if there is one: uint8 [bytes]."""
        start = int(self.address[sample])
        return self.content[start : start + int(self.size[sample])]

    def image_size(self, sample: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, as given by the index."""
        return int(self.heights[sample]), int(self.widths[sample])

    def pixel_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of an npy split as one strided view, and the row of each sample in the view.

        Samples of equal size have a constant stride, and the slot size is a multiple of the stride, so one view spans
        all shards. Rows after the last sample of a shard are not samples.

        Returns:
            The view, uint8 [rows, height * width * 3], and the row of each sample, int64 [samples].

        Raises:
            ValueError: The split is not stored as npy.
        """
        if self.encoding != "npy" or self.image_shape is None:
            raise ValueError(f"split {self.name!r} stores {self.encoding}, which has no constant stride")
        stride = tar_format.sample_bytes(int(self.size[0]), self.label_digits)
        first = tar_format.BLOCK + len(tar_format.npy_header(self.image_shape))
        pixels = int(np.prod(self.image_shape))
        rows = (len(self.content) - first - pixels) // stride + 1
        view = np.lib.stride_tricks.as_strided(self.content[first:], (rows, pixels), (stride, 1))
        return view, (self.address - tar_format.BLOCK) // stride

    def pixel_reader(self, *, is_random: bool = False) -> PixelReader | None:
        """Return what reads the pixels of an npy split, or None if `content` has them from `pixel_starts` on.

        `is_random` is whether single samples will be read in random order, which may be slow.
        """
        return None

    def read_pixels(self, samples: np.ndarray, out: np.ndarray) -> None:
        """Write images of an npy split to `out`, uint8 [B, H, W, 3], contiguous. `samples` are int64 [B]."""
        if (reader := self.pixel_reader()) is not None:
            reader.read(samples, out)
        else:
            batch.copy(self.content, self.pixel_starts()[samples], out)

    def pixel_starts(self) -> np.ndarray:
        """Return the byte offset of each sample's pixels in `content`, for npy splits only: int64 [samples]."""
        assert self.image_shape is not None
        return self.address + len(tar_format.npy_header(self.image_shape))

    @property
    def label_digits(self) -> int | None:
        """Size of a label member in bytes, or None for a split without labels."""
        return None if self.labels is None else tar_format.count_label_digits(len(self.classes))

    def keys(self, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the keys of samples (by default, of all) from the tar, in ASCII: uint8 [samples, KEY_DIGITS].

        This reads one page of each sample, and thus nearly the whole split if the images are small.
        """
        return self.content[(self.address[samples] - tar_format.BLOCK)[:, None] + np.arange(tar_format.KEY_DIGITS)]

    def source_rows(self, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the source rows of samples, which are their `keys`: int64 [samples]."""
        powers = 10 ** np.arange(tar_format.KEY_DIGITS - 1, -1, -1)
        if self.residency is None or not self.residency.evicts:
            with self.hold(samples):
                return (self.keys(samples) - np.uint8(ord("0"))) @ powers
        numbers = np.arange(len(self))[samples]
        rows = np.empty(len(numbers), np.int64)
        for shard in np.unique(self.shard[numbers]):
            places = np.flatnonzero(self.shard[numbers] == shard)
            with self.hold(numbers[places]):
                rows[places] = (self.keys(numbers[places]) - np.uint8(ord("0"))) @ powers
        return rows

    def advise(self, shards: np.ndarray, advice: int) -> None:
        """Call madvise(2) on whole shards. Failures are ignored.

        `shards` are indices into `files`, and `advice` is a constant such as mmap.MADV_WILLNEED.
        """
        for shard in shards.tolist():
            size = self.info.shards[shard].bytes
            advise(self.content, shard * self.slot_bytes, size, advice)

    def describe(self, sample: int) -> str:
        """Return a sample's position, shard file, key and byte offset as text for an error message."""
        shard, address = int(self.shard[sample]), int(self.address[sample])
        header = self.content[address - tar_format.BLOCK : address].tobytes()
        key = header[: tar_format.KEY_DIGITS].decode("ascii", "replace")
        named = f"key {key}" if key.isdecimal() else "key unreadable"
        offset = address - shard * self.slot_bytes
        return f"sample {sample} of split {self.name!r} ({self.files[shard].name}, {named}, offset {offset})"

    def check_unchanged(self) -> None:
        """Raise UserError if a shard has changed since the split was opened. Call this before saving a checkpoint."""
        self.monitor.check()
