"""The graphs of `graph` for the CPU: the same inputs, the same pixels, by the loops in `kernels`.

DALI's operators for the CPU set up every sample of every operator and copy between them; here a batch is one or two
calls that read from the files' maps and write into the batch. Resized pixels may differ from DALI's by one grey level,
where float32 sums in another order fall on the other side of a half. Colour jitter and
cutout are left to DALI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configs.schema import AugConfig
from pipelines import kernels

Draws = dict[str, np.ndarray]
Region = Callable[["Images", Draws], tuple[np.ndarray, np.ndarray]]


class Images(NamedTuple):
    """The images of a batch in one flat array, each in HWC order."""

    content: np.ndarray  # uint8 [bytes]
    begins: np.ndarray  # int64 [B]
    heights: np.ndarray  # int64 [B]
    widths: np.ndarray


Stage = Callable[[Images, Draws, np.ndarray], None]  # writes uint8 [B, side, side, 3]


@dataclass(frozen=True)
class CpuGraph:
    """One or two stages; the first one's result lies in a small piece of memory that stays in the cache."""

    stages: tuple[Stage, ...]
    sides: tuple[int, ...]  # of the square images that each stage gives, pixels
    _scratch: deque[np.ndarray]

    CHUNK = 2**18  # bytes between two stages

    def __call__(self, images: Images, draws: Draws, out: np.ndarray) -> None:
        """Write out, uint8 [B, size, size, 3]; may be called by several threads."""
        if len(self.stages) == 1:
            self.stages[0](images, draws, out)
            return
        side, count = self.sides[0], len(images.begins)
        step = max(1, self.CHUNK // (side * side * 3))
        try:
            between = self._scratch.pop()
        except IndexError:
            between = np.empty((step, side, side, 3), np.uint8)
        begins, sides = np.arange(step) * (side * side * 3), np.full(step, side)
        for start in range(0, count, step):
            piece = slice(start, min(start + step, count))
            size = piece.stop - start
            some = {name: values[piece] for name, values in draws.items()}
            self.stages[0](Images(images.content, *(values[piece] for values in images[1:])), some, between[:size])
            given = Images(between.reshape(-1), begins[:size], sides[:size], sides[:size])
            self.stages[1](given, some, out[piece])
        self._scratch.append(between)


def train_graph(
    image_shape: tuple[int, int, int] | None, aug: AugConfig, size: int, interpolation: str
) -> CpuGraph | None:
    """`graph.train_graph` without colour jitter and cutout; None where stored pixels stay.

    image_shape: of the stored images, where all have one.
    """
    if aug.crop == "random-resized":
        return _graph((_resize(lambda _, draws: (draws["crop_start"], draws["crop_end"]), interpolation), size))
    stages = _central(image_shape, size, size, interpolation)
    if aug.crop == "pad" or aug.flip > 0:
        stages.append((_crop_flip(size, reflects=aug.padding_mode == "reflect"), size))
    return _graph(*stages)


def eval_graph(
    image_shape: tuple[int, int, int] | None, size: int, crop_fraction: float, interpolation: str
) -> CpuGraph | None:
    """`graph.eval_graph`; None where stored pixels stay."""
    return _graph(*_central(image_shape, round(size / crop_fraction), size, interpolation))


def _graph(*stages: tuple[Stage, int]) -> CpuGraph | None:
    return CpuGraph(tuple(s for s, _ in stages), tuple(side for _, side in stages), deque()) if stages else None


def _central(
    shape: tuple[int, int, int] | None, shorter: int, size: int, interpolation: str
) -> list[tuple[Stage, int]]:
    """Shorter side to `shorter`, then the central size x size crop, as far as the stored shape needs either."""
    if shape is not None and shape[:2] == (shorter, shorter) and shorter == size:
        return []
    if shape is not None and min(shape[:2]) == shorter:
        corner = [(side - size) // 2 for side in shape[:2]]
        return [(_crop_flip(size, tuple(corner)), size)]
    return [(_resize(lambda images, _: _central_region(images, shorter, size), interpolation), size)]


def _central_region(images: Images, shorter: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each image that the central crop shows once its shorter side has been resized to `shorter`.

    As in DALI, both sides are scaled by one factor, and the longer one is rounded to whole pixels about its centre.
    """
    sides = np.stack([images.heights, images.widths], axis=1).astype(np.float64)
    scale = sides.min(axis=1, keepdims=True) / shorter  # source pixels per target pixel
    resized = np.rint(sides / scale)
    start = (sides - resized * scale) / 2 + (resized - size) // 2 * scale
    return start.astype(np.float32), (start + size * scale).astype(np.float32)


def _resize(region: Region, interpolation: str) -> Stage:
    def stage(images: Images, draws: Draws, out: np.ndarray) -> None:
        kernels.resize(*images, *region(images, draws), interpolation == "bicubic", out)

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
        kernels.crop_flip(images.content, images.begins, height, width, offsets, flips, reflects, out)

    return stage
