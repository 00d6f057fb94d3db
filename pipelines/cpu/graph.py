"""Training and evaluation transforms on the CPU, equivalent to those of `dali_graph`.

DALI's CPU operators set up every sample and copy the images from operator to operator. Here, a few kernel calls read
the stored or decoded pixels and write them to the batch. Resized pixels may differ from DALI's by one gray level,
because float32 sums are computed in a different order. Each operation of an augmentation program differs from
torchvision's by at most one gray level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from configs.schema import AugConfig, PaddingMode
from pipelines.augment.ops import Programs, grey_levels
from pipelines.cpu import batch
from pipelines.cpu import programs as program_kernels

Draws = dict[str, np.ndarray]
Change = Callable[[Draws, np.ndarray], None]  # changes uint8 [B, side, side, 3] in place


class Parts(NamedTuple):
    """The parts of a batch's images that a graph reads."""

    boxes: np.ndarray  # int64 [B, 4] (top, left, bottom, right), in pixels of the reduced images
    denominators: (
        np.ndarray
    )  # int64 [B], 1, 2, 4 or 8; each image is reduced to 1 / denominator of its size, rounded up


class Images(NamedTuple):
    """Images of a batch, or parts of them. The pixels are in one flat array, in HWC order."""

    content: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [B], bytes
    heights: np.ndarray  # int64 [B], pixels of whole images at full size
    widths: np.ndarray
    parts: Parts | None = None  # that `content` holds; None: whole images

    def take(self, piece: slice | np.ndarray) -> Images:
        """Return a part of the batch: a slice, or the images at these places, int64 [N]."""
        parts = None if self.parts is None else Parts(*(values[piece] for values in self.parts))
        return Images(self.content, self.offsets[piece], self.heights[piece], self.widths[piece], parts)


Region = Callable[[np.ndarray, np.ndarray, Draws], tuple[np.ndarray, np.ndarray]]


class Stage(NamedTuple):
    """Resize, or crop and flip, of a batch."""

    side: int  # height and width of the images that the stage writes, pixels
    run: Callable[[Images, Draws, np.ndarray], None]  # writes uint8 [B, side, side, 3]
    parts: Callable[[np.ndarray, np.ndarray, Draws, bool], Parts] | None = None  # None: needs whole images


