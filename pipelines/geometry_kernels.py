"""Loops that move the pixels of one image: shear, shift and rotate, a part of `program_kernels`.

Every operation is one map from a target pixel (x, y) to a place in the source, (across[0] * x + across[1] * y +
across[2], down[0] * x + down[1] * y + down[2]) in pixels, in integers with FRACTION bits behind the point: no rounding
adds up along a row. Sources: torchvision's affine and rotate.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, int32

from pipelines.kernels import kernel
from pipelines.ops import Op
from pipelines.vector_ops import copy_bytes, copy_four, mix_four_pixels

FRACTION = 32
ONE, HALF = 1 << FRACTION, 1 << (FRACTION - 1)
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = (int(op) for op in (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y))


@kernel
def move(
    image: np.ndarray, side: int, op: int, value: float, bilinear: bool, fill: np.ndarray, scratch: np.ndarray
) -> None:
    """One operation of GEOMETRIC. image: uint8 [side * side * 3], changed in place; fill: uint8 [3], outside of it.

    scratch: uint8, at least (side + 2) ** 2 * 3 + 1.
    """
    across, down = np.zeros(3), np.zeros(3)
    across[0] = down[1] = 1.0
    if op == SHEAR_X:
        across[1], across[2] = value, value / 2
    elif op == SHEAR_Y:
        down[0], down[2] = value, value / 2
    elif op == TRANSLATE_X:
        across[2] = -value
    elif op == TRANSLATE_Y:
        down[2] = -value
    else:
        cosine, sine = math.cos(math.radians(value)), math.sin(math.radians(value))
        middle = (side - 1) / 2
        across[0], across[1], across[2] = cosine, -sine, middle * (1 - cosine + sine)
        down[0], down[1], down[2] = sine, cosine, middle * (1 - cosine - sine)
    _frame(image, side, fill, scratch)
    _resample(image, side, _fixed(across), _fixed(down), bilinear, scratch)


@kernel
def _fixed(coefficients: np.ndarray) -> np.ndarray:
    fixed = np.empty(3, np.int64)
    for i in range(3):
        fixed[i] = int(math.floor(coefficients[i] * ONE + 0.5))
    return fixed


@kernel
def _frame(image: np.ndarray, side: int, fill: np.ndarray, framed: np.ndarray) -> None:
    """framed = the image with one pixel of fill on all sides."""
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
    image: np.ndarray, side: int, across: np.ndarray, down: np.ndarray, bilinear: bool, framed: np.ndarray
) -> None:
    row, last = (side + 2) * 3, side << FRACTION
    line = np.empty(side * 3 + 1, np.uint8)  # with room for the fourth byte of the last pixel
    step_x, step_y = across[0], down[0]
    for y in range(side):
        u, v = across[1] * y + across[2], down[1] * y + down[2]
        if bilinear:
            for x in range(side):
                # A pixel of the frame is where everything further outside is taken from; it stands at -1 and side.
                left, top = min(max(u, -ONE), last - 1) + ONE, min(max(v, -ONE), last - 1) + ONE
                begin = (top >> FRACTION) * row + (left >> FRACTION) * 3
                right_share = float32(int32((left & (ONE - 1)) >> 8)) * float32(2**-24)
                lower_share = float32(int32((top & (ONE - 1)) >> 8)) * float32(2**-24)
                mix_four_pixels(line, 3 * x, framed, begin, begin + row, right_share, lower_share)
                u += step_x
                v += step_y
        else:
            u += HALF + ONE
            v += HALF + ONE
            for x in range(side):
                column, line_above = min(max(u >> FRACTION, 0), side + 1), min(max(v >> FRACTION, 0), side + 1)
                copy_four(line, 3 * x, framed, line_above * row + column * 3)
                u += step_x
                v += step_y
        copy_bytes(image, y * side * 3, line, 0, side * 3)
