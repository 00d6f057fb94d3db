"""Crop, flip and erase in one kernel launch. Pixels match `dali_graph.train_graph`.

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
from pipelines.augment.ops import grey_levels
from pipelines.gpu.copy_backend import CopyBackend, CopyRunner
from pipelines.gpu.device_inputs import DeviceInputs
from pipelines.interfaces import Draws, Runner, SampleSource
from pipelines.loader.backend import LoaderSpec

BLOCK_BYTES = 1024  # output bytes per Triton program; an image of 32x32 takes three programs
CROP_COLUMNS = 4  # sample index, offset y, offset x, flip
BOX_COLUMNS = 5  # further columns per erased box: top, left, height, width, color
_COLOR_WEIGHTS = np.array([1, 256, 65536])


@triton.jit
def _crop_flip_erase(
    pixels,
    draws,
    out,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BOXES: tl.constexpr,
    REFLECTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Fill one block of one image of `out`.

    Args:
        pixels: uint8 [N, HEIGHT * WIDTH * 3].
        draws: int64 [B, CROP_COLUMNS + BOXES * BOX_COLUMNS].
        out: uint8 [B, SIZE * SIZE * 3].
        HEIGHT, WIDTH: Size of the stored images, pixels.
        SIZE: Height and width of the output, pixels.
        BOXES: Number of boxes to erase.
        REFLECTS: Whether to fill pixels outside the image with its reflection instead of black.
        BLOCK: Output bytes per Triton program.
    """
    sample = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = place < SIZE * SIZE * 3
    channel = place % 3
    column = place // 3 % SIZE
    row = place // (3 * SIZE)
    own = draws + sample * (4 + 5 * BOXES)  # 4 and 5: CROP_COLUMNS and BOX_COLUMNS
    y = row + tl.load(own + 1).to(tl.int32)
    x = tl.where(tl.load(own + 3) != 0, SIZE - 1 - column, column) + tl.load(own + 2).to(tl.int32)
    if REFLECTS:
        y = HEIGHT - 1 - tl.abs(HEIGHT - 1 - tl.abs(y))
        x = WIDTH - 1 - tl.abs(WIDTH - 1 - tl.abs(x))
        inside = exists
    else:
        inside = exists & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    start = tl.load(own) * (HEIGHT * WIDTH * 3)  # 64 bits, since a split may exceed 4 GiB
    values = tl.load(pixels + start + (y * WIDTH + x) * 3 + channel, mask=inside, other=0)
    for box in tl.static_range(BOXES):
        first = own + 4 + 5 * box
        top = tl.load(first).to(tl.int32)
        left = tl.load(first + 1).to(tl.int32)
        is_erased = (row >= top) & (row < top + tl.load(first + 2).to(tl.int32))
        is_erased &= (column >= left) & (column < left + tl.load(first + 3).to(tl.int32))
        color = tl.load(first + 4).to(tl.int32)
        values = tl.where(is_erased, (color >> (8 * channel)).to(tl.uint8), values)
    tl.store(out + sample.to(tl.int64) * (SIZE * SIZE * 3) + place, values, mask=exists)


def crop_flip_erase(
    pixels: torch.Tensor,
    draws: torch.Tensor,
    out: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    padding_mode: PaddingMode = PaddingMode.CONSTANT,
) -> torch.Tensor:
    """Gather, crop, flip and erase images with one kernel launch on the current stream, and return `out`.

    Args:
        pixels: uint8 [N, H * W * 3], contiguous.
        draws: int64 [at least B, CROP_COLUMNS + K * BOX_COLUMNS], contiguous, on the same device. The first columns
            are the sample index, the y and x of the crop's top-left corner relative to the unpadded image, and the
            flip, 0 or 1. The columns of K boxes to erase follow: top, left, height and width in the output, pixels, and
            the color, red + 256 * green + 65536 * blue.
        out: uint8 [B, S, S, 3], contiguous.
        shape: (H, W, 3) of the stored images.
        padding_mode: How to fill pixels outside the image. With REFLECT, the crop may extend past an edge by less than
            the image size.
    """
    samples, size = out.shape[:2]
    grid = (samples, triton.cdiv(size * size * 3, BLOCK_BYTES))
    height, width, _ = shape
    boxes = (draws.shape[1] - CROP_COLUMNS) // BOX_COLUMNS
    reflects = padding_mode == PaddingMode.REFLECT
    _crop_flip_erase[grid](pixels, draws, out, height, width, size, boxes, reflects, BLOCK_BYTES)
    return out


