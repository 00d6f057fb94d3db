"""Training and evaluation transforms on the CPU, equivalent to those of `dali_graph`.

DALI's CPU operators set up every sample and copy the images from operator to operator. Here, a few kernel calls read
the stored or decoded pixels and write them to the batch. Resized pixels may differ from DALI's by one gray level,
because float32 sums are computed in a different order. Each operation of an augmentation program differs from
torchvision's by at most one gray level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configs.schema import AugConfig, PaddingMode
from pipelines.augment.ops import Programs, grey_levels
from pipelines.cpu import batch
from pipelines.cpu import programs as program_kernels

Draws = dict[str, np.ndarray]
Region = Callable[["Images", Draws], tuple[np.ndarray, np.ndarray]]


class Images(NamedTuple):
    """Images of a batch. Their pixels are in one flat array, in HWC order."""

    content: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [B], bytes
    heights: np.ndarray  # int64 [B], pixels
    widths: np.ndarray


Stage = Callable[[Images, Draws, np.ndarray], None]  # writes uint8 [B, side, side, 3]
Change = Callable[[Draws, np.ndarray], None]  # changes uint8 [B, side, side, 3] in place


@dataclass(frozen=True)
class CpuGraph:
    """Graph that runs one or two stages (a resize, a crop and flip, or both) and then changes the result in place.

    The batch is processed in small pieces that stay in the cache, unless the graph is a single stage without changes.
    """

    stages: tuple[Stage, ...]
    sides: tuple[int, ...]  # height and width of the images that each stage writes, pixels
    changes: tuple[Change, ...]
    _scratch: deque[np.ndarray]  # spare output buffers of the first of two stages

    CHUNK = 2**18  # bytes that the first stage writes per piece

    def __call__(self, images: Images, draws: Draws, out: np.ndarray) -> None:
        """Transform a batch and write the result to `out`, uint8 [B, size, size, 3]. Thread-safe."""
        if len(self.stages) == 1 and not self.changes:
            self.stages[0](images, draws, out)
            return
        side, count = self.sides[0], len(images.offsets)
        step = max(1, self.CHUNK // (side * side * 3))
        for start in range(0, count, step):
            piece = slice(start, min(start + step, count))
            some = {name: values[piece] for name, values in draws.items()}
            self._run_stages(Images(images.content, *(values[piece] for values in images[1:])), some, step, out[piece])
            for change in self.changes:
                change(some, out[piece])

    def _run_stages(self, images: Images, draws: Draws, capacity: int, out: np.ndarray) -> None:
        """Run the stages, without the in-place changes, on at most `capacity` images."""
        if len(self.stages) == 1:
            self.stages[0](images, draws, out)
            return
        side, count = self.sides[0], len(out)
        try:
            between = self._scratch.pop()
        except IndexError:
            between = np.empty((capacity, side, side, 3), np.uint8)
        self.stages[0](images, draws, between[:count])
        sides = np.full(count, side)
        given = Images(between.reshape(-1), np.arange(count) * (side * side * 3), sides, sides)
        self.stages[1](given, draws, out)
        self._scratch.append(between)


def train_graph(
    image_shape: tuple[int, int, int] | None,
    aug: AugConfig,
    size: int,
    interpolation: str,
    antialias: bool,
    programs: Programs | None,
    mean: tuple[float, float, float],
) -> CpuGraph | None:
    """Build the training transforms for the draws of `AugmentationSampler`.

    Args:
        image_shape: Shape of all stored images, or None if shapes differ.
        aug: Config section `aug`.
        size: Height and width of the output, pixels.
        interpolation: "bilinear" or "bicubic".
        antialias: Whether to widen the filter by the scale factor when downscaling.
        programs: Result of `build_programs`, or None if there are no programs.
        mean: Per-channel mean of the train split's pixels, 0 to 1.

    Returns:
        The graph, or None if stored pixels need no transforms.
    """
    changes = _changes(aug, programs, mean)
    if aug.crop == "random-resized":
        region = _resize(lambda _, draws: (draws["crop_start"], draws["crop_end"]), interpolation, antialias)
        return _graph([(region, size)], changes)
    if aug.crop == "squash":
        stages = _squashed(image_shape, size, interpolation, antialias)
    else:
        stages = _central(image_shape, size, size, interpolation, antialias)
    if aug.crop == "pad" or aug.flip > 0:
        stages.append((_crop_flip(size, padding_mode=aug.padding_mode), size))
    if changes and not stages:
        stages.append((_crop_flip(size), size))  # unlike `batch.copy`, leaves the pixels in the cache
    return _graph(stages, changes)


def eval_graph(
    image_shape: tuple[int, int, int] | None,
    size: int,
    crop_fraction: float,
    interpolation: str,
    antialias: bool,
    squash: bool,
) -> CpuGraph | None:
    """Build the evaluation transforms.

    Args:
        image_shape: Shape of all stored images, or None if shapes differ.
        size, crop_fraction, interpolation, antialias, squash: See `dali_graph.eval_graph`.

    Returns:
        The graph, or None if stored pixels need no transforms.
    """
    if not squash:
        return _graph(_central(image_shape, round(size / crop_fraction), size, interpolation, antialias))
    return _graph(_squashed(image_shape, size, interpolation, antialias))


def _graph(stages: list[tuple[Stage, int]], changes: tuple[Change, ...] = ()) -> CpuGraph | None:
    if not stages:
        return None
    return CpuGraph(tuple(stage for stage, _ in stages), tuple(side for _, side in stages), changes, deque())


def _changes(aug: AugConfig, programs: Programs | None, mean: tuple[float, float, float]) -> tuple[Change, ...]:
    """Return the enabled in-place changes: programs, erasing and cutout, in this order."""
    changes: list[Change] = []
    if programs is not None:
        bilinear, fill, radius = programs.bilinear, np.array(programs.fill, np.uint8), programs.radius
        changes.append(
            lambda draws, out: program_kernels.apply_programs(
                out, draws["ops"], draws["values"], bilinear, fill, radius
            )
        )
    if aug.erase.probability > 0:
        changes.append(lambda draws, out: program_kernels.paint(out, draws["erase_box"], draws["erase_color"]))
    if aug.cutout > 0:  # after the programs, which would change the fill color
        side, color = aug.cutout, np.array(grey_levels(mean), np.uint8)

        def cut_out(draws: Draws, out: np.ndarray) -> None:
            boxes = np.full((len(out), 4), side, np.int32)
            boxes[:, :2] = draws["cutout"]
            program_kernels.paint(out, boxes, np.tile(color, (len(out), 1)))

        changes.append(cut_out)
    return tuple(changes)


def _central(
    shape: tuple[int, int, int] | None, shorter: int, size: int, interpolation: str, antialias: bool
) -> list[tuple[Stage, int]]:
    """Return a list with a stage that resizes the shorter side to `shorter` and crops the central size x size pixels.

    If no stored image needs resizing, the stage only crops. If no image needs cropping either, the list is empty.
    """
    if shape is not None and shape[:2] == (shorter, shorter) and shorter == size:
        return []
    if shape is not None and min(shape[:2]) == shorter:
        corner = [(side - size) // 2 for side in shape[:2]]
        return [(_crop_flip(size, tuple(corner)), size)]
    return [(_resize(lambda images, _: _central_region(images, shorter, size), interpolation, antialias), size)]


def _squashed(
    shape: tuple[int, int, int] | None, size: int, interpolation: str, antialias: bool
) -> list[tuple[Stage, int]]:
    """Return a list with a stage that resizes to size x size, or an empty list if all stored images have this size."""
    if shape is not None and shape[:2] == (size, size):
        return []
    return [(_resize(lambda images, _: _whole(images), interpolation, antialias), size)]


def _whole(images: Images) -> tuple[np.ndarray, np.ndarray]:
    end = np.stack([images.heights, images.widths], axis=1).astype(np.float32)
    return np.zeros_like(end), end


def _central_region(images: Images, shorter: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the region of each stored image that becomes its central crop if the shorter side is resized to `shorter`.

    As in DALI, both sides are scaled by the same factor, and the longer side is rounded to whole pixels about its
    center.

    Returns:
        The top-left and bottom-right corners (y, x) of the regions, float32 [B, 2] each, in pixels of stored images.
    """
    sides = np.stack([images.heights, images.widths], axis=1).astype(np.float64)
    scale = sides.min(axis=1, keepdims=True) / shorter  # source pixels per target pixel
    resized = np.rint(sides / scale)
    start = (sides - resized * scale) / 2 + (resized - size) // 2 * scale
    return start.astype(np.float32), (start + size * scale).astype(np.float32)


def _resize(region: Region, interpolation: str, antialias: bool) -> Stage:
    def stage(images: Images, draws: Draws, out: np.ndarray) -> None:
        batch.resize(*images, *region(images, draws), interpolation == "bicubic", antialias, out)

    return stage


def _crop_flip(size: int, corner: tuple[int, ...] = (0, 0), padding_mode: PaddingMode = PaddingMode.CONSTANT) -> Stage:
    """Return a stage that crops and flips images that all have the same shape.

    Args:
        size: Height and width of the crop, pixels.
        corner: Top-left corner (y, x) of the crop if the draws have no offset, pixels.
        padding_mode: How to fill pixels outside an image.
    """
    reflects = padding_mode == PaddingMode.REFLECT

    def stage(images: Images, draws: Draws, out: np.ndarray) -> None:
        count = len(out)
        offsets = draws.get("offset")
        if offsets is None:
            offsets = np.broadcast_to(np.array(corner, np.int32), (count, 2)).copy()
        flips = draws.get("flip")
        if flips is None:
            flips = np.zeros(count, np.int32)
        height, width = int(images.heights[0]), int(images.widths[0])
        batch.crop_flip(images.content, images.offsets, height, width, offsets, flips, reflects, out)

    return stage