@dataclass(frozen=True)
class CpuGraph:
    """Graph that runs one or two stages (a resize, a crop and flip, or both) and then changes the result in place.

    The batch is processed in small pieces that stay in the cache, unless the graph is a single stage without changes.
    """

    stages: tuple[Stage, ...]
    changes: tuple[Change, ...]
    _scratch: deque[np.ndarray] = field(default_factory=deque)  # spare output buffers of the first of two stages

    CHUNK = 2**18  # bytes that the first stage writes per piece

    def parts(self, heights: np.ndarray, widths: np.ndarray, draws: Draws, reduces: bool) -> Parts:
        """Return the parts of images that the graph reads.

        Args:
            heights, widths: int64 [B], size of each image, pixels.
            draws: The draws that the graph will be called with.
            reduces: Whether to reduce images by a power of 2, as long as the region to resize is not enlarged.
        """
        if self.stages[0].parts is None:
            return whole_parts(heights, widths)
        return self.stages[0].parts(heights, widths, draws, reduces)

    def __call__(self, images: Images, draws: Draws, out: np.ndarray) -> None:
        """Transform a batch and write the result to `out`, uint8 [B, size, size, 3]. Thread-safe."""
        first = self.stages[0]
        if len(self.stages) == 1 and not self.changes:
            first.run(images, draws, out)
            return
        step = max(1, self.CHUNK // (first.side * first.side * 3))
        for start in range(0, len(images.offsets), step):
            piece = slice(start, start + step)
            some = {name: values[piece] for name, values in draws.items()}
            self._run_stages(images.take(piece), some, step, out[piece])
            for change in self.changes:
                change(some, out[piece])

    def _run_stages(self, images: Images, draws: Draws, capacity: int, out: np.ndarray) -> None:
        """Run the stages, without the in-place changes, on at most `capacity` images."""
        if len(self.stages) == 1:
            self.stages[0].run(images, draws, out)
            return
        first, second = self.stages
        side, count = first.side, len(out)
        try:
            between = self._scratch.pop()
        except IndexError:
            between = np.empty((capacity, side, side, 3), np.uint8)
        first.run(images, draws, between[:count])
        sides = np.full(count, side)
        second.run(Images(between.reshape(-1), np.arange(count) * (side * side * 3), sides, sides), draws, out)
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
        stage = _resize(
            size, lambda heights, widths, draws: (draws["crop_start"], draws["crop_end"]), interpolation, antialias
        )
        return CpuGraph((stage,), changes)
    shorter = None if aug.crop == "squash" else size
    stages = _fixed_stages(image_shape, shorter, size, interpolation, antialias)
    if aug.crop == "pad" or aug.flip > 0:
        stages.append(_crop_flip(size, padding_mode=aug.padding_mode))
    if changes and not stages:
        stages.append(_crop_flip(size))  # unlike `batch.copy`, leaves the pixels in the cache
    return CpuGraph(tuple(stages), changes) if stages else None


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
    shorter = None if squash else round(size / crop_fraction)
    stages = _fixed_stages(image_shape, shorter, size, interpolation, antialias)
    return CpuGraph(tuple(stages), ()) if stages else None


def _changes(aug: AugConfig, programs: Programs | None, mean: tuple[float, float, float]) -> tuple[Change, ...]:
    """Return the enabled in-place changes: programs, erasing and cutout, in this order."""
    changes: list[Change] = []
    if programs is not None:
        settings = programs.bilinear, np.array(programs.fill, np.uint8), programs.radius
        changes.append(lambda draws, out: program_kernels.apply_programs(out, draws["ops"], draws["values"], *settings))
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


def _fixed_stages(
    shape: tuple[int, int, int] | None, shorter: int | None, size: int, interpolation: str, antialias: bool
) -> list[Stage]:
    """Return a list with a stage that resizes the shorter side to `shorter` and crops the central size x size pixels.

    If `shorter` is None, the stage resizes both sides to `size`. If no stored image needs resizing, the stage only
    crops. If no image needs cropping either, the list is empty.
    """
    if shape is not None and shape[:2] == (size, size) and shorter in (None, size):
        return []
    if shorter is None:
        return [_resize(size, lambda heights, widths, _: _whole(heights, widths), interpolation, antialias)]
    if shape is not None and min(shape[:2]) == shorter:
        return [_crop_flip(size, ((shape[0] - size) // 2, (shape[1] - size) // 2))]

    def central(heights: np.ndarray, widths: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        return _central_region(heights, widths, shorter, size)

    return [_resize(size, central, interpolation, antialias)]


def _whole(heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    end = np.stack([heights, widths], axis=1).astype(np.float32)
    return np.zeros_like(end), end


def _central_region(heights: np.ndarray, widths: np.ndarray, shorter: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the region of each stored image that becomes its central crop if the shorter side is resized to `shorter`.

    As in DALI, both sides are scaled by the same factor, and the longer side is rounded to whole pixels about its
    center.

    Returns:
        The top-left and bottom-right corners (y, x) of the regions, float32 [B, 2] each, in pixels of stored images.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.float64)
    scale = sides.min(axis=1, keepdims=True) / shorter  # source pixels per target pixel
    resized = np.rint(sides / scale)
    start = (sides - resized * scale) / 2 + (resized - size) // 2 * scale
    return start.astype(np.float32), (start + size * scale).astype(np.float32)


def _resize(size: int, region: Region, interpolation: str, antialias: bool) -> Stage:
    """Return a stage that resizes the given region of each image to size x size pixels."""
    is_cubic = interpolation == "bicubic"
    reach = 2 if is_cubic else 1  # radius of the filter, see `batch.resize`

    def parts(heights: np.ndarray, widths: np.ndarray, draws: Draws, reduces: bool) -> Parts:
        starts, ends = region(heights, widths, draws)
        denominators = _denominators(np.abs(ends - starts).min(axis=1) / size, reduces)
        low, high = (corner / denominators[:, None] for corner in (np.minimum(starts, ends), np.maximum(starts, ends)))
        reached = reach * (np.maximum((high - low) / size, 1) if antialias else 1) + 1  # one more for rounding
        sides = np.stack([_reduced(heights, denominators), _reduced(widths, denominators)], axis=1)
        first = np.clip(np.floor(low - reached), 0, sides - 1)
        last = np.clip(np.ceil(high + reached), first + 1, sides)
        return Parts(np.concatenate([first, last], axis=1).astype(np.int64), denominators)

    def run(images: Images, draws: Draws, out: np.ndarray) -> None:
        content, offsets, heights, widths, stored = images
        starts, ends = region(heights, widths, draws)
        boxes, denominators = stored or whole_parts(heights, widths)
        if denominators.max() > 1:
            heights, widths = _reduced(heights, denominators), _reduced(widths, denominators)
            scales = (1 / denominators[:, None]).astype(np.float32)
            starts, ends = starts * scales, ends * scales
        batch.resize(content, offsets, heights, widths, boxes, starts, ends, is_cubic, antialias, out)

    return Stage(size, run, parts)


def whole_parts(heights: np.ndarray, widths: np.ndarray) -> Parts:
    """Return whole images at full size as parts."""
    boxes = np.zeros((len(heights), 4), np.int64)
    boxes[:, 2], boxes[:, 3] = heights, widths
    return Parts(boxes, np.ones(len(heights), np.int64))


def _denominators(scales: np.ndarray, reduces: bool) -> np.ndarray:
    """Return the largest of 1, 2, 4 and 8 that is at most the scale, int64 [B], or 1 if `reduces` is False.

    `scales` are source pixels per target pixel, float32 [B].
    """
    if not reduces:
        return np.ones(len(scales), np.int64)
    return 1 << np.searchsorted(np.array([2, 4, 8], np.float32), scales, side="right").astype(np.int64)


def _reduced(sides: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return -(-sides // denominators)


def _crop_flip(size: int, corner: tuple[int, int] = (0, 0), padding_mode: PaddingMode = PaddingMode.CONSTANT) -> Stage:
    """Return a stage that crops and flips images that all have the same shape.

    Args:
        size: Height and width of the crop, pixels.
        corner: Top-left corner (y, x) of the crop if the draws have no offset, pixels.
        padding_mode: How to fill pixels outside an image.
    """
    reflects = padding_mode == PaddingMode.REFLECT

    def run(images: Images, draws: Draws, out: np.ndarray) -> None:
        offsets, flips = draws.get("offset"), draws.get("flip")
        if offsets is None:
            offsets = np.tile(np.array(corner, np.int32), (len(out), 1))
        if flips is None:
            flips = np.zeros(len(out), np.int32)
        height, width = int(images.heights[0]), int(images.widths[0])
        batch.crop_flip(images.content, images.offsets, height, width, offsets, flips, reflects, out)

    return Stage(size, run)
