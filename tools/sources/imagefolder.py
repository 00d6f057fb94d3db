"""Image files in folders: ROOT/SPLIT/CLASS/*.jpg, as torchvision's ImageFolder, timm and most tutorials lay them out.

Paths of 1.5 M files are kept as one bytes object: a third of the memory of strings, and quickly sent to workers.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from configs.errors import UserError, printable
from pipelines.source import Source, SplitSource

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_FILE_BYTES = 1 << 30  # of an image; the largest that may be decoded has a third of it as raw pixels
LAYOUT = "the layout is ROOT/train/CLASS/*.jpg, likewise val, and test with or without class folders"


class ImageFolderSplit:
    """The files of one split in a fixed order: relative paths, sizes in bytes, labels."""

    def __init__(self, root: Path, paths: list[str], sizes: list[int], labels: list[int] | None) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._root = root
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded])
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.bytes_per_row = max(sum(sizes) // max(len(sizes), 1), 1)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Contents of the files start..stop, as they are."""
        for row in range(start, stop):
            path = self._root / os.fsdecode(self._path(row))
            try:
                yield _content(path)
            except OSError as error:
                raise UserError(
                    f"cannot read {path} ({error.strerror}); mend or remove the file and start again"
                ) from None

    def describe(self, row: int) -> str:
        return self._path(row).decode("utf-8", "replace")

    def _path(self, row: int) -> bytes:
        return self._paths[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]


def _content(path: Path) -> bytes:
    """What the scan found may have become something else since: a pipe would never end, a huge file fill the memory."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} changed while it was converted; start again")
        return file.read(status.st_size)


class _Scan:
    """Lists folders in order; refuses links that leave the root, counts what it passes over."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: list[str] = []
        self.touched = hashlib.sha256()  # of the times at which the files were changed last

    def entries(self, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Subfolders, and image files with sizes in bytes, both sorted by name; `folder` is relative to the root."""
        folders, files = [], []
        try:
            with os.scandir(self.root / folder) as found:
                for entry in sorted(found, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        self.ignored.append(f"{folder}/{entry.name}")
                        continue
                    if entry.is_symlink():
                        self._check_link(Path(entry.path))
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                        files.append((entry.name, self._checked_size(entry)))
                    else:
                        self.ignored.append(f"{folder}/{entry.name}")
        except OSError as error:
            raise UserError(f"cannot list {self.root / folder} ({error.strerror}); check its permissions") from None
        return folders, files

    def _checked_size(self, entry: os.DirEntry[str]) -> int:
        status = entry.stat()
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(
                f"{entry.path} has {status.st_size:,} bytes, and no image is larger than {MAX_FILE_BYTES:,}; remove it"
            )
        self.touched.update(status.st_mtime_ns.to_bytes(8, "little", signed=True))
        return status.st_size

    def _check_link(self, link: Path) -> None:
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
            raise UserError(f"symbolic link {link} leads nowhere; remove or mend it") from None
        if not target.is_relative_to(self.root):
            raise UserError(
                f"symbolic link {link} leads out of the source folder, to {target}; copy the files into {self.root}"
            )


def open_imagefolder(root: Path) -> Source:
    """List every split. Classes are the folders of train, sorted; rows are sorted by class, then by file name."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"source {str(root)!r} {what}; {LAYOUT}")
    scan = _Scan(root.resolve())
    top, _ = scan.entries(".")
    folders: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder in top:
        if folder in SPLIT_FOLDERS:
            folders[SPLIT_FOLDERS[folder]].append(folder)
    for name, found in folders.items():
        if len(found) > 1:
            raise UserError(f"{root} has {' and '.join(found)}, which all mean split {name!r}; keep one of them")
    if not folders["train"]:
        raise UserError(f"{root} has no folder 'train' (it has {', '.join(top[:5]) or 'no folders'}); {LAYOUT}")
    classes = tuple(scan.entries(folders["train"][0])[0])
    _check_class_names(root, classes)
    digest = hashlib.sha256("\n".join(classes).encode())
    splits: dict[str, SplitSource] = {}
    for name, found in folders.items():
        for folder in found:
            paths, sizes, labels = _list_split(scan, name, folder, classes)
            if not paths:
                hint = f"; passed over: {', '.join(scan.ignored[-3:])}" if scan.ignored else ""
                raise UserError(f"{root / folder} holds no images ({', '.join(EXTENSIONS)}){hint}; {LAYOUT}")
            for path, size in zip(paths, sizes, strict=True):
                digest.update(name.encode() + os.fsencode(path[len(folder) :]) + f"\0{size}\0".encode())
            splits[name] = ImageFolderSplit(scan.root, paths, sizes, labels)
            if labels is None and not in_order_of_numbers(paths):
                names = ", ".join(Path(path).name for path in paths[:3])
                print(printable(f"note: {folder} holds numbered images, which are taken in the order of their names "
                                f"({names} …); rename them with leading zeros where a submission's ids mean the "
                                "numbers"), file=sys.stderr)  # fmt: skip
    if ignored := [name.removeprefix("./") for name in dict.fromkeys(scan.ignored)]:
        note_ignored(ignored)
    return Source(
        kind="imagefolder",
        name=scan.root.name,
        classes=classes,
        fingerprint=digest.hexdigest(),
        splits=splits,
        state=scan.touched.hexdigest(),
    )


def open_pictures(folder: Path, split: str, classes: tuple[str, ...]) -> Source:
    """All image files in a folder and the folders in it, sorted by path: one split without labels.

    classes: those that a model is to choose from.
    """
    scan = _Scan(folder.resolve())
    found: list[tuple[str, int]] = []
    waiting = ["."]
    while waiting:
        parent = waiting.pop()
        folders, files = scan.entries(parent)
        for name in folders:
            inner = Path(parent, name)
            if (scan.root / inner).is_symlink():  # its files are listed where they lie; a circle would never end
                scan.ignored.append(str(inner))
            else:
                waiting.append(str(inner))
        found += [(str(Path(parent, name)), size) for name, size in files]
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(EXTENSIONS)}); give a folder of image files")
    if scan.ignored:
        note_ignored([name.removeprefix("./") for name in scan.ignored])
    paths, sizes = zip(*sorted(found), strict=True)
    rows = ImageFolderSplit(scan.root, list(paths), list(sizes), None)
    digest = hashlib.sha256(b"\0".join(os.fsencode(path) for path in paths)).hexdigest()
    return Source(kind="pictures", name=scan.root.name, classes=classes, fingerprint=digest, splits={split: rows})


