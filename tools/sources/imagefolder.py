"""Read image files in folders: ROOT/SPLIT/CLASS/*.jpg, the layout of torchvision's ImageFolder and timm.

Folders without splits (ROOT/CLASS/*.jpg) are split at random, and the classes of files that are in no class folder come
from a table, see `label_table`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from pipelines.convert.source import Source, SplitSource
from pipelines.storage.dataset import SPLIT_NAMES
from tools.sources.folder_scan import EXTENSIONS, Scan, join_path, note, note_missing_classes
from tools.sources.image_files import Files, ImageFolderSplit, is_in_numeric_order
from tools.sources.label_table import read_labels

ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's labels of val/images: file, class and box, separated by tabs
LAYOUT = "the layout is ROOT/train/CLASS/*.jpg, likewise val, and test with or without class folders"
NO_SPLITS = "for class folders without splits, give --val-fraction 0.1"
TABLE = "for images outside of class folders, give a table of their classes with --labels FILE"

LabelledFiles = tuple[Files, list[int] | None]  # the files of a split and their labels, None without labels


@dataclass(frozen=True)
class FolderOptions:
    """How to read a folder that lacks splits or class folders."""

    labels: Path | None = None  # table of the classes of images that are in no class folder
    val_fraction: float | None = None  # of train, moved to val; None if val is a folder or missing
    test_fraction: float | None = None
    seed: int = 0  # of the random split
    follow_links: bool = False  # read links to files and folders outside of the root, and to folders of images

    @property
    def fractions(self) -> dict[str, float]:
        """The fractions that are moved from train, by split."""
        given = {"val": self.val_fraction, "test": self.test_fraction}
        return {split: fraction for split, fraction in given.items() if fraction is not None}


@dataclass(frozen=True)
class SplitFolder:
    """The content of the folder of a split. Paths are relative to the root."""

    folder: str
    images: str  # `folder`, or the folder `images` in it
    class_folders: list[str]  # names of the folders in `images`
    flat: Files  # image files in `images`, in no class folder


def open_imagefolder(root: Path, options: FolderOptions = FolderOptions()) -> Source:
    """Open a folder of image files and list every split.

    Classes are the sorted folders of train or, if it has none, the sorted classes of `options.labels`. Rows are sorted
    by class, then by path. A class contains the images at any depth below its folder. Tiny ImageNet's published layout
    is supported as well: val/images with labels in val/val_annotations.txt, and test/images without labels. If there is
    no train folder, and fractions or labels are given, the root is the folder of train.

    Raises:
        UserError: The layout is not supported or does not fit the options, the name of a class folder is not UTF-8, a
            table of labels is invalid, a split has no images, a folder cannot be read, a link leads out of `root` and
            is not followed, or a file is larger than `MAX_FILE_BYTES`.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"source {str(root)!r} {what}; {LAYOUT}")
    scan = Scan(root.resolve(), options.follow_links)
    if options.labels is not None:
        scan.expected.add(str(options.labels.resolve()))
    top = scan.entries(".")
    folders = _split_folders(root, top, scan, options)
    listed = _list_folders(scan, folders, top, options)
    class_of = _read_tables(scan, listed, options)
    classes = tuple(listed["train"].class_folders) or _class_order(class_of)
    _check_class_names(root, classes)
    digest = hashlib.sha256("\n".join(classes).encode())
    found = {name: _label_files(scan, name, content, classes, class_of) for name, content in listed.items()}
    for name, (files, _) in found.items():
        if not files:
            raise UserError(
                f"{root / folders[name]} contains no images ({', '.join(EXTENSIONS)}){scan.hint()}; {LAYOUT}; {TABLE}"
            )
    if options.fractions:
        found = _hold_out(root, found, options)
    splits: dict[str, SplitSource] = {}
    unordered: list[str] = []
    for name, (files, labels) in found.items():
        folder = folders.get(name, folders["train"])
        if labels is not None and files[0][0] in class_of:  # not part of the paths
            digest.update(np.array(labels, "<i8").tobytes())
        for path, size in files:
            inner = path if folder == "." else path[len(folder) + 1 :]
            digest.update(f"{name}/".encode() + os.fsencode(inner) + f"\0{size}\0".encode())
        splits[name] = ImageFolderSplit(scan.root, files, labels)
        if labels is not None:
            title = name if folders.get(name, ".") == "." else folder
            note_missing_classes(f"{title} has no images", labels, classes)
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
        default_encoding="jpeg",
    )


