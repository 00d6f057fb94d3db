"""Read HDF5 files in MediumImageNet's layout: `images-SPLIT` and `labels-SPLIT` for train, val and test.

Other keys are given as templates. Images are uint8 arrays, RGB or greyscale, or files such as JPEG in variable-length
bytes. `pipelines.hdf5` checks and reads the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from pipelines.convert.source import Source, SplitSource
from pipelines.hdf5.arrays import Hdf5Images
from pipelines.hdf5.checks import MAX_CHUNK_BYTES
from pipelines.hdf5.file import (
    DEFAULT_KEYS,
    CheckedSplit,
    KeyTemplates,
    checked_splits,
    load_class_names,
    numbered_classes,
    open_file,
    report_damage,
)
from pipelines.hdf5.image_files import Hdf5Files
from tools.sources.folder_scan import note_missing_classes

FINGERPRINT_ROWS = 64


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
    checked: list[CheckedSplit] = []
    with report_damage(str(path), MAX_CHUNK_BYTES), open_file(path) as file:
        for found in checked_splits(path, file, templates, class_count, max_pixels):
            images, labels = found.images, found.labels
            is_array = found.layout != "file"
            split = Hdf5Images(path, images, found.layout, labels) if is_array else Hdf5Files(path, images, labels)
            splits[found.name] = split
            _update_digest(digest, found, split)
            checked.append(found)
    labels_of = {found.labels_key: found.labels for found in checked if found.labels is not None}
    classes = names or numbered_classes(path, labels_of, checked[0].columns)
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
        default_encoding="jpeg" if any(found.layout == "file" for found in checked) else "npy",
    )


def _update_digest(digest: hashlib._Hash, found: CheckedSplit, split: SplitSource) -> None:
    """Add a split's name, shape, dtype, labels and up to `FINGERPRINT_ROWS` evenly spaced rows to the fingerprint."""
    digest.update(f"{found.name} {found.images.shape} {found.images.dtype}".encode())
    digest.update(b"" if split.labels is None else split.labels.tobytes())
    for row in np.unique(np.linspace(0, len(split) - 1, FINGERPRINT_ROWS).astype(int)).tolist():
        for image in split.read(row, row + 1):
            digest.update(image if isinstance(image, bytes) else image.tobytes())
