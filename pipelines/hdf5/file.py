"""Open an HDF5 file in MediumImageNet's layout, and find and check its splits: `images-SPLIT` and `labels-SPLIT`.

Before any pixels are read, HDF5's metadata is used to check that all pixels were written.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError
from pipelines import memory_limit
from pipelines.hdf5.checks import Layout, checked_dataset, has_key, load_labels, row_layout
from pipelines.storage.dataset import SPLIT_NAMES

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


def open_file(path: Path) -> h5py.File:
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
def report_damage(what: str, held_bytes: int = 0) -> Iterator[None]:
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


@dataclass(frozen=True)
class CheckedSplit:
    """A split of an open file whose storage, shape and labels have been checked."""

    name: str
    images: h5py.Dataset
    layout: Layout
    labels: np.ndarray | None  # int64 [rows]
    labels_key: str
    columns: int  # of one-hot labels, otherwise 0


def checked_splits(
    path: Path, file: h5py.File, templates: KeyTemplates, classes: int | None, max_pixels: int
) -> Iterator[CheckedSplit]:
    """Check the splits of an open file and yield them in the order train, val, test. All labels are read.

    Args:
        path: Path of the file, for messages.
        file: The open file.
        templates: Keys of images and labels.
        classes: Number of classes, or None if the labels determine it.
        max_pixels: Maximum number of pixels per image.

    Raises:
        UserError: See `checks`.
    """
    for name, keys in _find_keys(path, file, templates).items():
        images = checked_dataset(path, file, keys.images)
        layout = row_layout(path, images, max_pixels)
        labels, columns = None, 0
        if keys.labels is not None:
            labels, columns = load_labels(path, file, keys.labels, len(images), classes, name == "test")
        yield CheckedSplit(name, images, layout, labels, keys.labels or templates.labels_key(name), columns)


def numbered_classes(path: Path, labels_of: dict[str, np.ndarray], columns: int) -> tuple[str, ...]:
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
            "test may be missing); name other keys with the options --images-key and --labels-key of `zhu convert hdf5`"
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
