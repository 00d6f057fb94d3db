"""Check the storage, types, shapes and labels of the data sets in an HDF5 source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from configs.utils.errors import UserError

MAX_CHUNK_BYTES = 512 << 20  # a worker keeps one chunk of each data set in memory
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
ONE_HOT_BYTES = 16 << 20  # of one-hot labels that are read at once
Layout = Literal["channels first", "channels last", "greyscale", "file"]  # of a row
MAX_CLASSES = 100_000  # if there is no list of class names; higher labels count as damage


def chunk_bytes(dataset: h5py.Dataset) -> int:
    """Return the uncompressed size of a chunk in bytes, or 0 if the data set is not chunked."""
    return math.prod(dataset.chunks) * int(dataset.dtype.itemsize) if dataset.chunks else 0


def has_key(path: Path, file: h5py.File, key: str) -> bool:
    """Return True if the file has a link or object `key`. Raises UserError if a group above it is a link."""
    group = file
    *above, name = key.strip("/").split("/")
    for place, part in enumerate(above, 1):
        if not group.id.links.exists(part.encode()):
            return False
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise _link_error(path, "/".join(above[:place]))
        group = group[part]
        if not isinstance(group, h5py.Group):
            return False
    return bool(group.id.links.exists(name.encode()))


def _link_error(path: Path, key: str) -> UserError:
    return UserError(f"{path}: {key} is a link, which may lead to other files; copy the data itself into the file")


def checked_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """Return the data set `key`, after checking that all its bytes are in this file and were written.

    The caller has checked with `has_key` that `key` exists and is not below a link.

    Links and external storage can point to any file on this machine, which would then be read as pixels. HDF5 silently
    returns zeros where the source of a virtual data set is missing or data was never written.

    Raises:
        UserError: `key` is a link or not a data set, or the data set is empty, incomplete, stored in an unsupported
            way, or stored in chunks larger than MAX_CHUNK_BYTES.
    """
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise _link_error(path, key)
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: {key} is a {type(dataset).__name__.lower()}, not an array")
    if dataset.is_virtual or dataset.external:
        kind = "a virtual data set" if dataset.is_virtual else "kept in external storage"
        raise UserError(
            f"{path}: {key} is {kind}, which takes its bytes from other files; copy the data itself into the file"
        )
    filters = dataset.id.get_create_plist()
    foreign = {filters.get_filter(number)[0] for number in range(filters.get_nfilters())} - FILTERS
    if foreign:
        raise UserError(
            f"{path}: {key} is stored with the HDF5 filter {', '.join(map(str, sorted(foreign)))}, which is not read "
            "here; store it again with gzip or without a filter, for instance with h5repack"
        )
    if (size := chunk_bytes(dataset)) > MAX_CHUNK_BYTES:
        raise UserError(
            f"{path}: {key} is stored in chunks of {dataset.chunks}, {size:,} bytes; up to {MAX_CHUNK_BYTES:,} "
            "are read: store it in smaller chunks, for instance with h5repack"
        )
    if dataset.shape is None or 0 in dataset.shape or not dataset.shape:
        raise UserError(f"{path}: {key} is empty (shape {dataset.shape}); leave it out or write its rows")
    if dataset.chunks:
        expected = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        written, unit = dataset.id.get_num_chunks(), "chunks"
    else:  # contiguous, or compact: stored within the header
        expected, written, unit = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size(), "bytes"
    if written < expected:
        raise UserError(
            f"{path}: {expected - written:,} of {expected:,} {unit} of {key} were never written and would read as "
            "zeros; finish writing the file or fetch it again"
        )
    return dataset


def row_layout(path: Path, images: h5py.Dataset, max_pixels: int) -> Layout:
    """Return how a row of `images` is stored: as a channel-first, channel-last or greyscale image, or as a file.

    Images are [N, 3, H, W], [N, H, W, 3], [N, H, W], [N, 1, H, W] or [N, H, W, 1], and files are variable-length bytes
    [N].

    Raises:
        UserError: The dtype or shape is not supported, the shape is ambiguous, or the images have more than
            `max_pixels` pixels.
    """
    shape, key = images.shape, images.name.lstrip("/")
    if h5py.check_vlen_dtype(images.dtype) in (np.uint8, np.int8) and len(shape) == 1:
        return "file"
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: {key} has dtype {images.dtype}; only uint8 pixels are read: {_type_hint(images.dtype)}"
        )
    sides = shape[1:]  # of a greyscale image without a channel axis
    channels = [count for count in (3, 1) if len(shape) == 4 and count in (shape[1], shape[3])]
    if channels:
        if shape[1] == shape[3] == channels[0]:
            raise UserError(
                f"{path}: {key} has shape {shape}, in which either axis of {channels[0]} may be the channels; enlarge "
                "the images"
            )
        sides = shape[2:] if shape[1] == channels[0] else shape[1:3]
    elif len(shape) != 3:
        raise UserError(
            f"{path}: {key} has shape {shape}; allowed are (N, 3, H, W), (N, H, W, 3), and for greyscale images "
            f"(N, H, W), (N, 1, H, W) and (N, H, W, 1): {_shape_hint(shape)}"
        )
    height, width = sides
    if height * width > max_pixels:
        raise UserError(f"{path}: {key} has {height * width:,} pixels per image; --max-pixels allows {max_pixels:,}")
    if channels[:1] != [3]:
        return "greyscale"
    return "channels first" if shape[1] == 3 else "channels last"


ENCODED_HINT = (
    "store encoded images (JPEG, PNG …) as variable-length bytes (N,), dtype h5py.vlen_dtype('uint8'), or as files "
    "ROOT/train/CLASS/NAME.jpg for `zhu convert imagefolder`"
)


def _type_hint(dtype: np.dtype) -> str:
    """Return advice for an error message on how to convert data of this dtype to uint8 pixels."""
    is_opaque = dtype.kind == "V" and dtype.names is None
    if is_opaque or h5py.check_string_dtype(dtype) or h5py.check_vlen_dtype(dtype) in (np.uint8, np.int8):
        return ENCODED_HINT
    if dtype.kind == "f":
        return "undo any normalisation, scale to 0..255 (floats of 0..1 by 255), round and store as uint8"
    if dtype.kind == "b":
        return "store them as uint8, multiplied by 255"
    if dtype.kind in "iu":
        return "store values within 0..255 as uint8 as they are, and scale wider ranges (0..65535) to 0..255"
    return "store an array (N, H, W, 3) of uint8"


def _shape_hint(shape: tuple[int, ...]) -> str:
    """Return advice for an error message on how to convert uint8 data of this shape to RGB images."""
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return "store RGBA images without their fourth channel"
    if len(shape) == 4 and 3 in shape:
        return "transpose the axes into one of these orders"
    if len(shape) <= 2:
        return f"reshape flattened pixels; {ENCODED_HINT}"
    return "store RGB images, one in each row"


def load_labels(
    path: Path, file: h5py.File, key: str, rows: int, classes: int | None, may_be_missing: bool
) -> tuple[np.ndarray | None, int]:
    """Load and check the labels of a split: class numbers [rows] or [rows, 1], or one-hot rows [rows, columns].

    Args:
        path: Path of the file, for messages.
        file: The open file.
        key: Key of the labels.
        rows: Number of images in the split.
        classes: Number of classes, or None to allow labels below MAX_CLASSES.
        may_be_missing: Whether labels that are all -1 mean that there are none.

    Returns:
        The labels, int64 [rows], or None if they are missing, and the number of columns of one-hot rows, otherwise 0.

    Raises:
        UserError: The labels fail `checked_dataset`, their dtype or shape is wrong, or a label is not a whole number or
            out of range.
    """
    dataset = checked_dataset(path, file, key)
    shape = dataset.shape
    if dataset.dtype.kind not in "iufb":
        raise UserError(
            f"{path}: {key} has dtype {dataset.dtype}; labels must be numbers: number the class names from 0 on, and "
            "give the names themselves with --classes FILE"
        )
    limit = classes if classes is not None else MAX_CLASSES
    if len(shape) == 2 and shape[0] == rows and 1 < shape[1] <= limit:
        return _one_hot_labels(path, key, dataset), shape[1]
    if shape not in ((rows,), (rows, 1)):
        raise UserError(
            f"{path}: {key} has shape {shape}, but there are {rows} images; allowed is ({rows},), or ({rows}, C) for "
            f"one-hot labels of up to {limit} classes"
        )
    labels = dataset[()].reshape(-1)
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)
    if may_be_missing and labels.dtype.kind in "if" and (labels == -1).all():
        return None, 0
    is_wrong = ~((labels >= 0) & (labels < limit) & (labels == np.floor(labels)))  # true for NaN
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        source = "the class names" if classes is not None else "a list of class names (--classes)"
        raise UserError(
            f"{path}: {key}[{row}] is {labels[row]}; labels must be whole numbers within 0 to {limit - 1} "
            f"({is_wrong.sum()} of {rows} are not): fix the labels or {source}"
        )
    return labels.astype(np.int64), 0


def _one_hot_labels(path: Path, key: str, dataset: h5py.Dataset) -> np.ndarray:
    """Return the column of the 1 in each row, int64 [rows]. Raises UserError if a row is anything but a 1 and zeros."""
    rows, columns = dataset.shape
    labels = np.empty(rows, np.int64)
    step = max(1, ONE_HOT_BYTES // (columns * dataset.dtype.itemsize))
    for start in range(0, rows, step):
        block = dataset[start : start + step]
        is_one = block == 1
        is_wrong = (is_one.sum(axis=1) != 1) | ((block != 0) & ~is_one).any(axis=1)
        if is_wrong.any():
            raise UserError(
                f"{path}: {key}[{start + int(np.argmax(is_wrong))}] is not a single 1 among {columns - 1} zeros; give "
                "one-hot labels, or class numbers from 0 on, for instance with argmax(axis=1)"
            )
        labels[start : start + step] = is_one.argmax(axis=1)
    return labels
