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
from numba import float32, int32, uint8, uint64

from pipelines.cpu.byte_intrinsics import LINE, PIXELS, copy_bytes, mirror_pixels, prefetch, stream_line
from pipelines.cpu.filters import reflect_index
from pipelines.cpu.float_intrinsics import mix_pixels
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
            at, begin = row + blank * 3, source_row + (left + first) * 3
            if mirrored:
                _copy_mirrored(target, at, content, begin, count)
            else:
                copy_bytes(target, at, content, begin, count * 3)


@kernel
def _copy_mirrored(target: np.ndarray, at: int, content: np.ndarray, begin: int, count: int) -> None:
    """Copy `count` pixels from content[begin:] to target[at:], with the pixels in reverse order."""
    done = 0
    while done + PIXELS <= count:
        mirror_pixels(target, at + done * 3, content, begin + (count - PIXELS - done) * 3)
        done += PIXELS
    for pixel in range(done, count):
        copy_bytes(target, at + pixel * 3, content, begin + (count - 1 - pixel) * 3, 3)


@kernel
def resize(
    content: np.ndarray,
    image_offsets: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    boxes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    cubic: bool,
    antialias: bool,
    out: np.ndarray,
) -> None:
    """Resize one region of each image to size x size pixels.

    Edge pixels are repeated outside the image. The vertical pass writes float32, so each pixel is rounded only once.

    Args:
        content, out: See the module docstring.
        image_offsets: int64 [B], byte offset of the first pixel of each box in `content`.
        heights, widths: int64 [B], size of each image, pixels.
        boxes: int64 [B, 4] (top, left, bottom, right), the part of each image that `content` holds, which includes all
            pixels inside the image that the filters read.
        starts, ends: float32 [B, 2] (y, x), corners of each region, pixels. A region whose end is left of its start is
            mirrored horizontally.
        cubic: Whether to use the Catmull-Rom filter instead of the triangle filter.
        antialias: Whether to widen the filter by the scale factor when downscaling.
    """
    size = out.shape[1]
    reach = 2 if cubic else 1
    scale = np.abs(ends - starts).max() / size  # the largest of all images and axes
    taps = int(2 * reach * (max(scale, 1.0) if antialias else 1.0)) + 2
    rows, columns = np.empty(size, np.int64), np.empty(size, np.int64)
    row_memory, column_memory = np.empty(size * taps, np.float32), np.empty(size * taps, np.float32)
    line = np.empty((widths.max() + 4 * taps + size) * 3 + 1, np.float32)
    target = out.reshape(-1)
    for sample in range(len(image_offsets)):
        height, width = heights[sample], widths[sample]
        (top, left), (bottom, right) = starts[sample], ends[sample]
        row_weights = _filter_weights(top, bottom, reach, antialias, rows, row_memory)
        column_weights = _filter_weights(left, right, reach, antialias, columns, column_memory)
        low, high = columns[0], columns[size - 1] + column_weights.shape[1]  # columns that the filters read
        first, last = min(max(low, 0), width - 1), max(min(high, width), 1)  # those inside the image
        above, stride = boxes[sample, 0], (boxes[sample, 3] - boxes[sample, 1]) * 3
        begin = image_offsets[sample] + (first - boxes[sample, 1]) * 3
        image = content[begin : image_offsets[sample] + (boxes[sample, 2] - above) * stride]
        inner = line[(first - low) * 3 : (last - low) * 3]
        for x in range(size):
            columns[x] = (columns[x] - low) * 3
        for y in range(size):
            _vertical_pass(image, height, above, stride, rows[y], row_weights, y, inner)
            for i in range((first - low) * 3):
                line[i] = inner[i % 3]
            for i in range((last - low) * 3, (high - low) * 3):
                line[i] = inner[len(inner) - 3 + i % 3]
            _horizontal_pass(line, columns, column_weights, right < left, target, (sample * size + y) * size * 3)


