"""Provide scikit-learn's handwritten digits as 32x32 RGB images, for tests and first runs without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipelines.convert.source import Source, SplitSource

SIZE = 32  # pixels; the image size that LeNet and models for CIFAR expect
VAL_FRACTION = 0.2


class DigitsSplit:
    """One split of the digits.

    Args:
        images: Images of the split, uint8 [rows, 32, 32, 3].
        labels: Label of each image, int64 [rows].
        rows: Row of each image in scikit-learn's data set, int64 [rows].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        self._images, self._rows = images, rows
        self.labels: np.ndarray | None = labels
        self.bytes_per_row = SIZE * SIZE * 3

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the images from `start` up to `stop` (exclusive), uint8 [32, 32, 3]."""
        yield from self._images[start:stop]

    def describe(self, row: int) -> str:
        return f"digits[{self._rows[row]}]"


def open_digits() -> Source:
    """Open all 1,797 digits: 80 % in train and 20 % in val, stratified by class with a fixed seed."""
    from sklearn.datasets import load_digits  # deferred: importing takes half a second
    from sklearn.model_selection import train_test_split

    grey, numbers = load_digits(return_X_y=True)  # [1797, 64], 0..16
    labels = numbers.astype(np.int64)
    images = np.stack([_enlarge(values.reshape(8, 8)) for values in grey])
    train, val = train_test_split(np.arange(len(labels)), test_size=VAL_FRACTION, stratify=labels, random_state=0)
    splits: dict[str, SplitSource] = {}
    for name, rows in (("train", np.sort(train)), ("val", np.sort(val))):
        splits[name] = DigitsSplit(images[rows], labels[rows], rows)
    content = hashlib.sha256(images.tobytes() + labels.tobytes() + np.sort(val).tobytes())
    return Source(
        kind="digits",
        name="sklearn.datasets.load_digits",
        classes=tuple(str(digit) for digit in range(10)),
        fingerprint=content.hexdigest(),
        splits=splits,
    )


def _enlarge(values: np.ndarray) -> np.ndarray:
    """Resize an 8x8 image with values from 0 to 16, and convert it to RGB, uint8 [32, 32, 3]."""
    grey = Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))
