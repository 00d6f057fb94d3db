"""Write variants of a data set that differ in encoding, image size, number of samples or number of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.open import load_dataset, open_split
from pipelines.storage.dataset import fingerprint
from pipelines.storage.split import Split

QUALITY = 95  # JPEG quality for all candidates, with 4:2:0 chroma subsampling
SPLIT = "train"
JPEG_RATIO, FULL_SIZE_JPEG_RATIO = 5, 12  # approximate size of raw pixels divided by that of a JPEG file
GRAIN = 3.0  # standard deviation of the grain of enlarged images


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
    step: int = 1  # every `step`-th sample is read

    def __len__(self) -> int:
        return self.samples

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        split = open_split(self.folder, SPLIT)
        view, rows = split.pixel_rows()
        for row in range(start, stop):
            yield view[rows[row * self.step % len(split)]].reshape(split.image_shape or ())

    def describe(self, row: int) -> str:
        return f"{self.folder}, row {row}"


@dataclass
class EnlargedRows(RepeatedRows):
    """Like `RepeatedRows`, but enlarged to `size` (width, height) by bicubic interpolation, with grain.

    Enlarged images are smooth, so their JPEG files would be small and fast to decode. Grain of GRAIN gray levels
    (standard deviation), two pixels wide, makes the files about as large as photographs' at quality 95: 50 kB at
    500x375 and 170 kB at 1000x750 pixels, from images of 96x96.
    """

    size: tuple[int, int] = (500, 375)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        width, height = self.size
        grain = _grain(2 * width, 2 * height)
        for row, pixels in zip(range(start, stop), super().read(start, stop), strict=True):
            enlarged = np.asarray(Image.fromarray(np.asarray(pixels)).resize(self.size, Image.Resampling.BICUBIC))
            left, top = np.random.default_rng(row).integers(0, (width, height))
            grained = enlarged + grain[top : top + height, left : left + width, None]
            yield np.clip(grained, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _grain(width: int, height: int) -> np.ndarray:
    """Return smooth noise, int16 [height, width]."""
    noise = np.random.default_rng(0).normal(0, GRAIN, (height // 2, width // 2)).astype(np.float32)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.rint(np.asarray(smooth)).astype(np.int16)


def make_full_size(folder: Path, out: Path, *, size: tuple[int, int], samples: int) -> Path:
    """Write images of the train split of an npy data set, enlarged to `size` (width, height), as JPEG to `out`.

    Images are taken at regular intervals, so that all classes occur. If `out` already contains a data set, nothing is
    written.

    Returns:
        The path `out`.
    """
    if (out / "dataset.json").is_file():
        return out
    split = open_split(folder, SPLIT)
    step = max(1, len(split) // samples)
    labels = labels_or_zeros(split)[np.arange(samples) * step % len(split)]
    rows = EnlargedRows(folder, samples, labels, int(split.size[0]), step, size)
    return _convert(folder, rows, out, Encoding("jpeg", quality=QUALITY), size[0] * size[1] * 3 // FULL_SIZE_JPEG_RATIO)


def make_variant(
    folder: Path, out: Path, *, encoding: str = "npy", size: int | None = None, samples: int | None = None
) -> Path:
    """Write a variant of the train split of an npy data set to `out` and return its path.

    If `out` already contains a data set, nothing is written. The shard size, 1 to 512 MiB, is chosen so that there is
    at least two shards per core if possible.

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
    assert dataset.image_shape is not None  # always in npy
    side = size or dataset.image_shape[0]
    pixels = Encoding(name=encoding, quality=QUALITY, size=size)  # type: ignore[arg-type]
    return _convert(folder, rows, out, pixels, side * side * 3 // (JPEG_RATIO if encoding == "jpeg" else 1))


def _convert(folder: Path, rows: RepeatedRows, out: Path, encoding: Encoding, image_bytes: int) -> Path:
    """Convert rows to `out` and return its path. `image_bytes` is the approximate size of a stored image."""
    dataset, cores = load_dataset(folder), len(os.sched_getaffinity(0))
    source = Source("benchmark", dataset.name, dataset.classes, fingerprint(dataset), {SPLIT: rows})
    shard_mib = max(1, min(512, rows.samples * image_bytes // 2**20 // (2 * cores)))
    convert_source(source, out, Options(encoding, shard_mib=shard_mib), cores, dataset.name)
    return out
