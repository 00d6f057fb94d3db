"""Numba kernels that run augmentation programs (see `augment.ops`) and paint rectangles, in place.

All operations of an image run while the image is in the cache. The result depends only on the image and its program,
not on the batch, the thread or the CPU.
"""

from __future__ import annotations

import math

import numpy as np

from pipelines.augment.ops import Op
from pipelines.cpu import color
from pipelines.cpu.byte_intrinsics import copy_bytes
from pipelines.cpu.filters import blur, sharpness
from pipelines.cpu.float_intrinsics import LANES
from pipelines.cpu.geometry import warp
from pipelines.cpu.jit import kernel


@kernel
def apply_programs(
    images: np.ndarray, ops: np.ndarray, values: np.ndarray, bilinear: bool, fill: np.ndarray, radius: int
) -> None:
    """Run the program of each image in place.

    Args:
        images: uint8 [B, size, size, 3], contiguous.
        ops, values: int32 and float32 [B, slots].
        bilinear, fill, radius: See `ops.Programs`. `fill` is uint8 [3] here.
    """
    side = images.shape[1]
    scratch = np.empty((side + 2 + 2 * radius) * (side + 2) * 3 + LANES, np.uint8)
    planes = np.empty((3, color.BLOCK), np.uint8)
    for sample in range(len(images)):
        image = images[sample].reshape(-1)
        for slot in range(ops.shape[1]):
            op, value = ops[sample, slot], values[sample, slot]
            if op == Op.IDENTITY:
                continue
            if op <= Op.ROTATE:  # GEOMETRIC
                warp(image, side, op, value, bilinear, fill, scratch)
            elif op == Op.BRIGHTNESS:
                color.brightness(image, value)
            elif op == Op.COLOR:
                color.saturation(image, value, planes)
            elif op == Op.CONTRAST:
                color.contrast(image, value, planes)
            elif op == Op.SHARPNESS:
                sharpness(image, side, value, scratch)
            elif op == Op.POSTERIZE:
                color.posterize(image, int(value))
            elif op == Op.SOLARIZE:
                color.solarize(image, math.ceil(value))
            elif op == Op.SOLARIZE_ADD:
                color.solarize_add(image, int(value))
            elif op == Op.AUTO_CONTRAST:
                color.auto_contrast(image, side)
            elif op == Op.EQUALIZE:
                color.equalize(image)
            elif op == Op.INVERT:
                color.invert(image)
            elif op == Op.HUE:
                color.hue(image, value, planes)
            elif op == Op.GRAYSCALE:
                color.grayscale(image, planes)
            elif op == Op.BLUR:
                blur(image, side, value, radius, scratch)


@kernel
def paint(images: np.ndarray, boxes: np.ndarray, colors: np.ndarray) -> None:
    """Fill one rectangle of each image with one color.

    Args:
        images: uint8 [B, size, size, 3], contiguous.
        boxes: int32 [B, 4], top, left, height and width in pixels. Boxes are clipped to the image; a height or width of
            0 paints nothing.
        colors: uint8 [B, 3].
    """
    size = images.shape[1]
    target, palette = images.reshape(-1), colors.reshape(-1)
    for sample in range(len(images)):
        top, left = max(boxes[sample, 0], 0), max(boxes[sample, 1], 0)
        bottom = min(boxes[sample, 0] + boxes[sample, 2], size)
        right = min(boxes[sample, 1] + boxes[sample, 3], size)
        if bottom <= top or right <= left:
            continue
        first = ((sample * size + top) * size + left) * 3
        for x in range(right - left):
            copy_bytes(target, first + x * 3, palette, sample * 3, 3)
        for y in range(1, bottom - top):
            copy_bytes(target, first + y * size * 3, target, first, (right - left) * 3)
