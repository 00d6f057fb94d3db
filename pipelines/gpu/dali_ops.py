"""Operations of augmentation programs as DALI operators, matching torchvision's functional operations.

On a GPU each operator costs one or more launches, regardless of the number of samples, so each operation uses as few
operators as possible. The input `numbers` (see `dali_inputs.program_inputs`) holds the arguments of the operators. It
stays in host memory and does not need a launch. Most operations use coord_transform, which computes M @ pixel + T; a
uint8 result is rounded and saturated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug.core import augmentation, select
from nvidia.dali.data_node import DataNode

from pipelines.augment.ops import Programs
from pipelines.gpu.dali_inputs import SLACK, TRUNCATED, branches

UINT8 = types.DALIDataType.UINT8


def run_programs(
    images: DataNode, programs: Programs, size: int, chosen: DataNode | None, numbers: DataNode | None
) -> DataNode:
    """Run all slots of the programs.

    Args:
        images: Images, uint8 [size, size, 3] each.
        programs: Result of `build_programs`.
        size: Height and width of the images, pixels.
        chosen: Input `branches` of the graph, or None if the graph does not have this input.
        numbers: Input `numbers` of the graph, or None if the graph does not have this input.
    """
    for slot, allowed in enumerate(programs.slots):
        candidates = [BRANCHES[name] for name in branches(allowed)]
        number: Any = None  # a single branch is applied to all samples
        if chosen is not None and len(candidates) > 1:
            number = chosen[slot]
        images = select(candidates, number, images, numbers=numbers, slot=slot, programs=programs, size=size)
    return images


@augmentation
def identity(images: DataNode, _: None) -> DataNode:
    return images


@augmentation
def linear(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    """Apply an affine map to each pixel, for brightness, saturation, grayscale and inversion."""
    return fn.coord_transform(images, MT=numbers[slot, :, 0:4], dtype=UINT8)


@augmentation
def about_mean(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    """Add an affine map of the mean pixel to an affine map of each pixel, for contrast and operations of `linear`."""
    mean = fn.reductions.mean(images, axes=[0, 1], keep_dims=True)
    added = fn.coord_transform(mean, MT=numbers[slot, :, 4:8])
    return fn.cast(fn.coord_transform(images, MT=numbers[slot, :, 0:4]) + added, dtype=UINT8)


@augmentation
def affine(images: DataNode, _: None, numbers: DataNode, slot: int, programs: Programs) -> DataNode:
    """Shear, translate or rotate.

    DALI fills all channels with the same level, so a fill color with different levels is blended in through an alpha
    channel.
    """
    warp = partial(fn.warp_affine, matrix=numbers[slot, 0:2, 0:3], interp_type=_interpolation(programs))
    fill = np.array(programs.fill, np.float32)
    if len(set(programs.fill)) == 1:
        return warp(images, fill_value=float(fill[0]))
    opaque = fn.coord_transform(images, M=np.eye(4, 3).ravel().tolist(), T=[0.0, 0.0, 0.0, 255.0], dtype=UINT8)
    warped = warp(opaque, fill_value=0.0)
    mix = np.concatenate([np.eye(3), -fill[:, None] / 255], axis=1)
    return fn.coord_transform(warped, M=mix.ravel().tolist(), T=fill.tolist(), dtype=UINT8)


@augmentation
def posterize(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    """Posterize by dividing, truncating and multiplying."""
    levels = fn.coord_transform(images, MT=numbers[slot, :, 0:4], dtype=UINT8)
    return fn.coord_transform(levels, MT=numbers[slot, :, 4:8], dtype=UINT8)


@augmentation
def solarize(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    return images ^ fn.coord_transform(images, MT=numbers[slot, :, 0:4], dtype=UINT8)


@augmentation
def solarize_add(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    dark = fn.coord_transform(images, M=-255.0, T=255.0 * 128, dtype=UINT8)  # 255 below 128, otherwise 0
    return images + fn.coord_transform(dark, MT=numbers[slot, :, 0:4], dtype=UINT8)


@augmentation
def sharpness(images: DataNode, _: None, numbers: DataNode, slot: int, size: int) -> DataNode:
    """Sharpen by blending with the smoothed image, whose border pixels are unchanged."""
    kernel = np.full((3, 3), 1 / 13, np.float32)
    kernel[1, 1] = 5 / 13
    border = np.full((size, size, 1), 255, np.uint8)
    border[1:-1, 1:-1] = 0
    kernel, border, inside = (types.Constant(array, device=images.device) for array in (kernel, border, ~border))
    smooth = (fn.filter(images, kernel) & inside) | (images & border)
    both = fn.cat(images, smooth, axis=2)
    return fn.coord_transform(both, M=numbers[slot, :, 0:6], T=[TRUNCATED] * 3, dtype=UINT8)


@augmentation
def auto_contrast(images: DataNode, _: None) -> DataNode:
    low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    extent = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - low
    varies = fn.coord_transform(extent, M=255.0, dtype=UINT8)  # 0 for a channel of a single level, which is kept
    low = low & varies
    scale = (extent | (varies ^ _WHITE)) * (1 / 255)
    return fn.cast(math.floor((images - low) / scale), dtype=UINT8)


@augmentation
def equalize(images: DataNode, _: None, size: int) -> DataNode:
    """Equalize like Pillow, which counts the pixels below a level.

    DALI counts the pixels at or below a level. On the negative image, DALI's equalize therefore counts the pixels at or
    above a level, and the negative of the result counts the pixels below the level. Pillow divides these counts
    by n // 255, where n is the number of pixels that do not have the channel's brightest level.
    """
    pixels = size * size
    below = fn.equalize(images ^ _WHITE) ^ _WHITE  # 255 * share of the pixels except the brightest ones
    brightest = (images == fn.reductions.max(images, axes=[0, 1], keep_dims=True)) * _WHITE
    share = fn.reductions.mean(brightest, axes=[0, 1], keep_dims=True)
    # adding 0.25 pixels keeps whole quotients from ending up just below a whole number
    step = fn.coord_transform(share, M=-pixels / 255**2, T=(pixels + 0.25) / 255)
    factor = step / math.max(math.floor(step), 1.0)
    valid = math.floor(factor)  # 1, or 0 if there is less than one pixel per level; the channel is then unchanged
    return fn.cast(below * (factor * valid) + images * (1.0 - valid), dtype=UINT8)


@augmentation
def hue(images: DataNode, _: None, numbers: DataNode, slot: int) -> DataNode:
    """Rotate the hue in HSV without divisions or tables.

    Let V and m be the largest and smallest channel and C = V - m the chroma. Hues and distances are in sixths of the
    circle, times C. Measured from red, the hue is U = C - r + g + b - m, towards green if g >= b and otherwise towards
    blue. A channel whose hue is at distance d from the rotated hue becomes m + clamp(2 C - d, 0, C). The distance is
    3 C - | |t| - 3 C | for a difference t within one turn; `numbers` holds the multiple of C that brings t into this
    range.
    """
    largest = fn.reductions.max(images, axes=[2], keep_dims=True)
    smallest = fn.reductions.min(images, axes=[2], keep_dims=True)
    all_five = fn.cat(images, largest, smallest, axis=2)
    towards_green = _weighted(all_five, [0, 2000, -2000, 0, 0], 1000)  # larger than any hue, with the sign of g - b
    furthest = _weighted(all_five, [-SLACK, SLACK, SLACK, SLACK, -2 * SLACK])
    hues = math.clamp(towards_green, -furthest, furthest)
    away = math.abs(hues + fn.coord_transform(all_five, M=numbers[slot, :, 0:5]))
    folded = math.abs(away - _weighted(all_five, [0, 0, 0, 3 * SLACK, -3 * SLACK]))
    turned = folded + _weighted(all_five, [0, 0, 0, -SLACK, 2 * SLACK], TRUNCATED)
    return fn.cast(math.clamp(turned, smallest, largest), dtype=UINT8)


@augmentation
def blur(images: DataNode, _: None, numbers: DataNode, slot: int, programs: Programs) -> DataNode:
    return fn.gaussian_blur(images, sigma=numbers[slot, 0, 0], window_size=2 * programs.radius + 1)


BRANCHES = {
    branch.name: branch
    for branch in (
        identity,
        linear,
        about_mean,
        affine,
        posterize,
        solarize,
        solarize_add,
        sharpness,
        auto_contrast,
        equalize,
        hue,
        blur,
    )
}
_WHITE = types.Constant(255, dtype=UINT8)


def _weighted(channels: DataNode, weights: list[float], added: float = 0.0) -> DataNode:
    """Return the weighted sum of `channels`, [H, W, n], plus `added` as [H, W, 1]."""
    return fn.coord_transform(channels, MT=[float(number) for number in (*weights, added)])  # type: ignore[return-value]


def _interpolation(programs: Programs) -> types.DALIInterpType:
    return types.DALIInterpType.INTERP_LINEAR if programs.bilinear else types.DALIInterpType.INTERP_NN
