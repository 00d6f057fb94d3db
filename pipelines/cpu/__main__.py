"""Compile all kernels in advance. Run as `python -m pipelines.cpu`."""

from __future__ import annotations

import numpy as np

from pipelines.cpu import batch, planes, programs, sigbus_handler
from pipelines.cpu.graph import whole_parts
from pipelines.cpu.jpeg import headers
from pipelines.cpu.jpeg.decoder import JpegDecoder


def compile_all() -> None:
    """Compile every kernel by calling it once on minimal arrays of the types that the loader uses."""
    assert sigbus_handler.handler.address  # compiled by the import
    content, out = np.zeros(3, np.uint8), np.empty((1, 1, 1, 3), np.uint8)
    image_offsets, sides, sizes = np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(1, np.int32)
    offset, flip, corner = np.zeros((1, 2), np.int32), np.zeros(1, np.int32), np.zeros((1, 2), np.float32)
    batch.copy(content, image_offsets, out)
    batch.crop_flip(content, image_offsets, 1, 1, offset, flip, False, out)
    boxes, denominators = whole_parts(sides, sides)
    batch.resize(content, image_offsets, sides, sides, boxes, corner, corner + 1, False, True, out)
    planes.join_planes(content, image_offsets, 1, out)
    planes.add_channel_sums(out.reshape(-1, 3), np.zeros((2, 3), np.int64))
    planes.decompress_lzf(content, content)
    planes.fletcher32(content)
    batch.sort_hashes(np.zeros(1, np.uint64), np.empty(1, np.uint64))
    headers.find_mismatches(content, image_offsets, sizes, sizes, sizes, np.empty(1, bool))
    file = content, image_offsets, sides, sides, sides, boxes, denominators
    JpegDecoder().decode(*file, fast=False, to_end=False, out=content, offsets=image_offsets)
    black = np.zeros((1, 3), np.uint8)
    programs.apply_programs(out, np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), False, black[0], 1)
    programs.paint(out, np.zeros((1, 4), np.int32), black)


if __name__ == "__main__":
    compile_all()
