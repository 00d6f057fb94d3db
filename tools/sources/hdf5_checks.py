"""Check the storage, types, shapes and labels of the data sets in an HDF5 source."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError

MAX_CHUNK_BYTES = 512 << 20  # a worker keeps one chunk of each data set in memory
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
MAX_CLASSES = 100_000  # if there is no list of class names; higher labels count as damage


def chunk_bytes(dataset: h5py.Dataset) -> int:
    """Return the uncompressed size of a chunk in bytes, or 0 if the data set is not chunked."""
    return math.prod(dataset.chunks) * int(dataset.dtype.itemsize) if dataset.chunks else 0


def checked_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """Return the data set `key`, after checking that all its bytes are in this file and were written.

    Links and external storage can point to any file on this machine, which would then be read as pixels. HDF5 silently
    returns zeros where the source of a virtual data set is missing or data was never written.

    Raises:
        UserError: `key` is a link or not a data set, or the data set is empty, incomplete, stored in an unsupported
            way, or stored in chunks larger than MAX_CHUNK_BYTES.
    """
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise UserError(f"{path}: {key} is a link, which may lead to other files; copy the data itself into the file")
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


def is_channels_first(path: Path, images: h5py.Dataset, max_pixels: int) -> bool:
    """Return True for images [N, 3, H, W] and False for [N, H, W, 3].

    Raises:
        UserError: The dtype or shape is not supported, the shape is ambiguous, or the images have more than
            `max_pixels` pixels.
    """
    shape, key = images.shape, images.name.lstrip("/")
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: {key} has dtype {images.dtype}; only uint8 pixels are read: {_type_hint(images.dtype)}"
        )
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise UserError(
            f"{path}: {key} has shape {shape}; allowed are (N, 3, H, W) and (N, H, W, 3): {_shape_hint(shape)}"
        )
    if shape[1] == shape[3] == 3:
        raise UserError(
            f"{path}: {key} has shape {shape}, which may be (N, 3, H, W) as well as (N, H, W, 3); a side "
            "of 3 pixels cannot be told from the channels: enlarge the images"
        )
    channels_first = bool(shape[1] == 3)
    height, width = shape[2:] if channels_first else shape[1:3]
    if height * width > max_pixels:
        raise UserError(f"{path}: {key} has {height * width:,} pixels per image; --max-pixels allows {max_pixels:,}")
    return channels_first


ENCODED_HINT = (
    "write encoded images (JPEG, PNG …) as files ROOT/train/CLASS/NAME.jpg and convert them with "
    "`tools/convert.py imagefolder`, or decode them to an array (N, H, W, 3)"
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
    if len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[3])):
        return "repeat the channel of greyscale images three times"
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return "store RGBA images without their fourth channel"
    if len(shape) == 4 and 3 in shape:
        return "transpose the axes into one of these orders"
    if len(shape) <= 2:
        return f"reshape flattened pixels; {ENCODED_HINT}"
    return "store RGB images, one in each row"


def load_labels(path: Path, file: h5py.File, split: str, rows: int, classes: int | None) -> np.ndarray | None:
    """Load and check the labels of a split.

    Args:
        path: Path of the file, for messages.
        file: The open file.
        split: Name of the split.
        rows: Number of images in the split.
        classes: Number of classes, or None to allow labels below MAX_CLASSES.

    Returns:
        The labels, int64 [rows], or None if `split` is test and all labels are -1.

    Raises:
        UserError: The labels fail `checked_dataset`, their dtype or shape is wrong, or a label is out of range.
    """
    key = f"labels-{split}"
    dataset = checked_dataset(path, file, key)
    if dataset.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {key} has dtype {dataset.dtype}; labels must be integers: {_label_hint(dataset.dtype)}"
        )
    if dataset.shape not in ((rows,), (rows, 1)):
        hint = "; store one-hot labels as argmax(axis=1)" if len(dataset.shape) == 2 else ""
        raise UserError(
            f"{path}: {key} has shape {dataset.shape}, but images-{split} has {rows} rows; allowed is ({rows},){hint}"
        )
    labels = dataset[()].reshape(-1)
    if split == "test" and labels.dtype.kind == "i" and (labels == -1).all():
        return None
    limit = classes if classes is not None else MAX_CLASSES
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        row = int(np.argmax(wrong))
        source = "the class names" if classes is not None else "a list of class names (--classes)"
        raise UserError(
            f"{path}: {key}[{row}] is {labels[row]}; labels must be within 0 to {limit - 1} ({wrong.sum()} of {rows} "
            f"do not): fix the labels or {source}"
        )
    return labels.astype(np.int64)


def _label_hint(dtype: np.dtype) -> str:
    if dtype.kind in "OSV":
        return "number the class names from 0 on, and give the names themselves with --classes FILE"
    return "store class numbers from 0 on, for instance with astype('int64')"
