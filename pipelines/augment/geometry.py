"""Draws which rectangles random erasing paints over, and in which colours. Plain NumPy; knows no images and no DALI."""

from __future__ import annotations

import numpy as np

from pipelines.rng import normal, uniform


def erase_boxes(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    size: int,
    probability: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Boxes (top, left, height, width) in pixels of images of side `size`, int32 [B, 4]; all 0: nothing is erased.

    As torchvision's RandomErasing draws them: ten attempts at an area (share `scale` of the image) and a height / width
    (log-uniform in `ratio`); the first box that is smaller than the image is taken, or none.
    """
    boxes = np.zeros((len(samples), 4), np.int32)
    rows = np.flatnonzero(uniform(samples, seed, epoch, "erase", 1)[:, 0] < probability)
    attempts = 10
    drawn = uniform(samples[rows], seed, epoch, "erase-box", 2 * attempts + 2)
    area = size * size * (scale[0] + drawn[:, :attempts] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + drawn[:, attempts : 2 * attempts] * (high - low))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)
    first = np.argmax(fits, axis=1)[:, None]
    height, width = np.take_along_axis(heights, first, 1)[:, 0], np.take_along_axis(widths, first, 1)[:, 0]
    top = np.floor(drawn[:, -2] * (size - height + 1))
    left = np.floor(drawn[:, -1] * (size - width + 1))
    # a box of a fraction of a pixel rounds to nothing, and is drawn all the same
    erased = fits.any(axis=1) & (height > 0) & (width > 0)
    boxes[rows] = np.where(erased[:, None], np.stack([top, left, height, width], axis=1), 0)
    return boxes


def erase_colors(
    samples: np.ndarray, seed: int, epoch: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """Colours of the rectangles, uint8 [B, 3], normally distributed; mean and standard deviation are shares of 255."""
    drawn = normal(samples, seed, epoch, "erase-color", 3)
    colors = 255.0 * (np.array(mean) + np.array(std) * drawn)
    return np.clip(np.rint(colors), 0, 255).astype(np.uint8)
