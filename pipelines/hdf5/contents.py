"""Read and check what an HDF5 file contains, except for the pixels: splits, labels, classes and a fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError, printable, readable
from pipelines.hdf5.arrays import Hdf5Images
from pipelines.hdf5.checks import MAX_CHUNK_BYTES
from pipelines.hdf5.file import (
    DEFAULT_KEYS,
    CheckedSplit,
    checked_splits,
    load_class_names,
    numbered_classes,
    open_file,
    report_damage,
)
from pipelines.hdf5.storage import Storage, convert_command, find_storage
from pipelines.storage.dataset import MAX_PIXELS
from pipelines.storage.hash_cache import FileStamp

SAMPLED_ROWS = 64  # per split
SAMPLED_BYTES = 64 << 20  # of decompressed chunks per split


@dataclass(frozen=True)
class StoredSplit:
    """One split of a file, in the order of the file."""

    storage: Storage
    labels: np.ndarray | None  # int64 [rows]
    digest: str  # sha256 of shape, labels and some rows


@dataclass(frozen=True)
class Contents:
    """A file and its splits."""

    path: Path
    stamp: FileStamp  # of the file when it was read
    classes: tuple[str, ...]
    splits: dict[str, StoredSplit]


def load_contents(path: Path, classes_file: Path | None) -> Contents:
    """Check a file's metadata, and read all labels and some rows of each split.

    A process reads an unchanged file once.

    Args:
        path: The HDF5 file.
        classes_file: Text file with one class name per line. If None, classes are named 0, 1, … up to the highest label
            of train.

    Raises:
        UserError: The file is missing, damaged, in a different layout or stored in an unsupported way, or a label or
            `classes_file` is invalid.
    """
    with readable(path):
        if not path.is_file():
            raise UserError(f"HDF5 file {str(path)!r} does not exist; data.path names a file or a converted data set")
        stamp = FileStamp.from_stat(path.stat())
    names = None if classes_file is None else load_class_names(classes_file)
    return _load(path, stamp, names)


@lru_cache(maxsize=4)
def _load(path: Path, stamp: FileStamp, names: tuple[str, ...] | None) -> Contents:
    with report_damage(str(path), MAX_CHUNK_BYTES), open_file(path) as file:
        checked, splits = [], {}
        for found in checked_splits(path, file, DEFAULT_KEYS, None if names is None else len(names), MAX_PIXELS):
            if found.layout == "file":
                raise UserError(
                    f"{path}: {found.images.name.lstrip('/')} holds image files, which are not read in place; "
                    f"{convert_command(path)}"
                )
            storage = find_storage(path, found.images, found.layout)
            splits[found.name] = StoredSplit(storage, found.labels, _digest(path, found, storage))
            checked.append(found)
    _check_shapes(path, splits)
    labels_of = {found.labels_key: found.labels for found in checked if found.labels is not None}
    classes = names or numbered_classes(path, labels_of, checked[0].columns)
    for name in classes:
        if printable(name) != name:
            raise UserError(f"data.classes names a class {name!r}, which contains control characters; rename it")
    if FileStamp.from_stat(path.stat()).content_key != stamp.content_key:
        raise UserError(f"{path} was changed while it was being opened; start again when nothing writes to it")
    return Contents(path, stamp, classes, splits)


def _check_shapes(path: Path, splits: dict[str, StoredSplit]) -> None:
    shapes = {name: split.storage.image_shape for name, split in splits.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name!r} of {height} x {width}" for name, (height, width, _) in shapes.items())
        raise UserError(f"{path} has splits of different sizes, {sizes} pixels; {convert_command(path)} --size SIDE")


def _digest(path: Path, found: CheckedSplit, storage: Storage) -> str:
    """Return the sha256 of a split's shape, layout, labels and evenly spaced rows."""
    digest = hashlib.sha256(f"{storage.key} {storage.shape} {storage.layout}".encode())
    digest.update(b"" if found.labels is None else found.labels.tobytes())
    per_row = 1 if storage.chunks is None else storage.chunks.shape[0] * storage.row_bytes
    count = max(2, min(SAMPLED_ROWS, SAMPLED_BYTES // per_row))
    reader = Hdf5Images(path, found.images, found.layout, None)
    for row in np.unique(np.linspace(0, storage.shape[0] - 1, count).astype(int)).tolist():
        for image in reader.read(row, row + 1):
            digest.update(bytes(image))
    return digest.hexdigest()
