"""Draw the random geometry of each sample: crop boxes, flips, cutout squares and erased rectangles."""

from __future__ import annotations

import numpy as np

from pipelines.rng import normal, uniform

Range = tuple[float, float]


def flips(samples: np.ndarray, seed: int, epoch: int, probability: float) -> np.ndarray:
    """Draw horizontal flips: int32 [B], 1 for a flipped sample, otherwise 0."""
    return (uniform(samples, seed, epoch, "flip", 1)[:, 0] < probability).astype(np.int32)


def alternating_flips(samples: np.ndarray, seed: int, epoch: int, probability: float) -> np.ndarray:
    """Draw one flip per sample for all epochs and invert it in odd epochs: int32 [B], 1 for a flip, otherwise 0.

    Two consecutive epochs always show both an image and its mirror image. Source: Jordan, "94% on CIFAR-10 in 3.29
    Seconds on a Single GPU", arXiv:2404.00498.
    """
    return flips(samples, seed, 0, probability) ^ np.int32(epoch % 2)


def pad_crop_offsets(samples: np.ndarray, seed: int, epoch: int, padding: int) -> np.ndarray:
    """Draw the top-left corners of image-sized crops from images padded by `padding` pixels on each side.

    Returns:
        int32 [B, 2] (y, x), from -padding to padding, relative to the unpadded image.
    """
    drawn = uniform(samples, seed, epoch, "pad-crop", 2)
    return (np.floor(drawn * (2 * padding + 1)) - padding).astype(np.int32)


def cutout_corners(samples: np.ndarray, seed: int, epoch: int, size: int, cutout: int) -> np.ndarray:
    """Draw the top-left corners (y, x) of squares inside images: int32 [B, 2].

    `size` is the height and width of the images in pixels, and `cutout` that of the squares.
    """
    drawn = uniform(samples, seed, epoch, "cutout", 2)
    return np.floor(drawn * (size - cutout + 1)).astype(np.int32)


def random_resized_crops(
    samples: np.ndarray, seed: int, epoch: int, heights: np.ndarray, widths: np.ndarray, scale: Range, ratio: Range
) -> np.ndarray:
    """Draw crop boxes like torchvision's RandomResizedCrop.

    Each of up to ten attempts draws an area and an aspect ratio, and the first box that fits into the image is used. If
    no box fits, the crop is the largest central box within the bounds of `ratio`.

    Args:
        samples: Sample indices, int64 [B].
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        heights, widths: Size of each image, pixels, int [B].
        scale: Bounds of the box's area as a share of the image's area; the distribution is uniform.
        ratio: Bounds of width / height; the distribution is log-uniform.

    Returns:
        int32 [B, 4]: top, left, height and width of each box, pixels.
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
        # torchvision rounds the box of a one-pixel line to an empty box; keep one pixel
        fallback_width = np.where(whole > ratio[1], np.maximum(np.rint(heights * ratio[1]), 1), widths)
        fallback_height = np.where(whole < ratio[0], np.maximum(np.rint(widths / ratio[0]), 1), heights)
        box_height = np.where(found, box_height, fallback_height)
        box_width = np.where(found, box_width, fallback_width)
        top = np.where(found, top, (heights - fallback_height) // 2)
        left = np.where(found, left, (widths - fallback_width) // 2)
    return np.stack([top, left, box_height, box_width], axis=1).astype(np.int32)


def erase_boxes(
    samples: np.ndarray, seed: int, epoch: int, size: int, probability: float, scale: Range, ratio: Range
) -> np.ndarray:
    """Draw boxes to erase like torchvision's RandomErasing.

    Each of up to ten attempts draws an area and an aspect ratio. The first box that is smaller than the image in both
    dimensions is used. The sample is not erased if there is no such box, or if this box is empty after rounding.

    Args:
        samples: Sample indices, int64 [B].
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        size: Height and width of the images, pixels.
        probability: Probability that boxes are drawn for a sample.
        scale: Bounds of the box's area as a share of the image's area; the distribution is uniform.
        ratio: Bounds of height / width; the distribution is log-uniform.

    Returns:
        int32 [B, 4]: top, left, height and width of each box, pixels. A row of zeros erases nothing.
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
    # a box smaller than one pixel rounds to an empty box, and no further attempt is made
    erased = fits.any(axis=1) & (height > 0) & (width > 0)
    boxes[rows] = np.where(erased[:, None], np.stack([top, left, height, width], axis=1), 0)
    return boxes


def erase_colors(
    samples: np.ndarray, seed: int, epoch: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """Draw normally distributed RGB colors, clipped to 0..255: uint8 [B, 3].

    `mean` and `std` are per channel, for pixels scaled to 0..1.
    """
    drawn = normal(samples, seed, epoch, "erase-color", 3)
    colors = 255.0 * (np.array(mean) + np.array(std) * drawn)
    return np.clip(np.rint(colors), 0, 255).astype(np.uint8)
