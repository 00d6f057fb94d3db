"""Numba kernels that copy, crop, flip and resize a batch of images, and a kernel that sorts hashes for the shuffle.

Each call of an image kernel reads from one flat array and writes one batch. It runs in one thread without the GIL, and
the loader's threads work on different batches. Pixels match the DALI operators in `dali_graph`, except that resized
pixels may differ by one gray level. `python -m pipelines.cpu` compiles all kernels in advance.

The kernels do not check bounds; `pipelines.storage.index` has already validated the offsets. Common arguments:
    content: uint8 [bytes]. Each image takes height x width x 3 bytes in HWC order.
    image_offsets: int64 [B], byte offset of each image's first pixel in `content`.
    out: uint8 [B, size, size, 3], contiguous.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, int32, uint8

from pipelines.cpu.byte_intrinsics import LINE, PIXELS, copy_bytes, mirror_pixels, prefetch, stream_line
from pipelines.cpu.filters import reflect_index
from pipelines.cpu.float_intrinsics import mix_pixels, mix_three_pixels, mix_two_pixels
from pipelines.cpu.jit import kernel

PREFETCH_BYTES = 2**14  # distance between prefetch and copy
HALF = float32(0.5)


@kernel
def copy(content: np.ndarray, image_offsets: np.ndarray, out: np.ndarray) -> None:
    """Copy images of the same shape to `out`, uint8 [B, H, W, 3].

    The fast path requires the image size in bytes and the address of `out` to be multiples of LINE.
    """
    target = out.reshape(-1)
    size = target.size // max(len(image_offsets), 1)
    last, samples_ahead = len(image_offsets) - 1, max(1, PREFETCH_BYTES // size)
    whole_lines = size % LINE == 0 and target.ctypes.data % LINE == 0
    for sample in range(len(image_offsets)):
        begin, at = image_offsets[sample], sample * size
        if not whole_lines:
            copy_bytes(target, at, content, begin, size)
            continue
        # Scattered reads stall on memory. The outer cache can have many more requests in flight than the inner one.
        ahead = image_offsets[min(sample + samples_ahead, last)]
        for offset in range(0, size, LINE):
            prefetch(content, ahead + offset)
            stream_line(target, at + offset, content, begin + offset)


@kernel
def sort_hashes(keys: np.ndarray, out: np.ndarray) -> None:
    """Sort `keys`, uint64 [n], into `out`, uint64 [n].

    Sorting takes linear time if the keys are spread evenly over the range of uint64, as hashes are.
    """
    bits = 1
    while (1 << bits) < len(keys):
        bits += 1
    shift = np.uint64(64 - bits)
    ends = np.zeros((1 << bits) + 1, np.int64)
    for i in range(len(keys)):
        ends[(keys[i] >> shift) + np.uint64(1)] += 1
    for bucket in range(1 << bits):
        ends[bucket + 1] += ends[bucket]
    for i in range(len(keys)):  # ends[bucket] moves from the start of the bucket to its end
        at = keys[i] >> shift
        out[ends[at]] = keys[i]
        ends[at] += 1
    for i in range(1, len(keys)):  # insertion sort of the few keys in each bucket
        key, place = out[i], i
        while place > 0 and out[place - 1] > key:
            out[place] = out[place - 1]
            place -= 1
        out[place] = key


@kernel
def crop_flip(
    content: np.ndarray,
    image_offsets: np.ndarray,
    height: int,
    width: int,
    offsets: np.ndarray,
    flips: np.ndarray,
    reflect: bool,
    out: np.ndarray,
) -> None:
    """Crop size x size pixels from each image, and flip the crops selected by `flips` horizontally.

    Args:
        content, image_offsets, out: See the module docstring.
        height, width: Size of every image, pixels.
        offsets: int32 [B, 2] (y, x), top-left corner of each crop in its image, pixels.
        flips: int32 [B], nonzero for each crop to flip.
        reflect: Whether to fill pixels outside an image with its reflection instead of black.
    """
    size = out.shape[1]
    target = out.reshape(-1)
    for sample in range(len(image_offsets)):
        top, left = offsets[sample, 0], offsets[sample, 1]
        mirrored = flips[sample] != 0
        first, last = max(-left, 0), min(width - left, size)  # columns covered by the image
        count = max(last - first, 0)
        blank = size - last if mirrored else first  # columns of the target left of the image
        for y in range(size):
            row = (sample * size + y) * size * 3
            source_y = reflect_index(y + top, height) if reflect else y + top
            if source_y < 0 or source_y >= height or (count == 0 and not reflect):
                for i in range(row, row + size * 3):
                    target[i] = 0
                continue
            source_row = image_offsets[sample] + source_y * width * 3
            for i in range(size - count):
                x = i if i < blank else i + count
                if reflect:
                    column = reflect_index(left + (size - 1 - x if mirrored else x), width)
                    copy_bytes(target, row + x * 3, content, source_row + column * 3, 3)
                else:
                    target[row + x * 3] = target[row + x * 3 + 1] = target[row + x * 3 + 2] = 0
            at = row + blank * 3
            begin = source_row + (left + first) * 3
            if not mirrored:
                copy_bytes(target, at, content, begin, count * 3)
                continue
            done = 0
            while done + PIXELS <= count:
                mirror_pixels(target, at + done * 3, content, begin + (count - PIXELS - done) * 3)
                done += PIXELS
            while done < count:
                copy_bytes(target, at + done * 3, content, begin + (count - 1 - done) * 3, 3)
                done += 1


@kernel
def resize(
    content: np.ndarray,
    image_offsets: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    cubic: bool,
    antialias: bool,
    out: np.ndarray,
) -> None:
    """Resize one region of each image to size x size pixels.

    Edge pixels are repeated outside the image. The vertical pass writes float32, so each pixel is rounded only once.

    Args:
        content, image_offsets, out: See the module docstring.
        heights, widths: int64 [B], size of each image, pixels.
        starts, ends: float32 [B, 2] (y, x), corners of each region, pixels. A region whose end is left of its start is
            mirrored horizontally.
        cubic: Whether to use the Catmull-Rom filter instead of the triangle filter.
        antialias: Whether to widen the filter by the scale factor when downscaling.
    """
    size = out.shape[1]
    reach = 2 if cubic else 1
    room = 0
    taps = 0
    for sample in range(len(image_offsets)):
        for axis in range(2):
            scale = abs(ends[sample, axis] - starts[sample, axis]) / size
            radius = reach * (max(scale, 1.0) if antialias else 1.0)
            taps = max(taps, int(2 * radius) + 2)
        room = max(room, widths[sample])
    index = np.empty((2, size), np.int64)
    weights = np.empty((2, size, taps), np.float32)
    flat_weights = weights.reshape(-1)
    columns = size * taps  # start of the weights of the columns
    line = np.empty((room + 4 * taps + size) * 3 + 1, np.float32)  # one row, with repeated edges
    target = out.reshape(-1)
    for sample in range(len(image_offsets)):
        height, width = heights[sample], widths[sample]
        rows_taps = _filter_weights(starts[sample, 0], ends[sample, 0], reach, antialias, index[0], weights[0])
        column_taps = _filter_weights(starts[sample, 1], ends[sample, 1], reach, antialias, index[1], weights[1])
        mirrored = ends[sample, 1] < starts[sample, 1]
        low, high = index[1, 0], index[1, size - 1] + column_taps
        left, right = min(max(low, 0), width - 1), max(min(high, width), 1)
        count = (right - left) * 3
        inner = line[(left - low) * 3 : (left - low) * 3 + count]
        for x in range(size):
            index[1, x] = (index[1, x] - low) * 3
        image = content[image_offsets[sample] : image_offsets[sample] + height * width * 3]
        for y in range(size):
            above = min(max(index[0, y], 0), height - 1)
            below = min(max(index[0, y] + 1, 0), height - 1)
            first = image[(above * width + left) * 3 : (above * width + right) * 3]
            second = image[(below * width + left) * 3 : (below * width + right) * 3]
            weight, other = weights[0, y, 0], weights[0, y, 1]
            for i in range(count):
                inner[i] = weight * float32(first[i]) + other * float32(second[i])
            for tap in range(2, rows_taps):
                weight = weights[0, y, tap]
                if weight != 0:
                    row = min(max(index[0, y] + tap, 0), height - 1)
                    more = image[(row * width + left) * 3 : (row * width + right) * 3]
                    for i in range(count):
                        inner[i] += weight * float32(more[i])
            for i in range((left - low) * 3):
                line[i] = inner[i % 3]
            for i in range((right - low) * 3, (high - low) * 3):
                line[i] = inner[count - 3 + i % 3]

            at = (sample * size + y) * size * 3
            if column_taps == 2:
                for x in range(size - 1):
                    column = size - 1 - x if mirrored else x
                    mix_two_pixels(target, at + 3 * x, line, index[1, column], flat_weights, columns + column * taps)
            elif column_taps == 3:
                for x in range(size - 1):
                    column = size - 1 - x if mirrored else x
                    mix_three_pixels(target, at + 3 * x, line, index[1, column], flat_weights, columns + column * taps)
            else:
                for x in range(size - 1):
                    column = size - 1 - x if mirrored else x
                    of_column = columns + column * taps
                    mix_pixels(target, at + 3 * x, line, index[1, column], flat_weights, of_column, column_taps)
            column = 0 if mirrored else size - 1  # avoids the fourth lane, which would overwrite the next row
            for channel in range(3):
                total = HALF
                for tap in range(column_taps):
                    total += weights[1, column, tap] * line[index[1, column] + 3 * tap + channel]
                target[at + 3 * size - 3 + channel] = uint8(int32(min(max(total, float32(0)), float32(255))))


@kernel
def _filter_weights(
    start: float, end: float, reach: int, antialias: bool, index: np.ndarray, weights: np.ndarray
) -> int:
    """Compute the filter of each target pixel along one axis.

    Args:
        start, end: Bounds of the region in either order, pixels.
        reach: Radius of the filter before widening, 1 for the triangle filter and 2 for Catmull-Rom.
        antialias: Whether to widen the filter by the scale factor when downscaling.
        index: int64 [size], filled with the first source pixel of each target pixel. It can be outside the image.
        weights: float32 [size, at least taps], filled with the weights of the source pixels.

    Returns:
        The number of taps, i.e. source pixels per target pixel.
    """
    size = len(index)
    scale = abs(end - start) / float32(size)
    stretch = max(scale, float32(1)) if antialias else float32(1)
    taps = math.ceil(2 * reach * stretch)
    origin = min(start, end) + HALF * scale - HALF - reach * stretch
    for i in range(size):
        edge = float32(i) * scale + origin
        left = math.ceil(edge)
        index[i] = int(left)
        total = float32(0)
        for tap in range(taps):
            x = abs((float32(left + tap) - edge) / stretch - float32(reach))
            if reach == 1:
                weight = max(float32(1) - x, float32(0))
            elif x < 1:
                weight = (float32(1.5) * x - float32(2.5)) * x * x + float32(1)
            elif x < 2:
                weight = ((float32(2.5) - HALF * x) * x - float32(4)) * x + float32(2)
            else:
                weight = float32(0)
            weights[i, tap] = weight
            total += weight
        for tap in range(taps):
            weights[i, tap] /= total
    return taps
