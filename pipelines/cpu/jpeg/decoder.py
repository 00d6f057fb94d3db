"""Decode JPEG files to RGB with libjpeg-turbo, one thread per decoder, without the GIL.

Only the part of an image that is needed is decoded: rows below it are not read, rows above it and columns beside it
are not transformed. The pixels of a part equal those of the whole image. Pixels of accurate decoding equal those of
DALI's decoder on the CPU.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from numba import types

from pipelines.cpu.jit import kernel
from pipelines.cpu.jpeg import libjpeg
from pipelines.cpu.jpeg.libjpeg import set_jump

# Memory of a decoder, in bytes: the decompressor at 0, the error manager, a jmp_buf, row pointers, bounds of a crop
ERROR_MANAGER, JUMP, ROWS, CROP, SIZE = 1024, 1280, 1792, 1856, 1920
MAX_ROWS = (CROP - ROWS) // 8  # rows per call; libjpeg returns one or two
MARGIN = 4  # pixels beside a part that influence it by the interpolation of color
ROW_PADDING = 64 * 3  # bytes; libjpeg moves the left bound of a crop by less than 64 pixels
LINE = 64  # bytes of a cache line
# libjpeg-turbo bypasses the cache for rows at multiples of 32 bytes. The loader reads the pixels right away, and cache
# lines that such writes cover only in part are slow. Rows at odd addresses are written to the cache.
ODD = 1
_copy_memory = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


class JpegDecoder:
    """Decoder for a single thread at a time. Reusing a decoder saves its setup.

    Raises:
        UserError: Pillow is not linked with a supported version of libjpeg-turbo.
    """

    def __init__(self) -> None:
        library = libjpeg.load()
        self._words = np.zeros(SIZE // 8, np.int64)
        self._fields = self._words.view(np.int32)
        callbacks = libjpeg.error_exit.address, libjpeg.output_message.address
        if not any(_create(self._words, *callbacks, *abi) for abi in libjpeg.ABIS):
            raise libjpeg.unsupported("unknown ABI")
        weakref.finalize(self, _destroy, library, self._words)

    def decode(
        self,
        content: np.ndarray,
        starts: np.ndarray,
        sizes: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        boxes: np.ndarray,
        denominators: np.ndarray,
        *,
        fast: bool,
        to_end: bool,
        out: np.ndarray,
        offsets: np.ndarray,
        first: int = 0,
    ) -> int:
        """Decode parts of images until the first one that fails.

        Args:
            content: uint8 [bytes], contiguous.
            starts, sizes: int64 [B], start and length of each file in `content`, bytes.
            heights, widths: int64 [B], expected size of each image, pixels.
            boxes: int64 [B, 4] (top, left, bottom, right), the part of each image to decode, in pixels of the image at
                reduced scale.
            denominators: int64 [B], 1, 2, 4 or 8. The image is decoded at 1 / denominator of its size, rounded up.
            fast: Whether to use the fast, less accurate inverse transform.
            to_end: Whether to read each file to its end, so that damage outside of the part is found too.
            out: uint8 [bytes], flat. Receives the parts in HWC order.
            offsets: int64 [B], start of each part in `out`, bytes. Parts of whole rows at odd addresses are not copied.
            first: First image to decode.

        Returns:
            The index of the first image for which libjpeg-turbo reports an error or a warning, or whose size is not the
            expected one; B if there is none.
        """
        columns = starts, sizes, heights, widths, boxes, denominators
        return _decode(self._words, self._fields, content, *columns, fast, to_end, out, offsets, first)


def _destroy(library: ctypes.CDLL, words: np.ndarray) -> None:
    library.jpeg_destroy_decompress(ctypes.c_void_p(words.ctypes.data))


@kernel
def _create(words: np.ndarray, error_exit: int, output_message: int, version: int, size: int) -> bool:
    """Create a decompressor. Return False if the library has another ABI."""
    decompressor = words.ctypes.data
    if set_jump(decompressor + JUMP) != 0:
        return False
    words[libjpeg.ERROR_MANAGER] = libjpeg.std_error(decompressor + ERROR_MANAGER)
    words[libjpeg.CLIENT_DATA] = decompressor + JUMP
    words[ERROR_MANAGER // 8 + libjpeg.ERROR_EXIT] = error_exit
    words[ERROR_MANAGER // 8 + libjpeg.OUTPUT_MESSAGE] = output_message
    libjpeg.create(decompressor, version, size)
    return True


@kernel
def _decode(
    words: np.ndarray,
    fields: np.ndarray,
    content: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    boxes: np.ndarray,
    denominators: np.ndarray,
    fast: bool,
    to_end: bool,
    out: np.ndarray,
    offsets: np.ndarray,
    first: int,
) -> int:
    row_size = (widths.max() * 3 + ROW_PADDING) // LINE * LINE + LINE
    rows = np.empty(MAX_ROWS * row_size + LINE, np.uint8)
    for image in range(first, len(starts)):
        if not _decode_one(
            words,
            fields,
            content.ctypes.data + starts[image],
            sizes[image],
            heights[image],
            widths[image],
            boxes[image, 0],
            boxes[image, 1],
            boxes[image, 2],
            boxes[image, 3],
            denominators[image],
            fast,
            to_end,
            out.ctypes.data + offsets[image],
            rows.ctypes.data | ODD,
            row_size,
        ):
            return image
    return len(starts)


@kernel
def _decode_one(
    words: np.ndarray,
    fields: np.ndarray,
    file: int,
    size: int,
    height: int,
    width: int,
    top: int,
    left: int,
    bottom: int,
    right: int,
    denominator: int,
    fast: bool,
    to_end: bool,
    target: int,
    rows: int,
    row_size: int,
) -> bool:
    """Decode a part of one image to the address `target`. Return False if it fails.

    `rows` is the address of memory for MAX_ROWS rows of `row_size` bytes.
    """
    decompressor = words.ctypes.data
    if set_jump(decompressor + JUMP) != 0:
        libjpeg.abort(decompressor)
        return False
    words[ERROR_MANAGER // 8 + libjpeg.WARNINGS] = 0
    libjpeg.memory_source(decompressor, file, size)
    libjpeg.read_header(decompressor, 1)
    if fields[libjpeg.IMAGE_HEIGHT] != height or fields[libjpeg.IMAGE_WIDTH] != width:
        libjpeg.abort(decompressor)
        return False
    fields[libjpeg.OUT_COLOR_SPACE] = libjpeg.RGB
    fields[libjpeg.SCALE_NUM], fields[libjpeg.SCALE_DENOM] = 1, denominator
    fields[libjpeg.DCT_METHOD] = libjpeg.FAST if fast else libjpeg.ACCURATE
    libjpeg.start(decompressor)
    _read_part(words, fields, top, left, bottom, right, target, rows, row_size)
    below = fields[libjpeg.OUTPUT_HEIGHT] - fields[libjpeg.OUTPUT_SCANLINE]
    if to_end and below > 0:  # libjpeg does not read what it skips at the end of an image
        if below > 1:
            libjpeg.skip_rows(decompressor, below - 1)
        words[ROWS // 8] = rows
        libjpeg.read_rows(decompressor, decompressor + ROWS, 1)
    if fields[libjpeg.OUTPUT_SCANLINE] == fields[libjpeg.OUTPUT_HEIGHT]:
        libjpeg.finish(decompressor)
    else:
        libjpeg.abort(decompressor)
    return words[ERROR_MANAGER // 8 + libjpeg.WARNINGS] == 0


@kernel
def _read_part(
    words: np.ndarray,
    fields: np.ndarray,
    top: int,
    left: int,
    bottom: int,
    right: int,
    target: int,
    rows: int,
    row_size: int,
) -> None:
    """Read the rows of a part: to `rows` and from there to the target, if they are cropped or the target is even."""
    decompressor, output_width = words.ctypes.data, np.int64(fields[libjpeg.OUTPUT_WIDTH])
    size, begin = (right - left) * 3, left
    is_copied = size < output_width * 3 or target & ODD == 0
    if size < output_width * 3:
        begin = max(left - MARGIN, 0)
        fields[CROP // 4], fields[CROP // 4 + 1] = begin, min(right + MARGIN, output_width) - begin
        libjpeg.crop_columns(decompressor, decompressor + CROP, decompressor + CROP + 4)
        begin = np.int64(fields[CROP // 4])  # libjpeg may move it to the left
    if top > 0:
        libjpeg.skip_rows(decompressor, top)
    y = top
    while y < bottom:
        place, step = (rows, row_size) if is_copied else (target, size)
        for row in range(MAX_ROWS):
            words[ROWS // 8 + row] = place + row * step
        count = libjpeg.read_rows(decompressor, decompressor + ROWS, min(MAX_ROWS, bottom - y))
        if is_copied:
            for row in range(count):
                _copy_memory(target + row * size, rows + row * row_size + (left - begin) * 3, size)
        target += count * size
        y += count
