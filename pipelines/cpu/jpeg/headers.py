"""A Numba kernel that checks the headers of JPEG files."""

from __future__ import annotations

import numpy as np

from pipelines.cpu.jit import kernel
from pipelines.jpeg_format import NON_FRAME_MARKERS, SOF0, SOF15, SOI, SOS


@kernel
def find_mismatches(
    content: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    out: np.ndarray,
) -> None:
    """Find JPEG files whose header cannot be parsed or declares an unexpected image size.

    Headers are parsed as in nvImageCodec. Up to the first scan, each segment starts at the end of the previous one,
    after any number of fill bytes.

    Args:
        content: uint8 [bytes].
        offsets, sizes: int [B], start and length of each file in `content`, bytes.
        heights, widths: int [B], expected size of each image, pixels.
        out: bool [B], set to True for a mismatch and to False otherwise.
    """
    for sample in range(len(offsets)):
        begin = np.int64(offsets[sample])
        out[sample] = not _matches(content, begin, begin + sizes[sample], heights[sample], widths[sample])


@kernel
def _matches(content: np.ndarray, place: int, end: int, height: int, width: int) -> bool:
    if end - place < 4 or content[place] != 0xFF or content[place + 1] != SOI:
        return False
    place += 2
    has_frame = False
    while place + 4 <= end and content[place] == 0xFF:
        while place + 3 < end and content[place] == 0xFF:
            place += 1
        marker = content[place]
        if marker == 0 or marker == 0xFF:
            return False
        if marker == SOS:
            return has_frame
        length = (np.int64(content[place + 1]) << 8) + content[place + 2]
        if length < 2 or place + 1 + length > end:
            return False
        if SOF0 <= marker <= SOF15 and marker not in NON_FRAME_MARKERS:
            if length < 8:
                return False
            rows = (np.int64(content[place + 4]) << 8) + content[place + 5]
            columns = (np.int64(content[place + 6]) << 8) + content[place + 7]
            if rows != height or columns != width:
                return False
            has_frame = True
        place += 1 + length
    return False
