"""HDF5 files in MediumImageNet's layout, and their conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tools import convert

Storage = dict[str, Any]  # options of h5py's create_dataset


def random_images(rows: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Return pixels, uint8 [rows, height, width, 3], with other mean and spread in each channel."""
    values = np.random.default_rng(seed).normal((90, 120, 150), (30, 40, 50), (rows, height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8) // 4 * 4


def arranged(images: np.ndarray, layout: str) -> np.ndarray:
    """Return images as a file stores them: "channels first", "channels last" or "greyscale"."""
    if layout == "greyscale":
        return images[..., 0]
    return images.transpose(0, 3, 1, 2) if layout == "channels first" else images


def write_hdf5(
    path: Path,
    layout: str = "channels first",
    storage: Storage | None = None,
    rows: tuple[int, int, int] = (200, 60, 30),
    side: int = 32,
    classes: int = 4,
) -> Path:
    """Write a file with splits train, val and test, of which test has no labels."""
    with h5py.File(path, "w") as file:
        for number, (split, count) in enumerate(zip(("train", "val", "test"), rows, strict=True)):
            images = arranged(random_images(count, side, side, seed=number), layout)
            file.create_dataset(f"images-{split}", data=images, **(storage or {}))
            if split != "test":
                file[f"labels-{split}"] = np.arange(count) * 7 % classes
    return path


def converted(path: Path, *options: str) -> Path:
    """Convert a file with the given options and return the folder."""
    out = path.with_name(f"{path.stem}-converted")
    assert convert.main(["hdf5", "--source", str(path), "--out", str(out), *options]) == 0
    return out
