"""Read HDF5 files in MediumImageNet's layout: `images-SPLIT` and `labels-SPLIT` for train, val and test.

Other keys are given as templates. Images are uint8 arrays, RGB or greyscale, or files such as JPEG in variable-length
bytes. A file is read sequentially and in large pieces, since reading random rows takes a hundred times as long if the
file is chunked, compressed or on a spinning disk. Before any pixels are read, HDF5's metadata is used to check that all
pixels were written.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError
from pipelines.convert import memory_limit
from pipelines.convert.source import SPLIT_NAMES, Source, SplitSource
from tools.sources.folder_scan import note_missing_classes
from tools.sources.hdf5_checks import (
    MAX_CHUNK_BYTES,
    Layout,
    checked_dataset,
    chunk_bytes,
    has_key,
    load_labels,
    row_layout,
)
from tools.sources.hdf5_files import Hdf5Files

READ_BYTES = 64 << 20  # per read; large enough that disk seeks take little of the time
FINGERPRINT_ROWS = 64
MAX_SHOWN_KEYS = 20
# Memory limit of one read, besides chunks and result. A compressed chunk may inflate to a thousand times its declared
# size.
READING_BYTES = 256 << 20
DAMAGE = (OSError, RuntimeError, LookupError, ValueError, MemoryError, TypeError, OverflowError, AttributeError)


@dataclass(frozen=True)
class KeyTemplates:
    """Keys of the data sets of a split, with `{split}` in place of train, val or test."""

    images: str = "images-{split}"
    labels: str = "labels-{split}"

    def __post_init__(self) -> None:
        for flag, template in (("--images-key", self.images), ("--labels-key", self.labels)):
            if "{split}" not in template:
                raise UserError(f"{flag} {template!r} lacks {{split}}; write for instance '{{split}}/images'")

    def images_key(self, split: str) -> str:
        return self.images.replace("{split}", split)

    def labels_key(self, split: str) -> str:
        return self.labels.replace("{split}", split)


DEFAULT_KEYS = KeyTemplates()


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
            with _report_damage(str(self._path)):
                self._file = _open_file(self._path)
        step = self._rows_per_read
        buffer = np.empty((min(step, stop - start), *self._shape[1:]), np.uint8)
        while start < stop:
            end = min((start // step + 1) * step, stop)
            with _report_damage(f"{self._path}: {self._key}[{start}:{end}]", self._chunk_bytes):
                self._file[self._key].read_direct(buffer, np.s_[start:end], np.s_[: end - start])
            for row in buffer[: end - start]:
                yield _to_rgb(row, self._layout)
            start = end

    def describe(self, row: int) -> str:
        return f"{self._key}[{row}]"


def open_hdf5(path: Path, classes_file: Path | None, max_pixels: int, templates: KeyTemplates = DEFAULT_KEYS) -> Source:
    """Open an HDF5 file, check its metadata and read all labels. Rows keep the order of the file.

    The train split is required; val and test are optional, and may have other usual names. The test split is unlabeled
    if its labels are missing or all are -1.

    Args:
        path: The HDF5 file.
        classes_file: Text file with one class name per line. If None, classes are named 0, 1, … up to the highest
            label of train, or the last column of its one-hot labels.
        max_pixels: Maximum number of pixels per image.
        templates: Keys of images and labels.

    Raises:
        UserError: The file is missing, damaged, in a different layout or stored in an unsupported way, its images have
            more than `max_pixels` pixels, or a label or `classes_file` is invalid.
    """
    if not path.is_file():
        what = "is a folder, not an HDF5 file" if path.is_dir() else "does not exist"
        raise UserError(f"source {str(path)!r} {what}; pass the .hdf5 file that contains images-train and labels-train")
    names = load_class_names(classes_file) if classes_file else None
    class_count = len(names) if names else None
    digest = hashlib.sha256()
    status = path.stat()
    splits: dict[str, SplitSource] = {}
    split: SplitSource
    columns, has_files = 0, False
    with _report_damage(str(path), MAX_CHUNK_BYTES), _open_file(path) as file:
        for name, keys in _find_keys(path, file, templates).items():
            images = checked_dataset(path, file, keys.images)
            layout = row_layout(path, images, max_pixels)
            has_files = has_files or layout == "file"
            labels = None
            if keys.labels is not None:
                labels, width = load_labels(path, file, keys.labels, len(images), class_count, name == "test")
                columns = max(columns, width if name == "train" else 0)
            split = Hdf5Images(path, images, layout, labels) if layout != "file" else Hdf5Files(path, images, labels)
            splits[name] = split
            _update_digest(digest, name, split, images)
    labels_of = {templates.labels_key(name): split.labels for name, split in splits.items() if split.labels is not None}
    classes = names or _numbered_classes(path, labels_of, columns)
    for key, numbers in labels_of.items():
        note_missing_classes(f"{path}: {key} has no samples", numbers, range(len(classes)))
    digest.update("\n".join(classes).encode())
    return Source(
        kind="hdf5",
        name=path.name,
        classes=classes,
        fingerprint=digest.hexdigest(),
        splits=splits,
        state=f"{status.st_size} {status.st_mtime_ns}",
        default_encoding="jpeg" if has_files else "npy",
    )


def _numbered_classes(path: Path, labels_of: dict[str, np.ndarray], columns: int) -> tuple[str, ...]:
    """Return the names 0, 1, … up to the highest label of train. Raises UserError if another split has a higher one.

    Args:
        path: Path of the file, for messages.
        labels_of: Labels of each split by their key, train first.
        columns: Number of columns of train's one-hot labels, or 0.
    """
    highest = max(int(next(iter(labels_of.values())).max()), columns - 1)
    for key, labels in labels_of.items():
        if labels.max() > highest:
            row = int(labels.argmax())
            raise UserError(
                f"{path}: {key}[{row}] is {labels[row]}, but the highest label of train is {highest}; "
                "fix it, or name all classes with --classes FILE"
            )
    return tuple(str(label) for label in range(highest + 1))


@dataclass(frozen=True)
class SplitKeys:
    """Keys of a split in the file."""

    images: str
    labels: str | None  # None in a test split without labels


def _find_keys(path: Path, file: h5py.File, templates: KeyTemplates) -> dict[str, SplitKeys]:
    """Return the keys of the splits in the file, in the order train, val, test.

    Raises:
        UserError: A split has several names, or a key is missing. Train needs images and labels, val needs both or
            none, and labels of test need its images.
    """
    found: dict[str, SplitKeys] = {}
    missing: list[str] = []
    for split in ("train", "val", "test"):
        used = [
            (images, labels)
            for name, meaning in SPLIT_NAMES.items()
            if meaning == split
            for images, labels in [(templates.images_key(name), templates.labels_key(name))]
            if has_key(path, file, images) or has_key(path, file, labels)
        ]
        if len(used) > 1:
            raise UserError(f"{path} has {used[0][0]} and {used[1][0]}, which both mean split {split!r}; remove one")
        if not used and split != "train":
            continue
        images, labels = used[0] if used else (templates.images_key(split), templates.labels_key(split))
        has_labels = has_key(path, file, labels)
        needed = [images] if split == "test" else [images, labels]
        missing += [key for key in needed if not has_key(path, file, key)]
        found[split] = SplitKeys(images, labels if has_labels else None)
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(_first_names(file)) or 'no keys'}, and needs "
            f"{templates.images} and {templates.labels} for train, likewise for val and test if they exist (labels of "
            "test may be missing); name other keys with --images-key and --labels-key"
        )
    return found


def _first_names(file: h5py.File) -> list[str]:
    """Return the first names in the file, up to `MAX_SHOWN_KEYS`, without following links."""
    names: list[str] = []

    def add(name: str) -> bool | None:
        names.append(name)
        return True if len(names) == MAX_SHOWN_KEYS else None

    file.visit(add)
    return names


def load_class_names(file: Path) -> tuple[str, ...]:
    """Load class names from a text file with one name per line, in the order of the labels.

    Empty lines at the end are ignored.

    Raises:
        UserError: The file cannot be read, is empty or contains an empty line before the last name.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read class names from {file} ({error}); write UTF-8 text, one name per line") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise UserError(
            f"class names in {file}: {where}; it must contain one name per line, in the order of the labels"
        )
    return tuple(lines)


