"""The random numbers of one sample in one epoch, and what they mean: crop boxes, flips, cutout. Plain NumPy.

A counter-based generator: every draw is a hash of (seed, epoch, sample index, draw number), so no draw depends on the
batch, the rank, the number of workers or what was drawn before. Knows no images and no DALI.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def hash64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(_GOLDEN)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=64)  # asked for in every batch: three hashes of one number each take longer than those of 512
def stream(seed: int, epoch: int, purpose: str) -> np.uint64:
    """The 64-bit key of one stream of draws; each purpose has its own, so adding one never changes another."""
    key = np.uint64(0)
    for part in (seed, epoch, zlib.crc32(purpose.encode())):
        key = hash64(np.array([int(key) ^ (part & _MASK)], np.uint64))[0]
    return key


def uniform(samples: np.ndarray, seed: int, epoch: int, purpose: str, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [len(samples), draws], for sample indices `samples`."""
    base = hash64(samples.astype(np.uint64) ^ stream(seed, epoch, purpose))
    counter = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (hash64(base[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def normal(samples: np.ndarray, seed: int, epoch: int, purpose: str, draws: int) -> np.ndarray:
    """Normally distributed numbers of mean 0 and deviation 1, float64 [len(samples), draws].

    Source: Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958, two uniform draws for each.
    """
    drawn = uniform(samples, seed, epoch, purpose, 2 * draws)
    radius = np.sqrt(-2.0 * np.log1p(-drawn[:, :draws]))  # of 1 - u, which is never 0
    return radius * np.cos(2.0 * np.pi * drawn[:, draws:])


def flips(samples: np.ndarray, seed: int, epoch: int, probability: float) -> np.ndarray:
    """Whether each sample is mirrored: int32 [B] of 0 and 1."""
    return (uniform(samples, seed, epoch, "flip", 1)[:, 0] < probability).astype(np.int32)


def alternating_flips(samples: np.ndarray, seed: int, epoch: int, probability: float) -> np.ndarray:
    """Whether each sample is mirrored: drawn once per sample, the opposite in every other epoch: int32 [B] of 0 and 1.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498: two epochs in a row show both
    an image and its mirror image.
    """
    return flips(samples, seed, 0, probability) ^ np.int32(epoch % 2)


def pad_crop_offsets(samples: np.ndarray, seed: int, epoch: int, padding: int) -> np.ndarray:
    """Top-left corners (y, x) of crops from images padded on all sides: int32 [B, 2] in -padding..padding."""
    drawn = uniform(samples, seed, epoch, "pad-crop", 2)
    return (np.floor(drawn * (2 * padding + 1)) - padding).astype(np.int32)


def cutout_corners(samples: np.ndarray, seed: int, epoch: int, size: int, cutout: int) -> np.ndarray:
    """Top-left corners (y, x) of squares of side `cutout` inside images of side `size`: int32 [B, 2]."""
    drawn = uniform(samples, seed, epoch, "cutout", 2)
    return np.floor(drawn * (size - cutout + 1)).astype(np.int32)


def random_resized_crops(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Crop boxes (top, left, height, width) in pixels, int32 [B, 4], as torchvision's RandomResizedCrop draws them.

    Ten attempts at an area (share `scale` of the image) and an aspect ratio (log-uniform in `ratio`); the first box
    that fits is taken, else the largest central box within the ratio bounds.
    """
    attempts = 10
    drawn = uniform(samples, seed, epoch, "random-resized-crop", 2 * attempts + 2)
    heights, widths = heights.astype(np.float64)[:, None], widths.astype(np.float64)[:, None]
    area = heights * widths * (scale[0] + drawn[:, :attempts] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + drawn[:, attempts : 2 * attempts] * (high - low))
    box_widths, box_heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights)
    first = np.argmax(fits, axis=1)[:, None]
    box_height = np.take_along_axis(box_heights, first, 1)[:, 0]
    box_width = np.take_along_axis(box_widths, first, 1)[:, 0]
    heights, widths = heights[:, 0], widths[:, 0]
    top = np.floor(drawn[:, -2] * (heights - box_height + 1))
    left = np.floor(drawn[:, -1] * (widths - box_width + 1))
    if not (found := fits.any(axis=1)).all():
        whole = widths / heights
        # torchvision's box of a line of pixels can round to nothing; ours keeps one
        fallback_width = np.where(whole > ratio[1], np.maximum(np.rint(heights * ratio[1]), 1), widths)
        fallback_height = np.where(whole < ratio[0], np.maximum(np.rint(widths / ratio[0]), 1), heights)
        box_height = np.where(found, box_height, fallback_height)
        box_width = np.where(found, box_width, fallback_width)
        top = np.where(found, top, (heights - fallback_height) // 2)
        left = np.where(found, left, (widths - fallback_width) // 2)
    return np.stack([top, left, box_height, box_width], axis=1).astype(np.int32)
