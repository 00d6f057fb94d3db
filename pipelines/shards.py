"""The format on disk, reading side: `open_split` maps the shards of one split, `verify` proves that they are sound.

A data set is a folder: `dataset.json`, and per split `NAME-SPLIT-NNNNNN.tar` shards (WebDataset convention) with
DALI's `.idx` beside them and `SPLIT.index.npz`, arrays over all samples: shard, offset and size of the image member's
content in bytes, label (-1: none), height and width in pixels. `shard_writer` is the writing side. Knows no DALI.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import math
import mmap
import os
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from pipelines import tar_layout
from pipelines.conversion import how_to_convert

FORMAT, VERSION = "model-zhu-shards", 1
INDEX_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "height": np.int32,
    "width": np.int32,
}
EXTENSIONS = {"npy": "npy", "jpeg": "jpg"}


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
        base = self.content.ctypes.data
        for shard in shards.tolist():
            size = self.dataset["splits"][self.name]["shards"][shard]["bytes"]
            _libc.madvise(base + shard * self.slot_bytes, size, advice)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for an error message."""
        shard = int(self.shard[sample])
        offset = int(self.address[sample]) - shard * self.slot_bytes
        begin = int(self.address[sample]) - tar_layout.BLOCK
        key = self.content[begin : begin + tar_layout.KEY_DIGITS].tobytes().decode("ascii", "replace")
        return f"sample {sample} of split {self.name!r} ({self.files[shard].name}, key {key}, offset {offset})"


def sample_stride(size: int, labelled: bool, classes: int) -> int:
    """Bytes from one sample to the next in a shard whose image members hold `size` bytes each."""
    stride = tar_layout.BLOCK + tar_layout.padded(size)
    return stride + tar_layout.BLOCK + tar_layout.padded(len(tar_layout.label_text(0, classes))) if labelled else stride


def load_dataset(folder: str | Path) -> dict[str, Any]:
    """The content of dataset.json, checked for what this version needs."""
    path = Path(folder) / "dataset.json"
    if not path.parent.exists():
        raise UserError(f"data set folder {str(folder)!r} does not exist; {how_to_convert(folder)}")
    if not path.is_file():
        reason = "it holds no dataset.json" if path.parent.is_dir() else "it is a file, not a folder"
        raise UserError(f"{str(folder)!r} is no converted data set ({reason}); {how_to_convert(folder)}")
    try:
        dataset = json.loads(path.read_text())
        if dataset["format"] != FORMAT:
            raise ValueError(f"format {dataset['format']!r}")
        if (version := dataset["version"]) == VERSION:
            _check_fields(dataset)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or of another program ({type(error).__name__}: {error}); "
            "convert the source with tools/convert.py first"
        ) from None
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {VERSION}; convert the source again")
    return dataset


_DATASET_FIELDS: dict[str, type] = {
    "name": str,
    "classes": list,
    "encoding": str,
    "mean": list,
    "std": list,
    "splits": dict,
}
_SPLIT_FIELDS: dict[str, type] = {
    "samples": int,
    "labelled": bool,
    "source_rows": int,
    "quarantined": list,
    "index": dict,
    "shards": list,
}
_FILE_FIELDS: dict[str, type] = {"file": str, "bytes": int, "sha256": str}


def _check_fields(dataset: dict[str, Any]) -> None:
    """Raise for anything that the code relies on and that is not there, so that nobody else needs to check."""

    def check(entry: dict[str, Any], fields: dict[str, type]) -> None:
        for name, kind in fields.items():
            if type(entry[name]) is not kind:
                raise TypeError(f"{name} is {entry[name]!r}")

    check(dataset, _DATASET_FIELDS)
    shape = dataset["image_shape"]
    if dataset["encoding"] not in EXTENSIONS or (dataset["encoding"] == "npy" and shape is None):
        raise ValueError(f"encoding {dataset['encoding']!r} with image shape {shape}")
    if shape is not None and not (len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)):
        raise ValueError(f"image_shape is {shape}")
    if not all(
        len(dataset[name]) == 3 and all(type(v) in (int, float) for v in dataset[name]) for name in ("mean", "std")
    ):
        raise ValueError("mean and std are not three numbers from 0 to 1 each")
    for split in dataset["splits"].values():
        check(split, _SPLIT_FIELDS)
        for shard in split["shards"]:
            check(shard, {**_FILE_FIELDS, "samples": int})
        check(split["index"], _FILE_FIELDS)
        for file in [entry["file"] for entry in (split["index"], *split["shards"])]:
            if Path(file).name != file or file in ("", ".."):
                raise ValueError(f"{file!r} is not a plain file name")


def in_source_order(dataset: dict[str, Any], split: str) -> bool:
    """Whether a split's samples are stored in the order of the source's rows, as predictions for a contest need them.

    Data sets converted before this was recorded have a shuffled train split and no other.
    """
    return not dataset["splits"][split].get("shuffled", split == "train")


def fingerprint(dataset: dict[str, Any]) -> str:
    """sha256 over what the samples are: two data sets with one fingerprint give a training run the same stream."""
    content = {key: dataset[key] for key in ("classes", "encoding", "image_shape", "splits")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_split(folder: str | Path, name: str) -> Split:
    """Map one split's shards and load its index; sizes and the index's sha256 are compared before any byte is used.

    Costs one read of the index: 1.5 M samples open in well under a second, shard contents stay untouched.
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
    return Split(
        dataset=dataset,
        name=name,
        labels=labels,
        shard=index["shard"],
        files=files,
        heights=index["height"],
        widths=index["width"],
        address=index["shard"] * np.int64(slot) + index["offset"],
        size=index["size"],
        content=_map_files(files, sizes.tolist(), slot),
        slot_bytes=slot,
    )


RECONVERT = "the data set is damaged: run `tools/convert.py verify` on it and convert the source again"


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


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000


def _map_files(files: tuple[Path, ...], sizes: list[int], slot: int) -> np.ndarray:
    """Map the files read-only at address 0, slot, 2 * slot … of one reserved range: uint8 [len(files) * slot].

    Python's own mmap cannot choose addresses; with them, a batch over any number of shards is one index_select.
    """
    total = slot * len(files)

    def map_at(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
        result = _libc.mmap(address, size, protection, flags, descriptor, 0)
        if result in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise UserError(f"cannot map {size:,} bytes of {files[0].parent}: {os.strerror(number)}")
        return result

    base = map_at(None, total, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    buffer = (ctypes.c_ubyte * total).from_address(base)

    weakref.finalize(buffer, _libc.munmap, base, total).atexit = False  # a gathering thread may still read at exit
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        with file.open("rb") as opened:
            map_at(base + number * slot, size, _PROT_READ, _MAP_SHARED | _MAP_FIXED, opened.fileno())
    return np.frombuffer(memoryview(buffer), np.uint8)
