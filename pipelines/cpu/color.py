"""Numba kernels that change the colors of one image in place.

Each kernel matches a function of torchvision.transforms.v2.functional on uint8 images bit for bit, with two exceptions:
`hue` may differ by one gray level, and `solarize_add` matches timm. torch computes a + s * b with a fused multiply-add;
`fused` does the same, with bitwise identical results on every CPU.

Common arguments:
    image: uint8 [pixels * 3], RGB.
    planes: uint8 [3, BLOCK], scratch memory.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, uint8

from pipelines.cpu.byte_intrinsics import PIXELS, join_pixels, split_pixels
from pipelines.cpu.float_intrinsics import fused
from pipelines.cpu.jit import kernel

ZERO, ONE, WHITE = float32(0), float32(1), float32(255)
RED, GREEN, BLUE = float32(0.2989), float32(0.587), float32(0.114)  # weights of the channels in gray
LEVEL = float32(1 / 255)
SIXTH = float32(1 / 6)
ALMOST_256 = float32(255.999)  # torchvision's scale from floats to levels
BLOCK = 1024  # pixels split into channels at once; they fit into the innermost cache


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
def saturation(image: np.ndarray, factor: float, planes: np.ndarray) -> None:
    rest = float32(1.0 - factor)
    for start in range(0, len(image) // 3, BLOCK):
        red, green, blue = _split(image, start, planes)
        for i in range(len(red)):
            grey = _grey(red[i], green[i], blue[i])
            red[i] = _level(fused(grey, rest, float32(red[i]) * factor))
            green[i] = _level(fused(grey, rest, float32(green[i]) * factor))
            blue[i] = _level(fused(grey, rest, float32(blue[i]) * factor))
        _join(image, start, red, green, blue)


@kernel
def contrast(image: np.ndarray, factor: float, planes: np.ndarray) -> None:
    total = 0
    for start in range(0, len(image) // 3, BLOCK):
        red, green, blue = _split(image, start, planes)
        of_block = int32(0)
        for i in range(len(red)):
            of_block += int32(_grey(red[i], green[i], blue[i]))
        total += of_block
    mean = float32(total) / float32(len(image) // 3)
    rest = float32(1.0 - factor)
    for i in range(len(image)):
        image[i] = _level(fused(mean, rest, float32(image[i]) * factor))


@kernel
def grayscale(image: np.ndarray, planes: np.ndarray) -> None:
    for start in range(0, len(image) // 3, BLOCK):
        red, green, blue = _split(image, start, planes)
        for i in range(len(red)):
            red[i] = uint8(int32(_grey(red[i], green[i], blue[i])))
        _join(image, start, red, red, red)


@kernel
def hue(image: np.ndarray, shift: float, planes: np.ndarray) -> None:
    """Rotate the hue in HSV by `shift`, a fraction of the full circle.

    The loop over the pixels contains no branches.
    """
    for start in range(0, len(image) // 3, BLOCK):
        reds, greens, blues = _split(image, start, planes)
        for i in range(len(reds)):
            red, green, blue = float32(reds[i]) * LEVEL, float32(greens[i]) * LEVEL, float32(blues[i]) * LEVEL
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
            turn += shift + ONE  # not negative, so truncation rounds down
            turn -= float32(int32(turn))
            sixths = turn * float32(6)
            sector = int32(sixths)
            part = depth * (sixths - float32(sector))
            falling = max((ONE - part) * high, ZERO)
            rising = max((part + (ONE - depth)) * high, ZERO)
            base = max((ONE - depth) * high, ZERO)
            red = high if (sector == 0) | (sector >= 5) else base
            red = falling if sector == 1 else red
            red = rising if sector == 4 else red
            green = high if (sector == 1) | (sector == 2) else base
            green = falling if sector == 3 else green
            green = rising if (sector == 0) | (sector == 6) else green
            blue = high if (sector == 3) | (sector == 4) else base
            blue = falling if sector == 5 else blue
            blue = rising if sector == 2 else blue
            reds[i] = uint8(int32(min(red, ONE) * ALMOST_256))
            greens[i] = uint8(int32(min(green, ONE) * ALMOST_256))
            blues[i] = uint8(int32(min(blue, ONE) * ALMOST_256))
        _join(image, start, reds, greens, blues)


@kernel
def _split(image: np.ndarray, start: int, planes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split up to BLOCK pixels into channels, so that loops over a channel are vectorized.

    Returns:
        Red, green and blue from pixel `start` on, uint8 [at most BLOCK] each, as views of `planes`.
    """
    count = min(BLOCK, len(image) // 3 - start)
    red, green, blue = planes[0, :count], planes[1, :count], planes[2, :count]
    done = 0
    while done + PIXELS <= count:
        split_pixels(red, green, blue, done, image, (start + done) * 3)
        done += PIXELS
    for i in range(done, count):
        at = (start + i) * 3
        red[i], green[i], blue[i] = image[at], image[at + 1], image[at + 2]
    return red, green, blue


@kernel
def _join(image: np.ndarray, start: int, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> None:
    done = 0
    while done + PIXELS <= len(red):
        join_pixels(image, (start + done) * 3, red, green, blue, done)
        done += PIXELS
    for i in range(done, len(red)):
        at = (start + i) * 3
        image[at], image[at + 1], image[at + 2] = red[i], green[i], blue[i]


@kernel
def posterize(image: np.ndarray, bits: int) -> None:
    mask = uint8(0xFF << (8 - min(max(bits, 0), 8)))
    for i in range(len(image)):
        image[i] &= mask


@kernel
def solarize(image: np.ndarray, threshold: int) -> None:
    """Invert all levels at or above `threshold`, 0 to 256."""
    for i in range(len(image)):
        level = image[i]
        image[i] = 255 - level if level >= threshold else level


@kernel
def solarize_add(image: np.ndarray, added: int) -> None:
    """Add `added` to levels below 128, like timm's solarize_add. `added` is 0 to 128, so no level overflows."""
    amount = uint8(added)
    for i in range(len(image)):
        level = image[i]
        image[i] = level + amount if level < 128 else level


@kernel
def invert(image: np.ndarray) -> None:
    for i in range(len(image)):
        image[i] = 255 - image[i]


@kernel
def auto_contrast(image: np.ndarray, side: int) -> None:
    """Stretch each channel to the range 0..255. A channel with a single level is unchanged.

    `side` is the number of pixels per row.
    """
    row = side * 3
    low, high = image[:row].copy(), image[:row].copy()
    for start in range(row, len(image), row):
        line = image[start : start + row]
        for i in range(row):
            low[i] = min(low[i], line[i])
            high[i] = max(high[i], line[i])
    starts, scales = np.empty(row, np.float32), np.empty(row, np.float32)
    for channel in range(3):
        least, most = float32(low[channel::3].min()), float32(high[channel::3].max())
        starts[channel::3] = least if most > least else ZERO
        scales[channel::3] = (most - least) * LEVEL if most > least else ONE
    for start in range(0, len(image), row):
        line = image[start : start + row]
        for i in range(row):
            line[i] = _level((float32(line[i]) - starts[i]) / scales[i])


@kernel
def equalize(image: np.ndarray) -> None:
    """Equalize the histogram of each channel with Pillow's formula."""
    # Neighboring pixels often have the same level; two tables avoid a dependency between consecutive increments.
    counts = np.zeros((2, 3, 256), np.int32)
    pixels = len(image) // 3
    for pixel in range(pixels):
        some, i = counts[pixel & 1], pixel * 3
        some[0, image[i]] += 1
        some[1, image[i + 1]] += 1
        some[2, image[i + 2]] += 1
    table = np.empty((3, 256), np.uint8)
    below = np.empty(256, np.float64)  # float64: quotients never round up to a whole number
    for channel in range(3):
        total, last = 0, 0
        for level in range(256):
            below[level] = total
            count = counts[0, channel, level] + counts[1, channel, level]
            total += count
            last = count if count > 0 else last
        step = (pixels - last) // 255
        for level in range(256):
            table[channel, level] = level if step == 0 else int32(min((below[level] + step // 2) / step, 255.0))
    for i in range(0, len(image), 3):
        image[i] = table[0, image[i]]
        image[i + 1] = table[1, image[i + 1]]
        image[i + 2] = table[2, image[i + 2]]
