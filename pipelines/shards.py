"""The format on disk, reading side: `open_split` maps the shards of one split and proves that they are sound.

A data set is a folder: `dataset.json`, and per split `NAME-SPLIT-NNNNNN.tar` shards (WebDataset convention) with
DALI's `.idx` beside them and `SPLIT.index.npz`, arrays over all samples: shard, offset and size of the image member's
content in bytes, label (-1: none), height and width in pixels. `shard_writer` is the writing side. Knows no DALI.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.errors import UserError
from configs.notes import warn
from pipelines import members, tar_layout, verified
from pipelines.dataset_json import EXTENSIONS as EXTENSIONS
from pipelines.dataset_json import FORMAT as FORMAT
from pipelines.dataset_json import MAX_SIDE
from pipelines.dataset_json import VERSION as VERSION
from pipelines.dataset_json import fingerprint as fingerprint
from pipelines.dataset_json import in_source_order as in_source_order
from pipelines.dataset_json import load_dataset as load_dataset
from pipelines.mapping import advise, map_files
from pipelines.watch import Watch

INDEX_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "height": np.int32,
    "width": np.int32,
}
RECONVERT = "the data set is damaged: run `tools/convert.py verify` on it and convert the source again"


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
    watch: Watch  # over `files`, for as long as `content` is read

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
        first = tar_layout.BLOCK + len(tar_layout.npy_header(self.image_shape))
        pixels = int(np.prod(self.image_shape))
        rows = (len(self.content) - first - pixels) // stride + 1
        view = np.lib.stride_tricks.as_strided(self.content[first:], (rows, pixels), (stride, 1))
        return view, (self.address - tar_layout.BLOCK) // stride

    def pixel_begins(self) -> np.ndarray:
        """Where in `content` the pixels of each sample of an npy split begin: int64 [samples]."""
        assert self.image_shape is not None
        return self.address + len(tar_layout.npy_header(self.image_shape))

    def source_rows(self) -> np.ndarray:
        """Which row of the source each sample comes from, as its key in the tar says: int64 [samples].

        Touches a page per sample: about as dear as reading a split of small images once.
        """
        keys = self.content[(self.address - tar_layout.BLOCK)[:, None] + np.arange(tar_layout.KEY_DIGITS)]
        return (keys - np.uint8(ord("0"))) @ 10 ** np.arange(tar_layout.KEY_DIGITS - 1, -1, -1)

    def advise(self, shards: np.ndarray, advice: int) -> None:
        """Give the kernel `advice` (mmap.MADV_WILLNEED …) on whole shards; a hint, so failures are ignored."""
        for shard in shards.tolist():
            size = self.dataset["splits"][self.name]["shards"][shard]["bytes"]
            advise(self.content, shard * self.slot_bytes, size, advice)

    def describe(self, sample: int) -> str:
        """Where a sample lies and what it is called there, for an error message."""
        shard, address = int(self.shard[sample]), int(self.address[sample])
        header = self.content[address - tar_layout.BLOCK : address].tobytes()
        key = header[: tar_layout.KEY_DIGITS].decode("ascii", "replace")
        named = f"key {key}" if key.isdecimal() else "key unreadable"
        offset = address - shard * self.slot_bytes
        return f"sample {sample} of split {self.name!r} ({self.files[shard].name}, {named}, offset {offset})"

    def check_unchanged(self) -> None:
        """Raise a UserError if a shard is not what it was when the split was opened: before anything is saved."""
        self.watch.check()


def sample_stride(size: int, labelled: bool, classes: int) -> int:
    """Bytes from one sample to the next in a shard whose image members hold `size` bytes each."""
    stride = tar_layout.BLOCK + tar_layout.padded(size)
    return stride + tar_layout.BLOCK + tar_layout.padded(len(tar_layout.label_text(0, classes))) if labelled else stride


def open_split(
    folder: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    tolerates_content: bool = False,
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
        _check_size(file, shard["bytes"])
    index = _load_index(folder / entry["index"]["file"], entry)
    sizes = np.array([shard["bytes"] for shard in entry["shards"]], np.int64)
    end = index["offset"] + index["size"]
    bad = (index["offset"] < tar_layout.BLOCK) | (index["size"] < 0) | (end > sizes[index["shard"]])
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{entry['index']['file']} places sample {row} outside of its shard; {RECONVERT}")
    sides = np.stack([index["height"], index["width"]])
    if sides.min() < 1 or sides.max() >= MAX_SIDE:
        raise UserError(f"{entry['index']['file']} gives images sides from {sides.min()} to {sides.max()} pixels; "
                        f"{RECONVERT}")  # fmt: skip
    labels = None
    if entry["labelled"]:
        labels = index["label"].astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(dataset["classes"]):
            raise UserError(
                f"{entry['index']['file']} holds labels from {labels.min()} to {labels.max()}, "
                f"but dataset.json names {len(dataset['classes'])} classes; {RECONVERT}"
            )
    unit = mmap.PAGESIZE
    if dataset["encoding"] == "npy":
        stride = sample_stride(int(index["size"][0]), labels is not None, len(dataset["classes"]))
        unit = int(np.lcm(stride, unit))
        shape = dataset["image_shape"]
        size = len(tar_layout.npy_header(shape)) + math.prod(shape)
        if (index["size"] != size).any() or ((index["offset"] - tar_layout.BLOCK) % stride).any():
            raise UserError(
                f"{entry['index']['file']} does not place images of the shape {shape} that dataset.json gives "
                f"at the constant stride of npy shards; {RECONVERT}"
            )
    slot = -(-int(sizes.max()) // unit) * unit
    contents = verified.contents_of(folder, dataset, name) if verify == "changed" else None
    content, lost, stamps = map_files(files, sizes.tolist(), slot)
    expected = [shard["sha256"] for shard in entry["shards"]]
    split = Split(
        dataset=dataset,
        name=name,
        labels=labels,
        shard=index["shard"],
        files=files,
        heights=index["height"],
        widths=index["width"],
        address=index["shard"] * np.int64(slot) + index["offset"],
        size=index["size"],
        content=content,
        slot_bytes=slot,
        watch=Watch(
            name,
            files,
            expected if contents is None else [found.sha256 for found in contents],
            stamps if contents is None else [found.stamp for found in contents],
            lost,
            lambda number: content[number * slot : number * slot + int(sizes[number])],
        ),
    )
    if contents is not None:
        for number, found in enumerate(contents):
            if found.sha256 != expected[number]:
                _refuse(split, number, found.sha256, tolerates_content)
    split.check_unchanged()  # since it was verified, and while it was mapped
    return split


def _refuse(split: Split, number: int, sha256: str, tolerates_content: bool) -> None:
    """Raise for a shard whose content is not what dataset.json says; warn of one that may be used nevertheless."""
    damage = members.damage(split, number, sha256)
    named = f"{split.files[number]} does not have the sha256 that dataset.json gives: {damage.text}"
    # A damaged pixel of an npy split cannot be told from a sound one when it is trained on.
    if not (tolerates_content and damage.in_content_only and split.encoding == "jpeg"):
        raise UserError(f"{named}; {RECONVERT}")
    warn(f"{named}; the samples that can be decoded are used")


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing, though dataset.json lists it; {RECONVERT}")
    if file.stat().st_size != expected:
        raise UserError(
            f"{file} has {file.stat().st_size:,} bytes where dataset.json says {expected:,} (truncated?); {RECONVERT}"
        )


def _load_index(file: Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    _check_size(file, entry["index"]["bytes"])
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["index"]["sha256"]:
        raise UserError(f"{file} does not have the sha256 that dataset.json gives; {RECONVERT}")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            index = {name: arrays[name].astype(dtype, copy=False) for name, dtype in INDEX_COLUMNS.items()}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read ({error}); {RECONVERT}") from None
    lengths = {name: len(column) for name, column in index.items()}
    if set(lengths.values()) != {entry["samples"]}:
        raise UserError(f"{file} has {lengths} rows where dataset.json says {entry['samples']}; {RECONVERT}")
    if entry["samples"] == 0:
        raise UserError(f"{file} lists no samples; {RECONVERT}")
    expected = [shard["samples"] for shard in entry["shards"]]
    if index["shard"].min() < 0 or np.bincount(index["shard"], minlength=len(expected)).tolist() != expected:
        raise UserError(f"{file} places other numbers of samples in the shards than dataset.json says; {RECONVERT}")
    return index
