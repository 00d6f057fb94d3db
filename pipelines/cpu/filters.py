"""Numba kernels that filter one image: sharpness and Gaussian blur.

Common arguments:
    image: uint8 [side * side * 3], changed in place.
    side: Height and width of the image, pixels.
    scratch: uint8 [bytes], overwritten.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, int32, uint8, uint16

from pipelines.cpu.byte_intrinsics import copy_bytes
from pipelines.cpu.float_intrinsics import LANES, blur_across, blur_down, fused
from pipelines.cpu.jit import kernel

ZERO, WHITE = float32(0), float32(255)
NEGLIGIBLE = 2.0**-18  # weight of a tap that changes a pixel by less than 0.001 gray levels


@kernel
def sharpness(image: np.ndarray, side: int, factor: float, scratch: np.ndarray) -> None:
    """Sharpen like torchvision's adjust_sharpness.

    The image is blended with its 3x3 weighted mean, in which the center has weight 5 and the other eight pixels have
    weight 1. Edge pixels are unchanged. `scratch` needs at least image.size bytes.
    """
    if side <= 2:
        return
    row = side * 3
    copy_bytes(scratch, 0, image, 0, len(image))
    sums = np.empty(row, np.uint16)  # sums of three pixels in a column
    rest = float32(1.0 - factor)
    for y in range(1, side - 1):
        start = y * row
        above, here = scratch[start - row : start], scratch[start : start + row]
        below = scratch[start + row : start + 2 * row]
        for i in range(row):
            sums[i] = uint16(above[i]) + uint16(here[i]) + uint16(below[i])
        left, middle, right = sums[: row - 6], sums[3 : row - 3], sums[6:]
        inner, target = here[3 : row - 3], image[start + 3 : start + row - 3]
        for i in range(row - 6):
            level = int32(inner[i])
            total = int32(left[i]) + int32(middle[i]) + int32(right[i]) + 4 * level
            mean = ((total + 6) * 5042) >> 16  # divide by 13 and round; exact for all totals up to 13 * 255
            value = fused(float32(mean - level), rest, float32(level))
            target[i] = uint8(int32(min(max(value, ZERO), WHITE)))


@kernel
def blur(image: np.ndarray, side: int, sigma: float, radius: int, scratch: np.ndarray) -> None:
    """Blur like torchvision's gaussian_blur with a kernel of 2 * radius + 1 pixels and reflected edges.

    For each row, the vertical pass writes a float32 line that the horizontal pass reads, so each pixel is rounded once.
    Outer taps with weights up to NEGLIGIBLE are skipped. `sigma` is the standard deviation in pixels. `scratch` needs
    at least image.size + 2 * radius * side * 3 + LANES bytes.
    """
    weights = np.empty(radius + 1, np.float32)
    total = 1.0
    for tap in range(1, radius + 1):
        total += 2 * math.exp(-0.5 * (tap / sigma) ** 2)
    reach = 0
    for tap in range(radius + 1):
        weight = math.exp(-0.5 * (tap / sigma) ** 2) / total
        weights[tap] = weight
        if weight > NEGLIGIBLE:
            reach = tap
    if reach == 0:
        return

    row = side * 3
    for y in range(-reach, side + reach):
        copy_bytes(scratch, (y + reach) * row, image, reflect_index(y, side) * row, row)
    line = np.zeros((side + 2 * reach) * 3 + LANES, np.float32)
    out = np.empty(row + LANES, np.uint8)
    edge = reach * 3
    for y in range(side):
        for i in range(0, row, LANES):
            blur_down(line, edge + i, scratch, (y + reach) * row + i, row, weights, reach)
        for x in range(1, reach + 1):
            left, right = edge + reflect_index(-x, side) * 3, edge + reflect_index(side - 1 + x, side) * 3
            for channel in range(3):
                line[edge - 3 * x + channel] = line[left + channel]
                line[edge + row - 3 + 3 * x + channel] = line[right + channel]
        for i in range(0, row, LANES):
            blur_across(out, i, line, edge + i, weights, reach)
        copy_bytes(image, y * row, out, 0, row)


@kernel
def reflect_index(position: int, length: int) -> int:
    """Reflect a position at the edges until it is in 0..length - 1. The edge pixels themselves are not repeated."""
    if length == 1:
        return 0
    while position < 0 or position >= length:
        position = -position if position < 0 else 2 * (length - 1) - position
    return position
