"""Crops of scikit-learn's photographs, and data sets of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from helpers.memory_source import MemoryRows, memory_source, write
from pipelines.convert.source import Encoding

BATCH = 12


def photos(height: int, width: int, count: int = BATCH) -> list[np.ndarray]:
    """Return crops of scikit-learn's two photographs, alternating: uint8 [H, W, 3]."""
    whole = load_sample_images().images
    random = np.random.default_rng(0)
    parts = []
    for number in range(count):
        photo = whole[number % len(whole)]
        top, left = random.integers(0, photo.shape[0] - height + 1), random.integers(0, photo.shape[1] - width + 1)
        parts.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return parts


def converted(folder: Path, images: list[np.ndarray], encoding: str) -> Path:
    rows = MemoryRows([*images])
    write(memory_source(train=rows, val=rows), folder, Encoding(encoding))  # type: ignore[arg-type]
    return folder