@kernel
def _vertical_pass(
    image: np.ndarray,
    height: int,
    first: int,
    stride: int,
    top: int,
    weights: np.ndarray,
    y: int,
    line: np.ndarray,
) -> None:
    """Filter the pixels of one target row vertically.

    Args:
        image: uint8, flat, from the first column to filter.
        height: Rows of the whole image. Edge pixels are repeated in rows outside of it.
        first: First row that `image` holds.
        stride: Bytes from one row to the next.
        top: Source row of the first tap.
        weights: float32 [size, taps], at least two taps.
        y: Target row.
        line: float32 [bytes of the row to filter], overwritten.
    """
    # Unsigned indices cannot be negative, so the loops are vectorized, without slices and their reference counts.
    above = uint64((min(max(top, 0), height - 1) - first) * stride)
    below = uint64((min(max(top + 1, 0), height - 1) - first) * stride)
    weight, other = weights[y, 0], weights[y, 1]
    for i in range(len(line)):
        line[i] = weight * float32(image[above + uint64(i)]) + other * float32(image[below + uint64(i)])
    for tap in range(2, weights.shape[1]):
        weight = weights[y, tap]
        if weight != 0:
            begin = uint64((min(max(top + tap, 0), height - 1) - first) * stride)
            for i in range(len(line)):
                line[i] += weight * float32(image[begin + uint64(i)])


@kernel
def _horizontal_pass(
    line: np.ndarray, columns: np.ndarray, weights: np.ndarray, mirrored: bool, target: np.ndarray, at: int
) -> None:
    """Filter one row horizontally and round it to uint8.

    Args:
        line: Result of `_vertical_pass`.
        columns: int64 [size], place in `line` of the first tap of each target pixel.
        weights: float32 [size, taps].
        mirrored: Whether to write the row from right to left.
        target: uint8, flat.
        at: Place of the row in `target`.
    """
    size, taps = weights.shape
    if taps == 2:  # a constant number of taps, so that the compiler unrolls the loop over them
        for x in range(size - 1):
            column = size - 1 - x if mirrored else x
            mix_pixels(target, at + 3 * x, line, columns[column], weights, column * taps, 2)
    elif taps == 3:
        for x in range(size - 1):
            column = size - 1 - x if mirrored else x
            mix_pixels(target, at + 3 * x, line, columns[column], weights, column * taps, 3)
    else:
        for x in range(size - 1):
            column = size - 1 - x if mirrored else x
            mix_pixels(target, at + 3 * x, line, columns[column], weights, column * taps, taps)
    column = 0 if mirrored else size - 1  # avoids the fourth lane, which would overwrite the next row
    for channel in range(3):
        total = HALF
        for tap in range(taps):
            total += weights[column, tap] * line[columns[column] + 3 * tap + channel]
        target[at + 3 * size - 3 + channel] = uint8(int32(min(max(total, float32(0)), float32(255))))


@kernel
def _filter_weights(
    start: float, end: float, reach: int, antialias: bool, index: np.ndarray, memory: np.ndarray
) -> np.ndarray:
    """Compute the filter of each target pixel along one axis.

    Args:
        start, end: Bounds of the region in either order, pixels.
        reach: Radius of the filter before widening, 1 for the triangle filter and 2 for Catmull-Rom.
        antialias: Whether to widen the filter by the scale factor when downscaling.
        index: int64 [size], filled with the first source pixel of each target pixel. It can be outside the image.
        memory: float32 [at least size * taps], overwritten.

    Returns:
        The weights of the source pixels as a view of `memory`, float32 [size, taps]. The number of taps is that of the
        source pixels per target pixel.
    """
    size = len(index)
    scale = abs(end - start) / float32(size)
    stretch = max(scale, float32(1)) if antialias else float32(1)
    taps = math.ceil(2 * reach * stretch)
    weights = memory[: size * taps].reshape(size, taps)
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
    return weights
