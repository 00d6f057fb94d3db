"""Gather, crop and flip in one launch, for splits that live in GPU memory; the pixels are those of graph.train_graph.

DALI sets every sample up on the host, which tiny images feel: at 32x32 that takes longer than the work. Here a batch
costs the host one small copy and one launch. Imports Triton, which the rest of the project does without: only code that
is about to use a GPU may import this file.
"""

from __future__ import annotations

import os

import numpy as np
import torch

# Triton 3.9 warns in every process that leaves this unset; 1 is the default of all versions up to it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
import triton.language as tl

from pipelines.gpu.device_inputs import DeviceInputs
from pipelines.interfaces import SampleSource

BLOCK_BYTES = 1024  # of the output, per program: three programs for an image of 32x32
DRAW_ROWS = 4  # per sample: index, offset y, offset x, flip


@triton.jit
def _gather_crop_flip(
    pixels,
    draws,
    out,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    CROPS: tl.constexpr,
    FLIPS: tl.constexpr,
    REFLECTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """pixels uint8 [N, HEIGHT * WIDTH * 3]; draws int64 [DRAW_ROWS, stride]; out uint8 [B, SIZE * SIZE * 3]."""
    sample = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = place < SIZE * SIZE * 3
    x = place // 3 % SIZE
    y = place // (3 * SIZE)
    if FLIPS:
        x = tl.where(tl.load(draws + 3 * stride + sample) != 0, SIZE - 1 - x, x)
    inside = exists
    if CROPS:
        y += tl.load(draws + stride + sample).to(tl.int32)
        x += tl.load(draws + 2 * stride + sample).to(tl.int32)
        if REFLECTS:
            y = HEIGHT - 1 - tl.abs(HEIGHT - 1 - tl.abs(y))
            x = WIDTH - 1 - tl.abs(WIDTH - 1 - tl.abs(x))
        else:
            inside = exists & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    row = tl.load(draws + sample) * (HEIGHT * WIDTH * 3)  # 64 bits: a split may have more bytes than 32 bits count
    values = tl.load(pixels + row + (y * WIDTH + x) * 3 + place % 3, mask=inside, other=0)
    tl.store(out + sample.to(tl.int64) * (SIZE * SIZE * 3) + place, values, mask=exists)


def gather_crop_flip(
    pixels: torch.Tensor,
    draws: torch.Tensor,
    out: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    crops: bool,
    flips: bool,
    padding_mode: str = "black",
) -> torch.Tensor:
    """One launch on the current stream. Returns out.

    pixels: uint8 [N, H * W * 3], of images of `shape` (H, W, 3), contiguous.
    draws: int64 [DRAW_ROWS, at least B], contiguous, on the same device: the samples' indices; y and x of the crops'
    top-left corners in the unpadded image; whether to mirror. Rows that crops or flips do not ask for are not read.
    out: uint8 [B, S, S, 3], contiguous. padding_mode: what lies outside of the image, 'black' or 'reflect' (as
    torch.nn.functional.pad reflects: the edge itself is not repeated, and no offset may reach a whole image beyond it).
    """
    samples, size = out.shape[:2]
    grid = (samples, triton.cdiv(size * size * 3, BLOCK_BYTES))
    height, width, _ = shape
    reflects = padding_mode == "reflect"
    _gather_crop_flip[grid](
        pixels, draws, out, draws.stride(0), height, width, size, crops, flips, reflects, BLOCK_BYTES
    )
    return out


class TritonCropFlip(SampleSource):
    """Batches of a split that lies whole in GPU memory, gathered, cropped and flipped in one launch.

    pixels: uint8 [N, H * W * 3] on the GPU; shape: (H, W, 3) of the stored images; size: of the square images it gives.
    Each batch is a new tensor, as those of `gather.DevicePixels`.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        shape: tuple[int, int, int],
        size: int,
        batch_size: int,
        slots: int,
        padding_mode: str = "black",
    ) -> None:
        self._pixels, self._shape, self._size, self._padding_mode = pixels, shape, size, padding_mode
        self._draws = DeviceInputs(slots, (DRAW_ROWS, batch_size), pixels.device)

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, size, size, 3], written on the current stream; draws as graph.train_graph takes them.

        indices: int64 [B]; draws: 'offset' int32 [B, 2] (y, x) and 'flip' int32 [B], or without either.
        """
        samples = len(indices)
        rows = self._draws.host(slot)
        rows[0, :samples] = indices
        if "offset" in draws:
            rows[1:3, :samples] = draws["offset"].T
        if "flip" in draws:
            rows[3, :samples] = draws["flip"]
        return gather_crop_flip(
            self._pixels,
            self._draws.to_device(slot),
            self._pixels.new_empty((samples, self._size, self._size, 3)),
            shape=self._shape,
            crops="offset" in draws,
            flips="flip" in draws,
            padding_mode=self._padding_mode,
        )
