"""Read image files in folders: ROOT/SPLIT/CLASS/*.jpg, the layout of torchvision's ImageFolder and timm.

The paths of a split are stored in one bytes object. For 1.5 million files, it takes a third of the memory of a list of
strings, and it is sent to worker processes more quickly.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError, readable
from pipelines.convert.source import Source, SplitSource
from tools.sources.folder_scan import EXTENSIONS, Scan, join_path, note, note_missing_classes, read_regular_file

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's labels of val/images: file, class and box, separated by tabs
LAYOUT = "the layout is ROOT/train/CLASS/*.jpg, likewise val, and test with or without class folders"

Files = list[tuple[str, int]]  # (path relative to the root, size in bytes)


class ImageFolderSplit:
    """The image files of one split, in a fixed order."""

    def __init__(self, root: Path, files: Files, labels: list[int] | None) -> None:
        encoded = [os.fsencode(path) for path, _ in files]
        self._root = root
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded])
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.bytes_per_row = max(sum(size for _, size in files) // max(len(files), 1), 1)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the contents of the files from `start` up to `stop` (exclusive).

        Raises UserError if a file cannot be read, has become too large or is no longer a regular file.
        """
        for row in range(start, stop):
            path = self._root / os.fsdecode(self._path(row))
            try:
                yield read_regular_file(path)
            except OSError as error:
                raise UserError(
                    f"cannot read {path} ({error.strerror}); fix or remove the file and start again"
                ) from None

    def describe(self, row: int) -> str:
        return self._path(row).decode("utf-8", "replace")

    def _path(self, row: int) -> bytes:
        return self._paths[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]