def _split_folders(root: Path, top: tuple[list[str], Files], scan: Scan, options: FolderOptions) -> dict[str, str]:
    """Return a dict from split to folder name, in the order train, val, test, and print a note about other folders.

    Args:
        root: The source, for messages.
        top: Subfolders and image files in the root.
        scan: Scan of the source.
        options: If these name fractions or labels, and no folder is a split, the root is the folder of train.

    Raises:
        UserError: There is no train folder, or a split has several folders.
    """
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    others: list[str] = []
    for folder in top[0]:
        name = SPLIT_NAMES.get(folder.lower())
        (others if name is None else found[name]).append(folder)
    for name, folders in found.items():
        if len(folders) > 1:
            raise UserError(f"{root} has {' and '.join(folders)}, which all mean split {name!r}; keep one of them")
    if not any(found.values()) and (options.fractions or options.labels is not None):
        return {"train": "."}
    if not found["train"]:
        found_text = ", ".join(top[0][:5]) or "no folders"
        raise UserError(f"{root} has no folder 'train' (it has {found_text}){scan.hint()}; {LAYOUT}; {NO_SPLITS}")
    scan.skip_all(top[1])
    if others:
        note(
            f"{root} has folders that mean no split and are not read: {', '.join(others)}; splits are "
            f"{', '.join(SPLIT_NAMES)}, in any case"
        )
    return {name: folders[0] for name, folders in found.items() if folders}


def _list_folders(
    scan: Scan, folders: dict[str, str], top: tuple[list[str], Files], options: FolderOptions
) -> dict[str, SplitFolder]:
    """List the folder of each split, or the folder `images` in it if that is not a class.

    `top` is the content of the root. In train, a folder `images` is a class unless there are `options.labels`.
    """
    listed: dict[str, SplitFolder] = {}
    for split, folder in folders.items():
        if split == "val":
            scan.expected.add(str(scan.root / folder / ANNOTATIONS))
        names, files = top if folder == "." else scan.entries(folder)
        is_class = options.labels is None if split == "train" else "images" in listed["train"].class_folders
        images = folder
        if names == ["images"] and not is_class and not (files and split != "val"):
            scan.skip_all([(join_path(folder, name), size) for name, size in files])
            images = join_path(folder, "images")
            names, files = scan.entries(images)
        flat = [(join_path(images, name), size) for name, size in files]
        listed[split] = SplitFolder(folder, images, names, flat)
    return listed


def _read_tables(scan: Scan, listed: dict[str, SplitFolder], options: FolderOptions) -> dict[str, str]:
    """Return the classes of images that are in no class folder, by path.

    They come from `options.labels` or, for val, from Tiny ImageNet's annotations. Images of test are labeled only if
    all images of train and val are in class folders.

    Raises:
        UserError: A table is missing or invalid, or all images are in class folders although `options.labels` is given.
    """
    flat = {split: content for split, content in listed.items() if content.flat and not content.class_folders}
    classes = listed["train"].class_folders
    if options.labels is not None:
        if flat.keys() - {"test"}:
            flat.pop("test", None)
        if not flat:
            raise UserError(f"--labels {options.labels}: {scan.root} has no images outside of class folders; omit it")
        return read_labels(options.labels, [file for content in flat.values() for file in content.flat], classes, scan)
    if "val" not in flat or not classes:
        return {}
    path = scan.root / flat["val"].folder / ANNOTATIONS
    if not path.is_file():
        raise UserError(
            f"{scan.root / flat['val'].images} contains images outside of class folders, and there is no {path} with "
            f"their classes; {LAYOUT}; {TABLE}"
        )
    return read_labels(path, flat["val"].flat, classes, scan)


