"""Gather, crop and flip in one kernel launch, for splits in GPU memory. Pixels match `dali_graph.train_graph`.

DALI sets up every sample on the host, which takes longer than the work on a 32x32 image. Here a batch costs the host
one small copy and one launch. Importing this module imports Triton, so import it only in code that uses a GPU.
"""

from __future__ import annotations

import os

import numpy as np
import torch

# Triton 3.9 warns if this is unset; 1 is the default up to that version.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
import triton.language as tl

from configs.schema import AugConfig, PaddingMode
from pipelines.gpu.copy_backend import CopyBackend
from pipelines.gpu.device_inputs import DeviceInputs
from pipelines.interfaces import Draws, SampleSource

BLOCK_BYTES = 1024  # output bytes per Triton program; an image of 32x32 takes three programs
DRAW_ROWS = 4  # rows: sample index, offset y, offset x, flip


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
    """Fill one block of one image of `out`.

    Args:
        pixels: uint8 [N, HEIGHT * WIDTH * 3].
        draws: int64 [DRAW_ROWS, stride].
        out: uint8 [B, SIZE * SIZE * 3].
        stride: Elements per row of `draws`.
        HEIGHT, WIDTH: Size of the stored images, pixels.
        SIZE: Height and width of the output, pixels.
        CROPS, FLIPS: Whether to crop and to flip.
        REFLECTS: Whether to fill pixels outside the image with its reflection instead of black.
        BLOCK: Output bytes per Triton program.
    """
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
    row = tl.load(draws + sample) * (HEIGHT * WIDTH * 3)  # 64 bits, since a split may exceed 4 GiB
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
    padding_mode: PaddingMode = PaddingMode.CONSTANT,
) -> torch.Tensor:
    """Gather, crop and flip images with one kernel launch on the current stream, and return `out`.

    Args:
        pixels: uint8 [N, H * W * 3], contiguous.
        draws: int64 [DRAW_ROWS, at least B], contiguous, on the same device. The rows are the sample index, the y and x
            of the crop's top-left corner relative to the unpadded image, and the flip, 0 or 1. Rows of disabled crops
            or flips are not read.
        out: uint8 [B, S, S, 3], contiguous.
        shape: (H, W, 3) of the stored images.
        crops, flips: Whether to crop and to flip.
        padding_mode: How to fill pixels outside the image. With REFLECT, the crop may extend past an edge by less than
            the image size.
    """
    samples, size = out.shape[:2]
    grid = (samples, triton.cdiv(size * size * 3, BLOCK_BYTES))
    height, width, _ = shape
    reflects = padding_mode == PaddingMode.REFLECT
    _gather_crop_flip[grid](
        pixels, draws, out, draws.stride(0), height, width, size, crops, flips, reflects, BLOCK_BYTES
    )
    return out


class TritonBackend(CopyBackend):
    """A Triton kernel gathers, crops and flips the images of a resident split, without DALI."""

    def source(self, slots: int, slot_size: int) -> SampleSource:
        pixels, aug = self.spec.pixels, self.spec.transforms
        assert pixels is not None
        assert isinstance(aug, AugConfig)
        return TritonCropFlip(pixels, self.image_shape, self.spec.image_size, slot_size, slots, aug.padding_mode)


class TritonCropFlip(SampleSource):
    """Source that gathers, crops and flips each batch of a split in GPU memory with one kernel launch.

    Each batch is a new tensor; see `DevicePixels`.

    Args:
        pixels: uint8 [N, H * W * 3] on the GPU.
        shape: (H, W, 3) of the stored images.
        size: Height and width of the output, pixels.
        batch_size: Images per slot.
        slots: Number of slots.
        padding_mode: See `gather_crop_flip`.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        shape: tuple[int, int, int],
        size: int,
        batch_size: int,
        slots: int,
        padding_mode: PaddingMode = PaddingMode.CONSTANT,
    ) -> None:
        self._pixels, self._shape, self._size, self._padding_mode = pixels, shape, size, padding_mode
        self._draws = DeviceInputs(slots, (DRAW_ROWS, batch_size), pixels.device)

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, size, size, 3], written on the current stream.

        Args:
            slot: Slot whose buffers are used to copy the indices and draws to the GPU.
            indices: Sample indices, int64 [B].
            draws: 'offset' int32 [B, 2] (y, x) and 'flip' int32 [B], both optional.
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
