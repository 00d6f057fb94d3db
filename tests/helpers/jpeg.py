"""Decode JPEG files with the decoder of the CPU loader."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.cpu.graph import Parts, whole_parts
from pipelines.cpu.jpeg.decoder import JpegDecoder


def decode_files(
    files: Sequence[bytes],
    sides: Sequence[tuple[int, int]],
    parts: Parts | None = None,
    *,
    fast: bool = False,
    to_end: bool = False,
    decoder: JpegDecoder | None = None,
) -> tuple[int, list[np.ndarray]]:
    """Return the index of the first file that fails, and the decoded parts, uint8 [H, W, 3] each."""
    sizes, shapes = np.array([len(file) for file in files]), np.array(sides, np.int64)
    heights, widths = shapes[:, 0].copy(), shapes[:, 1].copy()
    boxes, denominators = parts or whole_parts(heights, widths)
    bytes_per_part = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 3
    offsets = np.cumsum(bytes_per_part) - bytes_per_part
    out = np.full(bytes_per_part.sum() + 64, 99, np.uint8)
    content = np.frombuffer(b"".join(files), np.uint8)
    failed = (decoder or JpegDecoder()).decode(
        content,
        np.cumsum(sizes) - sizes,
        sizes,
        heights,
        widths,
        boxes,
        denominators,
        fast=fast,
        to_end=to_end,
        out=out,
        offsets=offsets,
    )
    assert (out[bytes_per_part.sum() :] == 99).all()  # nothing is written behind the parts
    places = zip(offsets, bytes_per_part, boxes, strict=True)
    return failed, [out[at : at + n].reshape(box[2] - box[0], box[3] - box[1], 3) for at, n, box in places]


def decode(file: bytes) -> np.ndarray:
    """Return the pixels of a file that decodes without a warning, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(file)) as image:
        failed, (pixels,) = decode_files([file], [(image.height, image.width)])
    assert failed == 1
    return pixels