def _class_order(class_of: dict[str, str]) -> tuple[str, ...]:
    """Return the sorted class names of a table. Numbers are sorted by value."""
    names = set(class_of.values())
    return tuple(sorted(names, key=int) if all(re.fullmatch("[0-9]{1,18}", name) for name in names) else sorted(names))


def _check_class_names(root: Path, classes: tuple[str, ...]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{root}: the class folder {name!r} is not named in UTF-8; rename it") from None


def _label_files(
    scan: Scan, split: str, content: SplitFolder, classes: tuple[str, ...], class_of: dict[str, str]
) -> LabelledFiles:
    """Return the files of one split and their labels. If test has neither class folders nor a table, these are None.

    Args:
        scan: Scan of the source.
        split: train, val or test.
        content: Content of the split's folder.
        classes: Class names of train.
        class_of: Class names of the images in tables, by path.

    Raises:
        UserError: Train lacks a class folder of the split, test has image files beside class folders, or a folder
            cannot be read.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    names, flat = content.class_folders, content.flat
    if flat and not names and any(path in class_of for path, _ in flat):
        rows = sorted((numbers[class_of[path]], path, size) for path, size in flat if path in class_of)
        return [(path, size) for _, path, size in rows], [label for label, _, _ in rows]
    if split == "test" and flat:
        if names:
            raise UserError(
                f"{scan.root / content.images} contains image files beside the folders {', '.join(names[:3])}; put all "
                "of its images into class folders, or none"
            )
        return flat, None
    scan.skip_all(flat)
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(
            f"{scan.root / content.images} has {len(unknown)} class folders that train lacks, such as {unknown[0]!r}; "
            "give every split the classes of train"
            + (", or put unlabelled images into test itself" if split == "test" else "")
        )
    files: Files = []
    labels: list[int] = []
    for name in names:
        images = scan.images(join_path(content.images, name))
        files += images
        labels += [numbers[name]] * len(images)
    return files, labels


def _hold_out(root: Path, found: dict[str, LabelledFiles], options: FolderOptions) -> dict[str, LabelledFiles]:
    """Move a random fraction of each class of train to val or test, at least one image if the class has enough.

    The choice depends only on the seed and on the paths of the class's files, not on other classes.

    Raises:
        UserError: The fractions add up to 1 or more, or one of them has no effect.
    """
    fractions = options.fractions
    for split in fractions.keys() & found.keys():
        raise UserError(f"{root} has a folder for split {split!r}; omit --{split}-fraction, or remove the folder")
    if sum(fractions.values()) >= 1:
        given = " ".join(f"--{split}-fraction {fraction}" for split, fraction in fractions.items())
        raise UserError(f"{given} leave no images for train; give fractions that add up to less than 1")
    files, labels = found["train"]
    by_class: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels or ()):
        by_class[label].append(row)
    split_of = ["train"] * len(files)
    for rows in by_class.values():
        order = sorted(rows, key=lambda row: _random_key(files[row][0], options.seed))
        for split, fraction in fractions.items():
            count = min(max(1, round(len(rows) * fraction)), len(order) - 1) if fraction else 0
            for row in order[:count]:
                split_of[row] = split
            order = order[count:]
    for split in ("train", *fractions):
        rows = [row for row, name in enumerate(split_of) if name == split]
        if rows:
            found[split] = [files[row] for row in rows], [(labels or [])[row] for row in rows]
        elif fractions[split]:
            raise UserError(f"{root} has one image per class, and none is left for split {split!r}; add images")
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _random_key(path: str, seed: int) -> tuple[bytes, str]:
    return hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(path), digest_size=8).digest(), path


def _note_order(folder: str, files: Files) -> None:
    """Print a note that the images of an unlabeled split are not in the order of the numbers in their names."""
    names = ", ".join(Path(path).name for path, _ in files[:3])
    note(
        f"{folder} contains numbered images, which are read in the order of their names ({names} …); rename them with "
        "leading zeros if the ids of a submission are these numbers"
    )
