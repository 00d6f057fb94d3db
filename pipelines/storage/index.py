"""Read SPLIT.index.npz, which locates each sample, and check that all samples are within their shards."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError, readable
from pipelines.order import permutation
from pipelines.storage import tar_format
from pipelines.storage.dataset import (
    MAX_SIDE,
    RECONVERT,
    SHARD_MIB,
    ChannelValues,
    DatasetInfo,
    ShardInfo,
    refuse_external_link,
)

INDEX_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "height": np.int32,
    "width": np.int32,
}
_UNREADABLE = (ValueError, KeyError, OSError, EOFError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile)


def channel_statistics(sums: np.ndarray, pixels: int) -> tuple[ChannelValues, ChannelValues]:
    """Return the per-channel mean and standard deviation over all pixels of a split, for pixels scaled to 0..1.

    Args:
        sums: Per-channel sums of the values (0 to 255) and of their squares, int64 [2, 3].
        pixels: Number of pixels.
    """
    mean = sums[0] / pixels
    variance = np.maximum(sums[1] / pixels - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 1.0)  # avoids a division by 0 for a constant channel
    rounded = [[round(float(value) / 255, 6) for value in values] for values in (mean, std)]
    (red, green, blue), (red_std, green_std, blue_std) = rounded
    return (red, green, blue), (red_std, green_std, blue_std)


def rows_per_shard(size: int, labelled: bool, classes: int, shard_mib: int = SHARD_MIB) -> int:
    """Return the number of source rows of a shard. The arguments are those of `sample_stride`."""
    return max(1, shard_mib * 2**20 // sample_stride(size, labelled, classes))


def stored_order(rows: int, seed: int, shuffled: bool) -> np.ndarray:
    """Return the source row of each sample in stored order, int64 [rows]. Only a `shuffled` split differs in order."""
    return permutation(rows, seed, epoch=0) if shuffled else np.arange(rows)


def sample_stride(size: int, labelled: bool, classes: int) -> int:
    """Return the distance in bytes between consecutive samples of a shard whose images all have the same size.

    Args:
        size: Size of an image member's content in bytes.
        labelled: Whether each sample has a label member.
        classes: Number of classes, which determines the number of digits of a label.
    """
    return tar_format.sample_bytes(size, tar_format.count_label_digits(classes) if labelled else None)


def check_size(file: Path, expected: int) -> None:
    """Raise UserError if a file is missing, unreadable, not `expected` bytes long, or a link outside the data set."""
    with readable(file):
        refuse_external_link(file)
        if not file.is_file():
            raise UserError(f"{file} is missing, though dataset.json lists it; {RECONVERT}")
        size = file.stat().st_size
    if size != expected:
        raise UserError(f"{file} has {size:,} bytes, but dataset.json says {expected:,} (truncated?); {RECONVERT}")


def load_index(folder: Path, dataset: DatasetInfo, name: str) -> dict[str, np.ndarray]:
    """Load the columns of a split's index, each [samples], and check them against dataset.json.

    Raises:
        UserError: The index is missing, unreadable, damaged, empty, inconsistent with dataset.json, or a link to a file
            outside the data set.
    """
    split, classes = dataset.splits[name], len(dataset.classes)
    file, samples = folder / split.index.file, split.samples
    check_size(file, split.index.bytes)
    if split.index.bytes > 64 * samples + 2**16:
        raise UserError(f"{file} has {split.index.bytes:,} bytes, too many for {samples} samples; {RECONVERT}")
    with readable(file):
        content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != split.index.sha256:
        raise UserError(f"{file} does not have the sha256 that dataset.json gives; {RECONVERT}")
    try:
        index = _columns(content)
    except _UNREADABLE as error:
        raise UserError(f"{file} cannot be read ({error}); {RECONVERT}") from None
    lengths = {name: len(column) for name, column in index.items()}
    if set(lengths.values()) != {samples}:
        raise UserError(f"{file} has {lengths} rows, but dataset.json says {samples}; {RECONVERT}")
    if samples == 0:
        raise UserError(f"{file} lists no samples; {RECONVERT}")
    _check_offsets(file, index, split.shards)
    if split.labelled and not 0 <= index["label"].min() <= index["label"].max() < classes:
        raise UserError(
            f"{file} has labels from {index['label'].min()} to {index['label'].max()}, "
            f"but dataset.json names {classes} classes; {RECONVERT}"
        )
    if dataset.encoding == "npy" and dataset.image_shape is not None:
        _check_stride(file, index, dataset.image_shape, split.labelled, classes)
    return index


def _columns(content: bytes) -> dict[str, np.ndarray]:
    """Parse the columns of the index.

    Unlike np.load, this function does not allocate the array size that a damaged file claims.
    """
    index = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name, dtype in INDEX_COLUMNS.items():
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content):
                raise ValueError(f"column {name!r} is compressed")
            stored = bytearray(archive.read(member))
            stream = io.BytesIO(stored[:4096])
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError(f"column {name!r} has an unsupported .npy version")
            shape, _, kind = np.lib.format.read_array_header_1_0(stream)
            if kind.kind != "i":
                raise ValueError(f"column {name!r} has type {kind}")
            values = np.frombuffer(stored, kind, offset=stream.tell())
            if shape != values.shape:
                raise ValueError(f"column {name!r} is truncated")
            index[name] = values.astype(dtype, copy=False)
    return index


def _check_offsets(file: Path, index: dict[str, np.ndarray], shards: Sequence[ShardInfo]) -> None:
    expected = [shard.samples for shard in shards]
    in_range = index["shard"].min() >= 0 and index["shard"].max() < len(shards)
    if not in_range or np.bincount(index["shard"], minlength=len(shards)).tolist() != expected:
        raise UserError(f"{file} and dataset.json disagree about the number of samples per shard; {RECONVERT}")
    sizes = np.array([shard.bytes for shard in shards], np.int64)[index["shard"]]
    bad = (index["offset"] < tar_format.BLOCK) | (index["size"] < 0) | (index["offset"] > sizes - index["size"])
    if bad.any():
        raise UserError(f"{file} places sample {int(np.argmax(bad))} outside of its shard; {RECONVERT}")
    for side in ("height", "width"):
        if index[side].min() < 1 or index[side].max() >= MAX_SIDE:
            raise UserError(
                f"{file} gives images a {side} from {index[side].min()} to {index[side].max()} pixels; {RECONVERT}"
            )


def _check_stride(
    file: Path, index: dict[str, np.ndarray], shape: tuple[int, int, int], labelled: bool, classes: int
) -> None:
    size = len(tar_format.npy_header(shape)) + math.prod(shape)
    stride = sample_stride(size, labelled, classes)
    if (index["size"] != size).any() or ((index["offset"] - tar_format.BLOCK) % stride).any():
        raise UserError(
            f"{file} does not place images of the shape {list(shape)} that dataset.json gives "
            f"at the constant stride of npy shards; {RECONVERT}"
        )
