"""The data sets of a run, made on the spot from what is given: other encodings, other sizes, more samples, more
shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert.encode import Encoding
from pipelines.convert.source import Options, Source
from pipelines.convert.writer import write_dataset
from pipelines.storage.split import Split, fingerprint, load_dataset, open_split

QUALITY = 95  # of all JPEG, ours and the peers', at 4:2:0
SPLIT = "train"


def read_pixels(split: Split, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The images of an npy split: uint8 [samples, H, W, 3]."""
    view, rows = split.pixel_rows()
    return view[rows[start:stop]].reshape(-1, *(split.image_shape or ()))


def limited_batch_size(folder: Path, most: int, batches: int = 8) -> int:
    """A batch of `most` images, or of fewer where the data set would not have so many batches."""
    return min(most, len(open_split(folder, SPLIT)) // batches)


@dataclass
class RepeatedRows:
    """`samples` rows of a converted npy split, as a source of another conversion; from the start again where it
    ends."""

    folder: Path
    samples: int
    labels: np.ndarray | None = field(init=False)
    bytes_per_row: int = field(init=False)

    def __post_init__(self) -> None:
        split = open_split(self.folder, SPLIT)
        labels = np.zeros(len(split), np.int64) if split.labels is None else split.labels
        self.labels = labels[np.arange(self.samples) % len(split)]
        self.bytes_per_row = int(split.size[0])

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
    """Write the train split of an npy data set once more, as `out`, with a shard for every core at least.

    size: side in pixels, resized where it is not the stored one; samples: how many, None: all. A set that is there
    already is taken as it is.
    """
    if (out / "dataset.json").is_file():
        return out
    dataset: dict[str, Any] = load_dataset(folder)
    samples = samples or dataset["splits"][SPLIT]["samples"]
    rows = RepeatedRows(folder, samples)
    source = Source("benchmark", dataset["name"], tuple(dataset["classes"]), fingerprint(dataset), {SPLIT: rows})
    cores = len(os.sched_getaffinity(0))
    side = size or dataset["image_shape"][0]
    shard_mib = max(1, min(512, samples * side * side * 3 // 2**20 // cores // (5 if encoding == "jpeg" else 1)))
    how = Encoding(name=encoding, quality=QUALITY, size=size)  # type: ignore[arg-type]
    write_dataset(source, out, Options(how, shard_mib=shard_mib), cores, dataset["name"])
    return out