def open_imagefolder(root: Path) -> Source:
    """Open a folder of image files and list every split.

    Classes are the sorted folders of train. Rows are sorted by class, then by path. A class contains the images at any
    depth below its folder. Tiny ImageNet's published layout is supported as well: val/images with labels in
    val/val_annotations.txt, and test/images without labels.

    Raises:
        UserError: The layout is not supported, the name of a class folder is not UTF-8, val_annotations.txt is invalid,
            a split has no images, a folder cannot be read, a link leads out of `root`, or a file is larger than
            `MAX_FILE_BYTES`.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"source {str(root)!r} {what}; {LAYOUT}")
    scan = Scan(root.resolve())
    folders = _split_folders(root, scan)
    train = scan.entries(folders["train"])
    classes = tuple(train[0])
    _check_class_names(root, classes)
    digest = hashlib.sha256("\n".join(classes).encode())
    splits: dict[str, SplitSource] = {}
    unordered: list[str] = []
    for name, folder in folders.items():
        listed = train if name == "train" else scan.entries(folder, ANNOTATIONS if name == "val" else "")
        files, labels = _list_split(scan, name, folder, listed, classes, digest)
        if not files:
            raise UserError(f"{root / folder} contains no images ({', '.join(EXTENSIONS)}){scan.hint()}; {LAYOUT}")
        for path, size in files:
            digest.update(name.encode() + os.fsencode(path[len(folder) :]) + f"\0{size}\0".encode())
        splits[name] = ImageFolderSplit(scan.root, files, labels)
        if labels is not None:
            note_missing_classes(f"{folder} has no images", labels, classes)
        if name != "train" and not is_in_numeric_order([path for path, _ in files]):
            unordered.append(name)
            if labels is None:
                _note_order(folder, files)
    scan.note_skipped()
    return Source(
        kind="imagefolder",
        name=scan.root.name,
        classes=classes,
        fingerprint=digest.hexdigest(),
        splits=splits,
        state=scan.touched.hexdigest(),
        unordered=tuple(unordered),
    )


def open_image_files(folder: Path, split: str, classes: tuple[str, ...]) -> Source:
    """Open all image files at any depth below a folder as one split without labels, sorted by path.

    Args:
        folder: Folder of the image files.
        split: Name of the split.
        classes: Class names of the model that predicts the images.

    Raises:
        UserError: The folder does not contain images, a folder cannot be read, a link leads out of `folder`, or a file
            is larger than `MAX_FILE_BYTES`.
    """
    scan = Scan(folder.resolve())
    files = scan.images(".")
    if not files:
        raise UserError(
            f"{folder} contains no images ({', '.join(EXTENSIONS)}){scan.hint()}; give a folder of image files"
        )
    scan.note_skipped()
    rows = ImageFolderSplit(scan.root, files, None)
    digest = hashlib.sha256(b"\0".join(os.fsencode(path) for path, _ in files)).hexdigest()
    return Source(kind="pictures", name=scan.root.name, classes=classes, fingerprint=digest, splits={split: rows})


def is_in_numeric_order(paths: Sequence[str]) -> bool:
    """Return False if the file names differ only in numbers and are not sorted by these numbers, otherwise True."""
    numbers = name_numbers([Path(path).stem for path in paths])
    return numbers is None or numbers == sorted(numbers)


def name_numbers(names: Sequence[str]) -> list[tuple[int, ...]] | None:
    """Return the numbers in each name if names differ only in numbers, like `img_1` and `img_10`, otherwise None."""
    # Each item is text, number, text, … with at most 18 digits per number, since Python limits the digits of int().
    parts = [re.split("([0-9]{1,18})", name) for name in names]
    if not names or len({tuple(part[::2]) for part in parts}) > 1 or len(parts[0]) == 1:
        return None
    return [tuple(int(number) for number in part[1::2]) for part in parts]


def _split_folders(root: Path, scan: Scan) -> dict[str, str]:
    """Return a dict from split to folder name, in the order train, val, test, and print a note about other folders.

    Raises:
        UserError: There is no train folder, a split has several folders, or the root cannot be read.
    """
    top, images = scan.entries(".")
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    others: list[str] = []
    for folder in top:
        name = SPLIT_FOLDERS.get(folder.lower())
        (others if name is None else found[name]).append(folder)
    for name, folders in found.items():
        if len(folders) > 1:
            raise UserError(f"{root} has {' and '.join(folders)}, which all mean split {name!r}; keep one of them")
    if not found["train"]:
        found_text = ", ".join(top[:5]) or "no folders"
        raise UserError(f"{root} has no folder 'train' (it has {found_text}){scan.hint()}; {LAYOUT}")
    scan.skip_all(".", images)
    if others:
        note(
            f"{root} has folders that mean no split and are not read: {', '.join(others)}; splits are "
            f"{', '.join(SPLIT_FOLDERS)}, in any case"
        )
    return {name: folders[0] for name, folders in found.items() if folders}


def _check_class_names(root: Path, classes: tuple[str, ...]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{root}: the class folder {name!r} is not named in UTF-8; rename it") from None


def _list_split(
    scan: Scan,
    split: str,
    folder: str,
    listed: tuple[list[str], Files],
    classes: tuple[str, ...],
    digest: hashlib._Hash,
) -> tuple[Files, list[int] | None]:
    """Return the files of one split and their labels. If test has no class folders, its labels are None.

    Args:
        scan: Scan of the source.
        split: train, val or test.
        folder: Folder of the split, relative to the root.
        listed: Subfolders and image files in `folder`.
        classes: Class names of train.
        digest: Fingerprint to update with labels that are not part of the paths.

    Raises:
        UserError: Train lacks a class folder of the split, test has image files beside class folders, the
            annotations of val are invalid, or a folder cannot be read.
    """
    found, flat = listed
    numbers = {name: number for number, name in enumerate(classes)}
    if split != "train" and found == ["images"] and "images" not in numbers and not (split == "test" and flat):
        scan.skip_all(folder, flat)
        top, folder = folder, f"{folder}/images"
        found, flat = scan.entries(folder)
        if split == "val" and flat and not found:
            return _list_annotated(scan, top, dict(flat), numbers, digest)
    if split == "test" and flat:
        if found:
            raise UserError(
                f"{scan.root / folder} contains image files beside the folders {', '.join(found[:3])}; put all of its "
                "images into class folders, or none"
            )
        return [(f"{folder}/{name}", size) for name, size in flat], None
    scan.skip_all(folder, flat)
    return _list_class_folders(scan, split, folder, found, numbers)


def _list_class_folders(
    scan: Scan, split: str, folder: str, names: list[str], numbers: dict[str, int]
) -> tuple[Files, list[int]]:
    """Return the files in the class folders `names` of a split and their labels. `numbers` are the classes of train."""
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise UserError(
            f"{scan.root / folder} has {len(unknown)} class folders that train lacks, such as {unknown[0]!r}; give "
            "every split the classes of train"
            + (", or put unlabelled images into test itself" if split == "test" else "")
        )
    files: Files = []
    labels: list[int] = []
    for name in names:
        images = scan.images(join_path(folder, name))
        files += images
        labels += [numbers[name]] * len(images)
    return files, labels


def _list_annotated(
    scan: Scan, top: str, sizes: dict[str, int], numbers: dict[str, int], digest: hashlib._Hash
) -> tuple[Files, list[int]]:
    """Return the files and labels of the val split in Tiny ImageNet's published layout.

    Args:
        scan: Scan of the source.
        top: Folder of the split, relative to the root.
        sizes: Size in bytes of each image in `top`/images, by file name.
        numbers: Label of each class, by class name.
        digest: Fingerprint to update with the labels.

    Raises:
        UserError: The annotations are missing, unreadable or invalid.
    """
    path = scan.root / top / ANNOTATIONS
    if not path.is_file():
        raise UserError(
            f"{path.parent / 'images'} contains images outside of class folders, and there is no {path} with their "
            f"classes; {LAYOUT}"
        )
    with readable(path):
        lines = read_regular_file(path).decode("utf-8", "replace").splitlines()
    label_of: dict[str, int] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        class_name = rest.partition("\t")[0].strip()
        if class_name not in numbers:
            raise UserError(
                f"{path}, line {place}: {class_name!r} is not a class folder of train; a line is FILE, CLASS and a "
                "box, separated by tabs"
            )
        if label_of.setdefault(name, numbers[class_name]) != numbers[class_name]:
            raise UserError(f"{path}, line {place}: {name!r} has a second class, {class_name!r}; keep one of them")
    for name in sorted(sizes.keys() - label_of.keys()):
        scan.skip(f"{top}/images/{name}", f"not named in {ANNOTATIONS}")
    for name in sorted(label_of.keys() - sizes.keys()):
        scan.skip(f"{top}/images/{name}", f"named in {ANNOTATIONS}, but missing")
    rows = sorted((label_of[name], name) for name in sizes if name in label_of)
    labels = [label for label, _ in rows]
    digest.update(np.array(labels, "<i8").tobytes())
    return [(f"{top}/images/{name}", sizes[name]) for _, name in rows], labels


def _note_order(folder: str, files: Files) -> None:
    """Print a note that the images of an unlabeled split are not in the order of the numbers in their names."""
    names = ", ".join(Path(path).name for path, _ in files[:3])
    note(
        f"{folder} contains numbered images, which are read in the order of their names ({names} …); rename them with "
        "leading zeros if the ids of a submission are these numbers"
    )
