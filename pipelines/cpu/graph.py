"""The graphs of `graph` for the CPU: the same inputs, the same pixels, by the loops in the kernels.

DALI's operators for the CPU set up every sample of every operator and copy between them; here a batch is a few calls
that read from the files' maps and write into the batch. Pixels may differ from DALI's by one grey level where they are
resized, since float32 sums in another order fall on the other side of a half; programs are torchvision's to the same
degree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configs.schema import AugConfig
from pipelines.augment.ops import Programs, grey_levels
from pipelines.cpu import batch
from pipelines.cpu import programs as program_kernels

Draws = dict[str, np.ndarray]
Region = Callable[["Images", Draws], tuple[np.ndarray, np.ndarray]]


class Images(NamedTuple):
    """The images of a batch in one flat array, each in HWC order."""

    content: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [B]
    heights: np.ndarray  # int64 [B]
    widths: np.ndarray


Stage = Callable[[Images, Draws, np.ndarray], None]  # writes uint8 [B, side, side, 3]
Change = Callable[[Draws, np.ndarray], None]  # of uint8 [B, side, side, 3], in place


@dataclass(frozen=True)
class CpuGraph:
    """One or two stages, then changes in place; small pieces of the batch go all the way, so they stay in the cache."""

    stages: tuple[Stage, ...]
    sides: tuple[int, ...]  # of the square images that each stage gives, pixels
    changes: tuple[Change, ...]
    _scratch: deque[np.ndarray]  # for the first of two stages

    CHUNK = 2**18  # bytes of a piece

    def __call__(self, images: Images, draws: Draws, out: np.ndarray) -> None:
        """Write out, uint8 [B, size, size, 3]; may be called by several threads."""
        if len(self.stages) == 1 and not self.changes:
            self.stages[0](images, draws, out)
            return
        side, count = self.sides[0], len(images.offsets)
        step = max(1, self.CHUNK // (side * side * 3))
        for start in range(0, count, step):
            piece = slice(start, min(start + step, count))
            some = {name: values[piece] for name, values in draws.items()}
            self._stages(Images(images.content, *(values[piece] for values in images[1:])), some, step, out[piece])
            for change in self.changes:
                change(some, out[piece])

    def _stages(self, images: Images, draws: Draws, most: int, out: np.ndarray) -> None:
        """The stages alone, for at most `most` images."""
        if len(self.stages) == 1:
            self.stages[0](images, draws, out)
            return
        side, count = self.sides[0], len(out)
        try:
            between = self._scratch.pop()
        except IndexError:
            between = np.empty((most, side, side, 3), np.uint8)
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
    """`graph.train_graph`; None where stored pixels stay.

    image_shape: of the stored images, where all have one; mean: of the train split's pixels, from 0 to 1. Draws:
    crop_start and crop_end, or offset and flip; ops and values; erase_box (int32 [B, 4]: top, left, height, width in
    pixels) and erase_color (uint8 [B, 3]); cutout (float32 [B, 2]: top, left).
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
        stages.append((_crop_flip(size, reflects=aug.padding_mode == "reflect"), size))
    if changes and not stages:
        stages.append((_crop_flip(size), size))  # a copy, which unlike `kernels.copy` leaves pixels in the cache
    return _graph(stages, changes)


def eval_graph(
    image_shape: tuple[int, int, int] | None,
    size: int,
    crop_fraction: float,
    interpolation: str,
    antialias: bool,
    squash: bool,
) -> CpuGraph | None:
    """`graph.eval_graph`; None where stored pixels stay."""
    if not squash:
        return _graph(_central(image_shape, round(size / crop_fraction), size, interpolation, antialias))
    return _graph(_squashed(image_shape, size, interpolation, antialias))


def _graph(stages: list[tuple[Stage, int]], changes: tuple[Change, ...] = ()) -> CpuGraph | None:
    if not stages:
        return None
    return CpuGraph(tuple(stage for stage, _ in stages), tuple(side for _, side in stages), changes, deque())


def _changes(aug: AugConfig, programs: Programs | None, mean: tuple[float, float, float]) -> tuple[Change, ...]:
    """What is done in place: programs, erasing, cutout."""
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
    if aug.cutout > 0:  # after the colours have changed, or its own would
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
    """Shorter side to `shorter`, then the central size x size crop, as far as the stored shape needs either."""
    if shape is not None and shape[:2] == (shorter, shorter) and shorter == size:
        return []
    if shape is not None and min(shape[:2]) == shorter:
        corner = [(side - size) // 2 for side in shape[:2]]
        return [(_crop_flip(size, tuple(corner)), size)]
    return [(_resize(lambda images, _: _central_region(images, shorter, size), interpolation, antialias), size)]


def _squashed(
    shape: tuple[int, int, int] | None, size: int, interpolation: str, antialias: bool
) -> list[tuple[Stage, int]]:
    """Resize both sides to `size`, unless the stored images have that size."""
    if shape is not None and shape[:2] == (size, size):
        return []
    return [(_resize(lambda images, _: _whole(images), interpolation, antialias), size)]


def _whole(images: Images) -> tuple[np.ndarray, np.ndarray]:
    end = np.stack([images.heights, images.widths], axis=1).astype(np.float32)
    return np.zeros_like(end), end


def _central_region(images: Images, shorter: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each image that the central crop shows once its shorter side has been resized to `shorter`.

    As in DALI, both sides are scaled by one factor, and the longer one is rounded to whole pixels about its centre.
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


def _crop_flip(size: int, corner: tuple[int, ...] = (0, 0), reflects: bool = False) -> Stage:
    """A crop at the drawn offset (else at `corner`), and the drawn flip, of images of one shape."""

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
