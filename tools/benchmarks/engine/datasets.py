"""Write variants of a data set that differ in encoding, image size, number of samples or number of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.storage.dataset import fingerprint, load_dataset
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

QUALITY = 95  # JPEG quality for all candidates, with 4:2:0 chroma subsampling
SPLIT = "train"


def read_pixels(split: Split, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the images of samples `start` to `stop` (exclusive) of an npy split, uint8 [samples, H, W, 3]."""
    view, rows = split.pixel_rows()
    return view[rows[start:stop]].reshape(-1, *(split.image_shape or ()))


def labels_or_zeros(split: Split) -> np.ndarray:
    """Return the labels of a split, int64 [samples]. All are 0 if the split has no labels."""
    return np.zeros(len(split), np.int64) if split.labels is None else split.labels


def limited_batch_size(folder: Path, batch_size: int, batches: int = 8) -> int:
    """Return `batch_size`, reduced if necessary so that the train split has at least `batches` batches."""
    return min(batch_size, len(open_split(folder, SPLIT)) // batches)


@dataclass
class RepeatedRows:
    """A `SplitSource` that reads the train split of an npy data set, truncated or repeated to `samples` samples."""

    folder: Path
    samples: int
    labels: np.ndarray | None
    bytes_per_row: int

    def __len__(self) -> int:
        return self.samples

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        split = open_split(self.folder, SPLIT)
        view, rows = split.pixel_rows()
        for row in range(start, stop):
            yield view[rows[row % len(split)]].reshape(split.image_shape or ())

    def describe(self, row: int) -> str:
        return f"{self.folder}, row {row}"


def make_variant(
    folder: Path, out: Path, *, encoding: str = "npy", size: int | None = None, samples: int | None = None
) -> Path:
    """Write a variant of the train split of an npy data set to `out` and return its path.

    If `out` already contains a data set, nothing is written. The shard size, 1 to 512 MiB, is chosen so that there is
    at least one shard per core if possible.

    Args:
        folder: Data set to convert.
        out: Folder of the variant.
        encoding: "npy" or "jpeg".
        size: Height and width of the images in pixels, or None for the stored size.
        samples: Number of samples, or None for all samples of the split. Samples are repeated if the split has fewer.
    """
    if (out / "dataset.json").is_file():
        return out
    dataset = load_dataset(folder)
    samples = samples or dataset.splits[SPLIT].samples
    split = open_split(folder, SPLIT)
    labels = labels_or_zeros(split)[np.arange(samples) % len(split)]
    rows = RepeatedRows(folder, samples, labels, bytes_per_row=int(split.size[0]))
    source = Source("benchmark", dataset.name, dataset.classes, fingerprint(dataset), {SPLIT: rows})
    cores = len(os.sched_getaffinity(0))
    assert dataset.image_shape is not None  # always in npy
    side = size or dataset.image_shape[0]
    shard_mib = max(1, min(512, samples * side * side * 3 // 2**20 // cores // (5 if encoding == "jpeg" else 1)))
    pixels = Encoding(name=encoding, quality=QUALITY, size=size)  # type: ignore[arg-type]
    convert_source(source, out, Options(pixels, shard_mib=shard_mib), cores, dataset.name)
    return out
