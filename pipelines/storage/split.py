"""An opened split: its index and its mapped shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.storage import tar_format
from pipelines.storage.index import sample_stride
from pipelines.storage.memory_map import advise
from pipelines.storage.monitor import ShardMonitor


@dataclass(frozen=True)
class Split:
    """One split, opened. Arrays run over its samples in stored order; image bytes stay in the page cache."""

    dataset: dict[str, Any]  # dataset.json
    name: str
    labels: np.ndarray | None  # int64 [samples]; None for a split without labels
    shard: np.ndarray  # int32 [samples]: which of `files` holds the sample
    files: tuple[Path, ...]
    heights: np.ndarray  # int32 [samples], pixels
    widths: np.ndarray
    address: np.ndarray  # int64 [samples]: where the sample's content begins in `content`, bytes
    size: np.ndarray  # int32 [samples]: bytes of the content (an .npy header included)
    content: np.ndarray  # uint8: all shards, mapped one behind another at slots of equal size
    slot_bytes: int  # shard k begins at k * slot_bytes of `content`
    monitor: ShardMonitor  # over `files`, for as long as `content` is read

    def __len__(self) -> int:
        return len(self.address)

    @property
    def encoding(self) -> str:
        return self.dataset["encoding"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.dataset["classes"])

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, 3) where all images have one shape, else None."""
        shape = self.dataset["image_shape"]
        return tuple(shape) if shape else None

    def image_bytes(self, sample: int) -> np.ndarray:
        """Return the stored bytes of an image, uint8 [bytes], .npy header included."""
        start = int(self.address[sample])
        return self.content[start : start + int(self.size[sample])]

    def image_size(self, sample: int) -> tuple[int, int]:
        """Return height and width in pixels, as the index has them."""
        return int(self.heights[sample]), int(self.widths[sample])

    def pixel_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The images of an npy split as one strided map: uint8 [rows, height * width * 3] and each sample's row, int64.

        Members of equal size lie at a constant stride, and the slots are whole strides, so one view spans all
        shards; the rows between two shards are never addressed.
        """
        if self.encoding != "npy" or self.image_shape is None:
            raise ValueError(f"split {self.name!r} stores {self.encoding}, which has no constant stride")
        stride = sample_stride(int(self.size[0]), self.labels is not None, len(self.classes))
        first = tar_format.BLOCK + len(tar_format.npy_header(self.image_shape))
        pixels = int(np.prod(self.image_shape))
        rows = (len(self.content) - first - pixels) // stride + 1
        view = np.lib.stride_tricks.as_strided(self.content[first:], (rows, pixels), (stride, 1))
        return view, (self.address - tar_format.BLOCK) // stride

    def pixel_starts(self) -> np.ndarray:
        """Where in `content` the pixels of each sample of an npy split begin: int64 [samples]."""
        assert self.image_shape is not None
        return self.address + len(tar_format.npy_header(self.image_shape))

    def source_rows(self) -> np.ndarray:
        """Which row of the source each sample comes from, as its key in the tar says: int64 [samples].

        Touches a page per sample: about as dear as reading a split of small images once.
        """
        keys = self.content[(self.address - tar_format.BLOCK)[:, None] + np.arange(tar_format.KEY_DIGITS)]
        return (keys - np.uint8(ord("0"))) @ 10 ** np.arange(tar_format.KEY_DIGITS - 1, -1, -1)

    def advise(self, shards: np.ndarray, advice: int) -> None:
        """Give the kernel `advice` (mmap.MADV_WILLNEED …) on whole shards; a hint, so failures are ignored."""
        for shard in shards.tolist():
            size = self.dataset["splits"][self.name]["shards"][shard]["bytes"]
            advise(self.content, shard * self.slot_bytes, size, advice)

    def describe(self, sample: int) -> str:
        """Where a sample lies and what it is called there, for an error message."""
        shard, address = int(self.shard[sample]), int(self.address[sample])
        header = self.content[address - tar_format.BLOCK : address].tobytes()
        key = header[: tar_format.KEY_DIGITS].decode("ascii", "replace")
        named = f"key {key}" if key.isdecimal() else "key unreadable"
        offset = address - shard * self.slot_bytes
        return f"sample {sample} of split {self.name!r} ({self.files[shard].name}, {named}, offset {offset})"

    def check_unchanged(self) -> None:
        """Raise a UserError if a shard is not what it was when the split was opened: before anything is saved."""
        self.monitor.check()