def _open_file(path: Path) -> h5py.File:
    while h5py.h5pl.size():  # no HDF5 plugins: a file must not choose the code that is loaded
        h5py.h5pl.remove(0)
    try:
        return h5py.File(path, "r", locking="best-effort")  # some network file systems have no locks
    except OSError as error:
        if message := _explain_refusal(path, error):
            raise UserError(message) from None
        raise


def _explain_refusal(path: Path, error: OSError) -> str | None:
    """Return why HDF5 refused to open a possibly intact file and how to fix that. For other errors, return None."""
    text = str(error)
    if "unable to lock file" in text:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return f"{path} is open for writing in another process; close it there, or wait until it is written"
        return (
            f"the file system of {path} refuses to lock it (errno {error.errno}); once no process writes to the file, "
            "set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "already open for" in text:  # a writer sets flags in the superblock and clears them on close
        return (
            f"{path} is marked as open for writing: a process is still writing to it, or ended without closing it; "
            "close it there. If no process writes to it, write the file again, or remove the mark with "
            "`h5clear -s FILE` (one of HDF5's command-line tools) and check the content"
        )
    if isinstance(error, PermissionError):
        return f"cannot read {path} (permission denied); check its permissions"
    return None


@contextmanager
def _report_damage(what: str, held_bytes: int = 0) -> Iterator[None]:
    """Limit the memory that can be allocated in this context, and convert errors from h5py into a UserError.

    Args:
        what: File, or part of a file, to name in the message.
        held_bytes: Size of a chunk in bytes. The limit is `READING_BYTES` plus twice this size.
    """
    try:
        with memory_limit.at_most(READING_BYTES + 2 * held_bytes):
            yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot read {what} as HDF5 ({reason}); the file is truncated, damaged, still being written or of another "
            "format, or needs an HDF5 filter that is not installed: compare its size with the original's and fetch it "
            "again"
        ) from None


def _update_digest(digest: hashlib._Hash, name: str, split: SplitSource, images: h5py.Dataset) -> None:
    """Add a split's name, shape, dtype, labels and up to `FINGERPRINT_ROWS` evenly spaced rows to the fingerprint."""
    digest.update(f"{name} {images.shape} {images.dtype}".encode())
    digest.update(b"" if split.labels is None else split.labels.tobytes())
    for row in np.unique(np.linspace(0, len(split) - 1, FINGERPRINT_ROWS).astype(int)).tolist():
        for image in split.read(row, row + 1):
            digest.update(image if isinstance(image, bytes) else image.tobytes())


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
