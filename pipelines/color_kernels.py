"""Loops that change the colours of one image in place: the part of `program_kernels` where no pixel moves.

Each is torchvision's function (transforms.v2.functional) on uint8, with its order of float32 operations and its
rounding. torch adds a scaled tensor by fused multiply-add, so these do (`fused`): defined to the last bit on every
processor. image: uint8 [pixels * 3], red green blue.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, uint8

from pipelines.kernels import kernel
from pipelines.vector_ops import fused

ZERO, ONE, WHITE = float32(0), float32(1), float32(255)
RED, GREEN, BLUE = float32(0.2989), float32(0.587), float32(0.114)  # shares of grey
LEVEL = float32(1 / 255)
SIXTH = float32(1 / 6)


@kernel
def _level(value: float) -> int:
    return uint8(int32(min(max(value, ZERO), WHITE)))


@kernel
def _grey(red: int, green: int, blue: int) -> float:
    return float32(int32(fused(float32(blue), BLUE, fused(float32(green), GREEN, float32(red) * RED))))


@kernel
def brightness(image: np.ndarray, factor: float) -> None:
    for i in range(len(image)):
        image[i] = _level(float32(image[i]) * factor)


@kernel
def saturation(image: np.ndarray, factor: float) -> None:
    rest = float32(1.0 - factor)
    for i in range(0, len(image), 3):
        red, green, blue = image[i], image[i + 1], image[i + 2]
        grey = _grey(red, green, blue)
        image[i] = _level(fused(grey, rest, float32(red) * factor))
        image[i + 1] = _level(fused(grey, rest, float32(green) * factor))
        image[i + 2] = _level(fused(grey, rest, float32(blue) * factor))


@kernel
def contrast(image: np.ndarray, factor: float) -> None:
    total = int32(0)
    for i in range(0, len(image), 3):
        total += int32(_grey(image[i], image[i + 1], image[i + 2]))
    mean = float32(total) / float32(len(image) // 3)
    rest = float32(1.0 - factor)
    for i in range(len(image)):
        image[i] = _level(fused(mean, rest, float32(image[i]) * factor))


@kernel
def grayscale(image: np.ndarray) -> None:
    for i in range(0, len(image), 3):
        grey = uint8(_grey(image[i], image[i + 1], image[i + 2]))
        image[i] = image[i + 1] = image[i + 2] = grey


@kernel
def hue(image: np.ndarray, shift: float) -> None:
    """To hue, saturation and value from 0 to 1, and back with a turned hue; each pixel without branches."""
    for i in range(0, len(image), 3):
        red, green, blue = float32(image[i]) * LEVEL, float32(image[i + 1]) * LEVEL, float32(image[i + 2]) * LEVEL
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        grey = high == low
        depth = (high - low) / (ONE if grey else high)
        spread = ONE if grey else high - low
        from_red, from_green, from_blue = (high - red) / spread, (high - green) / spread, (high - blue) / spread
        of_green = from_red + float32(2) - from_blue
        of_blue = from_green + float32(4) - from_red
        turn = from_blue - from_green if high == red else (of_green if high == green else of_blue)
        turn = turn * SIXTH + ONE
        turn -= float32(int32(turn))
        turn += shift + ONE  # never negative, so that dropping the fraction rounds down
        turn -= float32(int32(turn))
        sixths = turn * float32(6)
        sector = int32(sixths)
        part = depth * (sixths - float32(sector))
        falling = min(max((ONE - part) * high, ZERO), ONE)
        rising = min(max((part + (ONE - depth)) * high, ZERO), ONE)
        base = min(max((ONE - depth) * high, ZERO), ONE)
        sector = 0 if sector == 6 else sector
        top = sector == 0 or sector == 5
        red = high if top else (falling if sector == 1 else (rising if sector == 4 else base))
        top = sector == 1 or sector == 2
        green = high if top else (falling if sector == 3 else (rising if sector == 0 else base))
        top = sector == 3 or sector == 4
        blue = high if top else (falling if sector == 5 else (rising if sector == 2 else base))
        image[i] = uint8(int32(red * float32(255.999)))
        image[i + 1] = uint8(int32(green * float32(255.999)))
        image[i + 2] = uint8(int32(blue * float32(255.999)))


@kernel
def posterize(image: np.ndarray, bits: int) -> None:
    mask = uint8(0xFF << (8 - min(max(bits, 0), 8)))
    for i in range(len(image)):
        image[i] &= mask


@kernel
def solarize(image: np.ndarray, threshold: int) -> None:
    """threshold: from 0 to 256"""
    for i in range(len(image)):
        level = image[i]
        image[i] = 255 - level if level >= threshold else level


@kernel
def solarize_add(image: np.ndarray, added: int) -> None:
    """timm's, for added from 0 to 128, with which no pixel below 128 gets beyond white."""
    amount = uint8(added)
    for i in range(len(image)):
        level = image[i]
        image[i] = level + amount if level < 128 else level


@kernel
def invert(image: np.ndarray) -> None:
    for i in range(len(image)):
        image[i] = 255 - image[i]


@kernel
def auto_contrast(image: np.ndarray, side: int, table: np.ndarray) -> None:
    """side: pixels of a row; table: uint8 [3, 256], overwritten."""
    row = side * 3
    low, high = image[:row].copy(), image[:row].copy()
    for start in range(row, len(image), row):
        line = image[start : start + row]
        for i in range(row):
            low[i] = min(low[i], line[i])
            high[i] = max(high[i], line[i])
    for channel in range(3):
        least, most = low[channel::3].min(), high[channel::3].max()
        start = float32(least) if most > least else ZERO
        scale = (float32(most) - float32(least)) * LEVEL if most > least else ONE
        for level in range(256):
            table[channel, level] = _level((float32(level) - start) / scale)
    _look_up(image, table)


@kernel
def equalize(image: np.ndarray, table: np.ndarray, counts: np.ndarray) -> None:
    """Pillow's formula. table: uint8 [3, 256], counts: int32 [3, 256], both overwritten."""
    counts[:] = 0
    for i in range(0, len(image), 3):
        counts[0, image[i]] += 1
        counts[1, image[i + 1]] += 1
        counts[2, image[i + 2]] += 1
    for channel in range(3):
        most = 255
        while counts[channel, most] == 0:
            most -= 1
        step = (len(image) // 3 - counts[channel, most]) // 255
        below = step // 2
        for level in range(256):
            table[channel, level] = level if step == 0 else min(below // step, 255)
            below += counts[channel, level]
    _look_up(image, table)


@kernel
def _look_up(image: np.ndarray, table: np.ndarray) -> None:
    for i in range(0, len(image), 3):
        image[i] = table[0, image[i]]
        image[i + 1] = table[1, image[i + 1]]
        image[i + 2] = table[2, image[i + 2]]