def note_ignored(names: list[str]) -> None:
    """On stderr: how many entries were passed over, and the first of them."""
    shown = ", ".join(names[:3]) + " …" * (len(names) > 3)
    what = "entry that is no image" if len(names) == 1 else "entries that are no images"
    print(printable(f"note: passed over {len(names):,} {what}: {shown}"), file=sys.stderr)


def in_order_of_numbers(paths: Sequence[str]) -> bool:
    """Whether files that are called by numbers alone come in the order of these; true of all others."""
    stems = [Path(path).stem for path in paths]
    if not all(stem.isascii() and stem.isdigit() for stem in stems):
        return True
    numbers = [int(stem) for stem in stems]
    return numbers == sorted(numbers)


def _check_class_names(root: Path, classes: tuple[str, ...]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{root}: the class folder {name!r} is not named in UTF-8; rename it") from None


def _list_split(
    scan: _Scan, split: str, folder: str, classes: tuple[str, ...]
) -> tuple[list[str], list[int], list[int] | None]:
    """Paths relative to the root, sizes in bytes and labels (None for a flat test folder) of one split."""
    found, flat = scan.entries(folder)
    if split == "test" and flat:
        if found:
            raise UserError(
                f"{scan.root / folder} holds image files beside the folders {', '.join(found[:3])}; either all of its "
                "images lie in class folders or none"
            )
        return [f"{folder}/{name}" for name, _ in flat], [size for _, size in flat], None
    scan.ignored += [f"{folder}/{name}" for name, _ in flat]
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in found if name not in numbers]
    if unknown:
        raise UserError(
            f"{scan.root / folder} has {len(unknown)} class folders that train lacks, such as {unknown[0]!r}; give "
            "every split the classes of train"
            + (", or put unlabelled images into test itself" if split == "test" else "")
        )
    paths, sizes, labels = [], [], []
    for class_name in found:
        deeper, files = scan.entries(f"{folder}/{class_name}")
        scan.ignored += [f"{folder}/{class_name}/{name}/" for name in deeper]
        paths += [f"{folder}/{class_name}/{name}" for name, _ in files]
        sizes += [size for _, size in files]
        labels += [numbers[class_name]] * len(files)
    return paths, sizes, labels
