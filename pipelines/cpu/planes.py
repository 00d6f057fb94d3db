"""Numba kernels for images that are not stored as shards store them: planes, sums of pixels, and filters of HDF5.

Kernels do not check the bounds of `content`; callers have checked that all images lie in it.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from pipelines.cpu.byte_intrinsics import LINE, PIXELS, join_pixels, prefetch, split_pixels
from pipelines.cpu.jit import kernel

BLOCK_PIXELS = 2**12  # whose planes stay in the cache, and whose squares sum up to less than 2**32
FLETCHER_WORDS = 360  # of two bytes, whose sums fit 32 bits


@kernel
def join_planes(content: np.ndarray, starts: np.ndarray, stride: int, out: np.ndarray) -> None:
    """Write images that are stored as three planes, such as [3, H, W], in the order HWC.

    Args:
        content: uint8 [bytes].
        starts: int64 [B], byte offset of each image's first plane in `content`.
        stride: Bytes between the starts of planes. 0: all channels are the same plane, as in greyscale images.
        out: uint8 [B, H, W, 3], contiguous.
    """
    target = out.reshape(-1)
    pixels = target.size // max(3 * len(starts), 1)
    last, planes = len(starts) - 1, 3 if stride else 1
    whole = pixels // PIXELS * PIXELS
    for sample in range(len(starts)):
        begin, at, ahead = starts[sample], sample * pixels * 3, starts[min(sample + 1, last)]
        red = content[begin : begin + pixels]
        green = content[begin + stride : begin + stride + pixels]
        blue = content[begin + 2 * stride : begin + 2 * stride + pixels]
        for pixel in range(0, whole, PIXELS):
            if pixel % LINE == 0:  # scattered reads stall on memory
                for plane in range(planes):
                    prefetch(content, ahead + plane * stride + pixel)
            join_pixels(target, at + 3 * pixel, red, green, blue, pixel)
        for pixel in range(whole, pixels):
            target[at + 3 * pixel] = red[pixel]
            target[at + 3 * pixel + 1] = green[pixel]
            target[at + 3 * pixel + 2] = blue[pixel]


@kernel
def add_channel_sums(pixels: np.ndarray, sums: np.ndarray) -> None:
    """Add the per-channel sums of `pixels`, uint8 [N, 3], and of their squares to `sums`, int64 [2, 3]."""
    flat = pixels.reshape(-1)
    planes = np.empty((3, BLOCK_PIXELS), np.uint8)
    red, green, blue = planes[0], planes[1], planes[2]
    for start in range(0, len(pixels), BLOCK_PIXELS):
        count = min(BLOCK_PIXELS, len(pixels) - start)
        whole = count // PIXELS * PIXELS
        for pixel in range(0, whole, PIXELS):
            split_pixels(red, green, blue, pixel, flat, 3 * (start + pixel))
        for pixel in range(whole, count):
            for channel in range(3):
                planes[channel, pixel] = flat[3 * (start + pixel) + channel]
        for channel in range(3):
            plane, total, squares = planes[channel], uint32(0), uint32(0)
            for pixel in range(count):
                value = uint32(plane[pixel])
                total = uint32(total + value)
                squares = uint32(squares + uint32(value * value))
            sums[0, channel] += total
            sums[1, channel] += squares


@kernel
def decompress_lzf(stored: np.ndarray, out: np.ndarray) -> int:
    """Decompress LZF, the format of h5py's filter, from `stored`, uint8 [bytes], to `out`, uint8 [bytes].

    The format is that of liblzf: https://oldhome.schmorp.de/marc/liblzf.html

    Returns:
        The number of bytes written, or -1 if `stored` is damaged or would write beyond the end of `out`.
    """
    place, at = 0, 0
    while place < len(stored):
        control = np.int64(stored[place])
        place += 1
        if control < 32:  # literal bytes
            count = control + 1
            if place + count > len(stored) or at + count > len(out):
                return -1
            for i in range(count):
                out[at + i] = stored[place + i]
            place += count
        else:  # bytes that were written before, and may overlap those to write
            count = control >> 5
            if place + (count == 7) >= len(stored):
                return -1
            if count == 7:
                count += np.int64(stored[place])
                place += 1
            begin = at - ((control & 31) << 8) - np.int64(stored[place]) - 1
            place += 1
            count += 2
            if begin < 0 or at + count > len(out):
                return -1
            for i in range(count):
                out[at + i] = out[begin + i]
        at += count
    return at


@kernel
def fletcher32(content: np.ndarray) -> int:
    """Return the checksum of HDF5's filter fletcher32 over `content`, uint8 [bytes]."""
    low, high, words = np.int64(0), np.int64(0), len(content) // 2
    for start in range(0, words, FLETCHER_WORDS):
        for word in range(start, min(start + FLETCHER_WORDS, words)):
            low += (np.int64(content[2 * word]) << 8) | np.int64(content[2 * word + 1])
            high += low
        low, high = (low & 0xFFFF) + (low >> 16), (high & 0xFFFF) + (high >> 16)
    if len(content) % 2:
        low += np.int64(content[-1]) << 8
        high += low
        low, high = (low & 0xFFFF) + (low >> 16), (high & 0xFFFF) + (high >> 16)
    low, high = (low & 0xFFFF) + (low >> 16), (high & 0xFFFF) + (high >> 16)
    return (high << 16) | low
