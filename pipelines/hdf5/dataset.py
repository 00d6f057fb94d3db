"""Describe an HDF5 file as the data set that its conversion would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path

import numpy as np

from pipelines.hdf5.contents import Contents, StoredSplit
from pipelines.storage import tar_format
from pipelines.storage.dataset import (
    ChannelValues,
    DatasetInfo,
    FileInfo,
    JsonObject,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    safe_name,
)
from pipelines.storage.index import channel_statistics, rows_per_shard

UNKNOWN: ChannelValues = (nan, nan, nan)


@dataclass(frozen=True)
class Hdf5Dataset(DatasetInfo):
    """Description of an HDF5 file. Its mean and std are computed when they are first needed."""

    contents: Contents = field(repr=False)
    load_sums: Callable[[Hdf5Dataset], np.ndarray] = field(repr=False)  # see `statistics.load_channel_sums`

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if getattr(self, name) is UNKNOWN:
                del vars(self)[name]

    def __getattr__(self, name: str) -> ChannelValues:
        """Compute `mean` or `std`. Python calls this method for attributes that are not set."""
        if name not in ("mean", "std"):
            raise AttributeError(name)
        train = self.contents.splits["train"].storage
        height, width, _ = train.image_shape
        values = channel_statistics(self.channel_sums, train.shape[0] * height * width)
        vars(self).update(zip(("mean", "std"), values, strict=True))
        return values[name == "std"]

    @property
    def channel_sums(self) -> np.ndarray:
        """Per-channel sums of the pixels of train and of their squares, int64 [2, 3]."""
        return self.load_sums(self)

    def identity(self) -> JsonObject:
        """Return what makes up the fingerprint. The sums change with any pixel of train."""
        return {**super().identity(), "sums": self.channel_sums.tolist()}


def describe(contents: Contents, load_sums: Callable[[Hdf5Dataset], np.ndarray]) -> Hdf5Dataset:
    """Return the description of a file.

    Splits have the samples, the stored order, the shard numbers and the labels of a conversion with default options.
    """
    path, classes = contents.path, len(contents.classes)
    splits = {name: _split_info(path, name, split, classes) for name, split in contents.splits.items()}
    shape = contents.splits["train"].storage.image_shape
    source = {"kind": "hdf5", "name": path.name, "fingerprint": ""}
    return Hdf5Dataset(
        name=safe_name(path.stem),
        classes=contents.classes,
        mean=UNKNOWN,
        std=UNKNOWN,
        encoding="npy",
        image_shape=shape,
        splits=splits,
        options={"encoding": {"name": "npy"}},
        source=SourceInfo(**source),
        unordered=(),
        reencoded={},
        content={
            "classes": list(contents.classes),
            "encoding": "npy",
            "image_shape": list(shape),
            "splits": {name: asdict(split) for name, split in splits.items()},
            "source": source,
        },
        contents=contents,
        load_sums=load_sums,
    )


def shard_rows(split: StoredSplit, classes: int) -> int:
    """Return the number of samples in each shard of the conversion."""
    size = split.storage.row_bytes if split.storage.layout != "greyscale" else 3 * split.storage.row_bytes
    header = len(tar_format.npy_header(split.storage.image_shape))
    return rows_per_shard(header + size, split.labels is not None, classes)


def _split_info(path: Path, name: str, split: StoredSplit, classes: int) -> SplitInfo:
    rows, step = split.storage.shape[0], shard_rows(split, classes)
    shards = tuple(
        ShardInfo(path.name, min(step, rows - start), min(step, rows - start) * split.storage.row_bytes, split.digest)
        for start in range(0, rows, step)
    )
    return SplitInfo(
        samples=rows,
        labelled=split.labels is not None,
        source_rows=rows,
        shuffled=name == "train",
        quarantined=(),
        index=FileInfo(path.name, 0, split.digest),
        shards=shards,
    )
