"""Read HDF5 files in MediumImageNet's layout: `images-SPLIT` and `labels-SPLIT` for train, val and test.

Images are uint8 [N, 3, H, W] or [N, H, W, 3]. A file is read sequentially and in large pieces, since reading random
rows takes a hundred times as long if the file is chunked, compressed or on a spinning disk. Before any pixels are read,
HDF5's metadata is used to check that all pixels were written.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError
from pipelines.convert import memory_limit
from pipelines.convert.source import Source, SplitSource
from tools.sources.folder_scan import note_missing_classes
from tools.sources.hdf5_checks import MAX_CHUNK_BYTES, checked_dataset, chunk_bytes, is_channels_first, load_labels

READ_BYTES = 64 << 20  # per read; large enough that disk seeks take little of the time
FINGERPRINT_ROWS = 64
# Memory limit of one read, besides chunks and result. A compressed chunk may inflate to a thousand times its declared
# size.
READING_BYTES = 256 << 20
DAMAGE = (OSError, RuntimeError, LookupError, ValueError, MemoryError, TypeError, OverflowError, AttributeError)


class Hdf5Split:
    """One split of an HDF5 file. Each process opens the file on its first read and keeps it open."""

    def __init__(self, path: Path, images: h5py.Dataset, labels: np.ndarray | None, channels_first: bool) -> None:
        self._path, self._key = path, images.name.lstrip("/")
        self._shape, self._channels_first = images.shape, channels_first
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
                yield _channels_last(row) if self._channels_first else row.copy()
            start = end

    def describe(self, row: int) -> str:
        return f"{self._key}[{row}]"


def open_hdf5(path: Path, classes_file: Path | None, max_pixels: int) -> Source:
    """Open an HDF5 file, check its metadata and read all labels. Rows keep the order of the file.

    The train split is required; val and test are optional. The test split is unlabeled if labels-test is missing or all
    of its labels are -1.

    Args:
        path: The HDF5 file.
        classes_file: Text file with one class name per line. If None, classes are named 0, 1, … up to the highest
            label of train.
        max_pixels: Maximum number of pixels per image.

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
    with _report_damage(str(path), MAX_CHUNK_BYTES), _open_file(path) as file:
        keys = {str(key) for key in file}
        _check_keys(path, keys)
        splits: dict[str, SplitSource] = {}
        for name in ("train", "val", "test"):
            if f"images-{name}" not in keys:
                continue
            images = checked_dataset(path, file, f"images-{name}")
            channels_first = is_channels_first(path, images, max_pixels)
            has_labels = f"labels-{name}" in keys
            labels = load_labels(path, file, name, len(images), class_count) if has_labels else None
            splits[name] = split = Hdf5Split(path, images, labels, channels_first)
            _update_digest(digest, name, split, images)
    labels_of = {name: split.labels for name, split in splits.items() if split.labels is not None}
    classes = names or _numbered_classes(path, labels_of)
    for name, numbers in labels_of.items():
        note_missing_classes(f"{path}: labels-{name} has no samples", numbers, range(len(classes)))
    digest.update("\n".join(classes).encode())
    return Source(
        kind="hdf5",
        name=path.name,
        classes=classes,
        fingerprint=digest.hexdigest(),
        splits=splits,
        state=f"{status.st_size} {status.st_mtime_ns}",
    )


def _numbered_classes(path: Path, labels_of: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names 0, 1, … up to the highest label of train. Raises UserError if another split has a higher one."""
    highest = int(labels_of["train"].max())
    for name, labels in labels_of.items():
        if labels.max() > highest:
            row = int(labels.argmax())
            raise UserError(
                f"{path}: labels-{name}[{row}] is {labels[row]}, but the highest label of train is {highest}; "
                "fix it, or name all classes with --classes FILE"
            )
    return tuple(str(label) for label in range(highest + 1))


def _check_keys(path: Path, keys: set[str]) -> None:
    """Raise UserError if a key is missing.

    Train needs images and labels, val needs both or none, and labels-test needs images-test.
    """
    needed = ["images-train", "labels-train"]
    needed += [f"images-{name}" for name in ("val", "test") if f"labels-{name}" in keys]
    needed += ["labels-val"] if "images-val" in keys else []
    missing = [key for key in needed if key not in keys]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(keys)) or 'no keys'}, and needs images-SPLIT "
            "and labels-SPLIT for train, likewise for val and test if they exist (labels-test may be missing)"
        )


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


def _update_digest(digest: hashlib._Hash, name: str, split: Hdf5Split, images: h5py.Dataset) -> None:
    """Add a split's name, shape, dtype, labels and up to `FINGERPRINT_ROWS` evenly spaced rows to the fingerprint."""
    digest.update(f"{name} {images.shape} {images.dtype}".encode())
    digest.update(b"" if split.labels is None else split.labels.tobytes())
    for row in np.unique(np.linspace(0, len(split) - 1, FINGERPRINT_ROWS).astype(int)).tolist():
        digest.update(b"".join(np.asarray(image).tobytes() for image in split.read(row, row + 1)))


def _channels_last(image: np.ndarray) -> np.ndarray:
    """Transpose [3, H, W] to contiguous [H, W, 3]. This is three times as fast as np.ascontiguousarray."""
    result = np.empty((*image.shape[1:], 3), np.uint8)
    for channel in range(3):
        result[..., channel] = image[channel]
    return result
