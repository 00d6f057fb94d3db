"""The format on disk, reading side: `open_split` maps the shards of one split and proves that they are sound.

A data set is a folder: `dataset.json`, and per split `NAME-SPLIT-NNNNNN.tar` shards (WebDataset convention) with
DALI's `.idx` beside them and `SPLIT.index.npz`, arrays over all samples: shard, offset and size of the image member's
content in bytes, label (-1: none), height and width in pixels. `shard_writer` is the writing side. Knows no DALI.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage import hash_cache, tar_check, tar_format
from pipelines.storage.dataset import EXTENSIONS as EXTENSIONS
from pipelines.storage.dataset import FORMAT as FORMAT
from pipelines.storage.dataset import RECONVERT as RECONVERT
from pipelines.storage.dataset import VERSION as VERSION
from pipelines.storage.dataset import fingerprint as fingerprint
from pipelines.storage.dataset import in_source_order as in_source_order
from pipelines.storage.dataset import load_dataset as load_dataset
from pipelines.storage.index import INDEX_COLUMNS as INDEX_COLUMNS
from pipelines.storage.index import check_size, load_index
from pipelines.storage.index import sample_stride as sample_stride
from pipelines.storage.memory_map import advise, map_files
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


def open_split(
    folder: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    allow_damaged_images: bool = False,
) -> Split:
    """Map one split's shards and load its index; nothing is used that is not what dataset.json says.

    Costs one read of the index: 1.5 M samples open in well under a second. Shards are read whole by the first start
    after they were changed (see `verified`), with verify "off" never: sizes are all that is compared then.
    tolerates_content: a JPEG shard in which images differ, but neither headers, keys nor labels, is a warning.
    """
    folder = Path(folder)
    dataset = load_dataset(folder)
    if name not in dataset["splits"]:
        raise UserError(f"{str(folder)!r} has no split {name!r}; it has {', '.join(dataset['splits'])}")
    entry = dataset["splits"][name]
    files = tuple(folder / shard["file"] for shard in entry["shards"])
    for file, shard in zip(files, entry["shards"], strict=True):
        check_size(file, shard["bytes"])
    index = load_index(folder, dataset, name)
    unit = mmap.PAGESIZE
    if dataset["encoding"] == "npy":
        stride = sample_stride(int(index["size"][0]), entry["labelled"], len(dataset["classes"]))
        unit = int(np.lcm(stride, unit))
    sizes = np.array([shard["bytes"] for shard in entry["shards"]], np.int64)
    slot = -(-int(sizes.max()) // unit) * unit
    contents = hash_cache.shard_hashes(folder, dataset, name) if verify == "changed" else None
    content, fault_address, stamps = map_files(files, sizes.tolist(), slot)
    expected = [shard["sha256"] for shard in entry["shards"]]
    digests = expected if contents is None else [found.sha256 for found in contents]
    split = Split(
        dataset=dataset,
        name=name,
        labels=index["label"].astype(np.int64) if entry["labelled"] else None,
        shard=index["shard"],
        files=files,
        heights=index["height"],
        widths=index["width"],
        address=index["shard"] * np.int64(slot) + index["offset"],
        size=index["size"],
        content=content,
        slot_bytes=slot,
        monitor=ShardMonitor(
            name,
            files,
            digests,
            stamps,
            fault_address,
            lambda number: content[number * slot : number * slot + int(sizes[number])],
        ),
    )
    for number, (file, stamp) in enumerate(zip(files, stamps, strict=True)):
        if contents is not None and stamp.content_key != contents[number].stamp.content_key:
            raise UserError(f"{file} was changed while it was being opened; start again when nothing writes to it")
        if digests[number] != expected[number]:
            _refuse(split, number, digests[number], allow_damaged_images)
    return split


def _refuse(split: Split, number: int, sha256: str, allow_damaged_images: bool) -> None:
    """Raise for a shard whose content is not what dataset.json says; warn of one that may be used nevertheless."""
    damage = tar_check.diagnose(split, number, sha256)
    named = f"{split.files[number]} does not have the sha256 that dataset.json gives: {damage.text}"
    # A damaged pixel of an npy split cannot be told from a sound one when it is trained on.
    is_usable = damage.in_content_only and split.encoding == "jpeg"
    if not (allow_damaged_images and is_usable):
        advice = ", or train with substitutes for bad samples: data.on_bad_sample=skip" if is_usable else ""
        raise UserError(f"{named}; {RECONVERT}{advice}")
    warn(f"{named}; the samples that can be decoded are used")
