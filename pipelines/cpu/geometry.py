"""Numba kernels that warp one image: shear, translate and rotate, like torchvision's affine and rotate.

Each operation maps a target pixel (x, y) to a source position (across[0] * x + across[1] * y + across[2],
down[0] * x + down[1] * y + down[2]) in pixels. Positions are fixed-point numbers with FRACTION fractional bits, so
the additions along a row are exact.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, int32, uint8

from pipelines.augment.ops import Op
from pipelines.cpu.byte_intrinsics import copy_bytes, copy_four
from pipelines.cpu.float_intrinsics import fused, mix_four_pixels
from pipelines.cpu.jit import kernel

FRACTION = 32
ONE, HALF = 1 << FRACTION, 1 << (FRACTION - 1)
ROUND = float32(2**23)  # adding and subtracting it rounds to the nearest integer


@kernel
def warp(
    image: np.ndarray, side: int, op: int, value: float, bilinear: bool, fill: np.ndarray, scratch: np.ndarray
) -> None:
    """Apply one operation of `ops.GEOMETRIC` in place.

    Args:
        image: uint8 [side * side * 3].
        side: Height and width, pixels.
        op, value: See `ops.Op`.
        bilinear: Whether to interpolate between pixels instead of taking the nearest one.
        fill: uint8 [3], color outside the image.
        scratch: uint8, overwritten, at least (side + 2) ** 2 * 3 + 4 bytes.
    """
    across, down = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    if op == Op.SHEAR_X:
        across = (1.0, value, value / 2)
    elif op == Op.SHEAR_Y:
        down = (value, 1.0, value / 2)
    elif op == Op.TRANSLATE_X:
        across = (1.0, 0.0, -value)
    elif op == Op.TRANSLATE_Y:
        down = (0.0, 1.0, -value)
    else:
        cosine, sine = math.cos(math.radians(value)), math.sin(math.radians(value))
        middle = (side - 1) / 2
        across = (cosine, -sine, middle * (1 - cosine + sine))
        down = (sine, cosine, middle * (1 - cosine - sine))
    _frame(image, side, fill, scratch)
    _resample(image, side, _fixed(across), _fixed(down), bilinear, scratch)


@kernel
def _fixed(coefficients: tuple[float, float, float]) -> tuple[int, int, int]:
    first, second, third = coefficients
    return math.floor(first * ONE + 0.5), math.floor(second * ONE + 0.5), math.floor(third * ONE + 0.5)


@kernel
def _frame(image: np.ndarray, side: int, fill: np.ndarray, framed: np.ndarray) -> None:
    """Copy the image to `framed` with a one-pixel border of `fill`."""
    row = (side + 2) * 3
    for i in range(0, row, 3):
        copy_bytes(framed, i, fill, 0, 3)
    copy_bytes(framed, (side + 1) * row, framed, 0, row)
    for y in range(side):
        at = (y + 1) * row
        copy_bytes(framed, at, fill, 0, 3)
        copy_bytes(framed, at + 3, image, y * side * 3, side * 3)
        copy_bytes(framed, at + row - 3, fill, 0, 3)


@kernel
def _resample(
    image: np.ndarray,
    side: int,
    across: tuple[int, int, int],
    down: tuple[int, int, int],
    bilinear: bool,
    framed: np.ndarray,
) -> None:
    row = (side + 2) * 3
    shifts = across[0] == ONE and down[0] == 0 and down[1] == ONE  # each row maps to one source row
    for y in range(side):
        # u, v: position of the first pixel in `framed`, rounded down; positions 0 and side + 1 are fill
        u, v = across[1] * y + across[2] + ONE, down[1] * y + down[2] + ONE
        if not bilinear:
            u, v = u + HALF, v + HALF
        at = y * side * 3
        if shifts:
            begin = min(max(v >> FRACTION, 0), side + 1) * row
            _shift_row(image, at, side, framed, begin, u >> FRACTION, _share(u) if bilinear else float32(0))
        elif bilinear:
            _bilinear_row(image, at, side, framed, u, v, across[0], down[0])
        else:
            _nearest_row(image, at, side, framed, u, v, across[0], down[0])


@kernel
def _share(place: int) -> float:
    """Return the fractional part of a fixed-point position as float32. It is the weight of the next pixel."""
    return float32(int32((place & (ONE - 1)) >> (FRACTION - 24))) * float32(2**-24)


@kernel
def _shift_row(
    image: np.ndarray, at: int, side: int, framed: np.ndarray, begin: int, column: int, share: float
) -> None:
    """Write one row of a horizontally shifted image.

    Args:
        image: uint8, flat, the image to write.
        at: Byte offset of the row in `image`.
        side: Height and width of the image, pixels.
        framed: Result of `_frame`.
        begin: Byte offset of the source row in `framed`.
        column: Pixel of the source row that becomes the first pixel. It can be outside the row.
        share: Weight of the next pixel, 0 to 1.
    """
    first = min(max(-column, 0), side)
    stop = min(max(side + 1 - column, first), side)
    for x in range(first):
        copy_bytes(image, at + 3 * x, framed, 0, 3)
    for x in range(stop, side):
        copy_bytes(image, at + 3 * x, framed, 0, 3)
    count = (stop - first) * 3
    at, begin = at + first * 3, begin + (column + first) * 3
    if share == 0:
        copy_bytes(image, at, framed, begin, count)
        return
    target, here, behind = image[at : at + count], framed[begin : begin + count], framed[begin + 3 : begin + 3 + count]
    for i in range(count):
        level = float32(here[i])
        target[i] = uint8(int32(fused(float32(behind[i]) - level, share, level) + ROUND - ROUND))


# The next two kernels write four bytes per pixel, and the next pixel overwrites the fourth byte. The last pixel of a
# row is written separately, since its fourth byte would be outside the row.


@kernel
def _bilinear_row(
    image: np.ndarray, at: int, side: int, framed: np.ndarray, u: int, v: int, step_u: int, step_v: int
) -> None:
    row, end = (side + 2) * 3, ((side + 1) << FRACTION) - 1
    for x in range(side - 1):
        left, top = min(max(u, 0), end), min(max(v, 0), end)
        begin = (top >> FRACTION) * row + (left >> FRACTION) * 3
        mix_four_pixels(image, at + 3 * x, framed, begin, begin + row, _share(left), _share(top))
        u += step_u
        v += step_v
    left, top = min(max(u, 0), end), min(max(v, 0), end)
    begin, spare = (top >> FRACTION) * row + (left >> FRACTION) * 3, (side + 2) * row
    mix_four_pixels(framed, spare, framed, begin, begin + row, _share(left), _share(top))
    copy_bytes(image, at + 3 * side - 3, framed, spare, 3)


@kernel
def _nearest_row(
    image: np.ndarray, at: int, side: int, framed: np.ndarray, u: int, v: int, step_u: int, step_v: int
) -> None:
    row, end = (side + 2) * 3, (side + 2) << FRACTION
    end_u, end_v = u + step_u * (side - 1), v + step_v * (side - 1)
    if min(u, v, end_u, end_v) >= 0 and max(u, v, end_u, end_v) < end:  # then all positions between are inside as well
        for x in range(side - 1):
            copy_four(image, at + 3 * x, framed, (v >> FRACTION) * row + (u >> FRACTION) * 3)
            u += step_u
            v += step_v
    else:
        for x in range(side - 1):
            column, above = min(max(u >> FRACTION, 0), side + 1), min(max(v >> FRACTION, 0), side + 1)
            copy_four(image, at + 3 * x, framed, above * row + column * 3)
            u += step_u
            v += step_v
    column, above = min(max(u >> FRACTION, 0), side + 1), min(max(v >> FRACTION, 0), side + 1)
    copy_bytes(image, at + 3 * side - 3, framed, above * row + column * 3, 3)