def draw_table(draws: Draws, cutout: int, cutout_color: tuple[int, int, int]) -> np.ndarray:
    """Return the table that `crop_flip_erase` reads, int64 [B, columns], except for the sample indices.

    Args:
        draws: Draws of `AugmentationSampler` without a random-resized crop and without programs.
        cutout: Side of the square of aug.cutout, pixels, or 0.
        cutout_color: Its RGB color, 0 to 255.
    """
    samples, boxes = len(next(iter(draws.values()))), ("erase_box" in draws) + (cutout > 0)
    table = np.zeros((samples, CROP_COLUMNS + boxes * BOX_COLUMNS), np.int64)
    if "offset" in draws:
        table[:, 1:3] = draws["offset"]
    if "flip" in draws:
        table[:, 3] = draws["flip"]
    if "erase_box" in draws:
        table[:, 4:8] = draws["erase_box"]
        table[:, 8] = draws["erase_color"] @ _COLOR_WEIGHTS
    if cutout:  # last, as in the graphs
        table[:, -5:-3] = draws["cutout"]
        table[:, -3:-1] = cutout
        table[:, -1] = cutout_color @ _COLOR_WEIGHTS
    return table


class TritonBackend(CopyBackend):
    """A Triton kernel crops, flips and erases, without DALI. It also gathers the images of a resident split."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.transforms, AugConfig)
        self._aug = spec.transforms
        self._color = grey_levels(spec.split.dataset.mean)

    def inputs(self, draws: Draws) -> Draws:
        """Return the draws as the single array 'table'; see `draw_table`."""
        return {"table": draw_table(draws, self._aug.cutout, self._color)}

    def source(self, slots: int, slot_size: int) -> SampleSource:
        if self.spec.pixels is None:
            return super().source(slots, slot_size)
        size = self.spec.image_size
        return ResidentTransforms(self.spec.pixels, self.image_shape, size, slot_size, slots, self._aug.padding_mode)

    def runner(self) -> Runner:
        if self.spec.pixels is not None:
            return super().runner()
        assert self.stream is not None
        size, padding_mode = self.spec.image_size, self._aug.padding_mode
        return TransformingRunner(self.spec.device, self.stream, size, padding_mode, self.spec.views)


class ResidentTransforms(SampleSource):
    """Source that gathers and transforms each batch of a split in GPU memory with one kernel launch.

    Each batch is a new tensor; see `DevicePixels`.

    Args:
        pixels: uint8 [N, H * W * 3] on the GPU.
        shape: (H, W, 3) of the stored images.
        size: Height and width of the output, pixels.
        batch_size: Images per slot.
        slots: Number of slots.
        padding_mode: See `crop_flip_erase`.
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
        self._slots, self._batch_size = slots, batch_size
        self._inputs: DeviceInputs | None = None  # created by the first batch, which gives the number of columns

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, size, size, 3], written on the current stream.

        Args:
            slot: Slot whose buffers are used to copy the indices and draws to the GPU.
            indices: Sample indices, int64 [B].
            draws: 'table', the result of `draw_table`.
        """
        table, samples = draws["table"], len(indices)
        if self._inputs is None:
            self._inputs = DeviceInputs(self._slots, (self._batch_size, table.shape[1]), self._pixels.device)
        host = self._inputs.host(slot)
        host[:samples] = table
        host[:samples, 0] = indices
        return crop_flip_erase(
            self._pixels,
            self._inputs.to_device(slot),
            self._pixels.new_empty((samples, self._size, self._size, 3)),
            shape=self._shape,
            padding_mode=self._padding_mode,
        )


class TransformingRunner(CopyRunner):
    """Runner that copies batches to a GPU and transforms them there, on the stream of the copies."""

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream, size: int, padding_mode: PaddingMode, views: int = 1
    ) -> None:
        super().__init__(device, stream, views)
        self._size, self._padding_mode = size, padding_mode

    def tables(self, draws: Draws) -> list[np.ndarray]:
        table = draws["table"]
        table[:, 0] = np.arange(len(table)) // self._views
        return [table]

    def transform(self, images: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
        samples, height, width, channels = images.shape
        out = images.new_empty((samples * self._views, self._size, self._size, channels))
        shape = (height, width, channels)
        return crop_flip_erase(images, tables[0], out, shape=shape, padding_mode=self._padding_mode)
