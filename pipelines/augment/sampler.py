"""Draw the augmentation of a training batch, except for mixup and CutMix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.schema import AugConfig
from pipelines.augment import geometry, policies
from pipelines.augment.ops import Programs, grey_levels


@dataclass(frozen=True)
class AugmentationSampler:
    """Draw the augmentation of each sample as a pure function of seed, epoch and sample index.

    Args:
        aug: Config section `aug`.
        programs: Result of `build_programs`.
        seed: Seed of the run.
        size: Height and width of training images, pixels.
        heights, widths: Size of each stored image, pixels, int [samples].
        mean, std: Per-channel mean and standard deviation of the train split, for pixels scaled to 0..1.
    """

    aug: AugConfig
    programs: Programs | None
    seed: int
    size: int
    heights: np.ndarray
    widths: np.ndarray
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Draw the augmentation of `samples`, int64 [B].

        Returns:
            A dict with whichever of these arrays `aug` needs:
            crop_start, crop_end: float32 [B, 2] (y, x), top-left and bottom-right corners of the crop region, pixels.
                For a flipped sample, the x coordinates of the two corners are swapped.
            offset: int32 [B, 2] (y, x), top-left corner of the crop, relative to the unpadded image, pixels.
            flip: int32 [B], 1 for a flipped sample, otherwise 0.
            ops, values: int32 and float32 [B, slots], augmentation programs; see `pipelines.augment.ops`.
            erase_box: int32 [B, 4], top, left, height and width, pixels; a height of 0 erases nothing.
            erase_color: uint8 [B, 3], RGB.
            cutout: float32 [B, 2] (y, x), top-left corner of the square, pixels.
        """
        return (
            self._draw_geometry(epoch, samples) | self._draw_programs(epoch, samples) | self._draw_boxes(epoch, samples)
        )

    def _draw_geometry(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        aug, seed = self.aug, self.seed
        draw_flips = geometry.alternating_flips if aug.flip_mode == "alternating" else geometry.flips
        flips = draw_flips(samples, seed, epoch, aug.flip) if aug.flip > 0 else None
        if aug.crop == "random-resized":
            heights, widths = self.heights[samples], self.widths[samples]
            boxes = geometry.random_resized_crops(samples, seed, epoch, heights, widths, aug.scale, aug.ratio)
            start, end = boxes[:, :2].astype(np.float32), (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
            if flips is not None:  # the resamplers mirror a region whose end is left of its start
                mirrored = flips == 1
                start[mirrored, 1], end[mirrored, 1] = end[mirrored, 1], start[mirrored, 1]
            return {"crop_start": start, "crop_end": end}
        draws: dict[str, np.ndarray] = {}
        if aug.crop == "pad":
            draws["offset"] = geometry.pad_crop_offsets(samples, seed, epoch, aug.padding)
        if flips is not None:
            draws["flip"] = flips
        return draws

    def _draw_programs(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        if self.programs is None:
            return {}
        ops, values = policies.draw_programs(self.aug, samples, self.seed, epoch, self.size)
        return {"ops": ops, "values": values}

    def _draw_boxes(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        seed, size, erase, cutout = self.seed, self.size, self.aug.erase, self.aug.cutout
        draws: dict[str, np.ndarray] = {}
        if erase.probability > 0:
            draws["erase_box"] = geometry.erase_boxes(
                samples, seed, epoch, size, erase.probability, erase.scale, erase.ratio
            )
            if erase.fill == "random":
                draws["erase_color"] = geometry.erase_colors(samples, seed, epoch, self.mean, self.std)
            else:
                color = grey_levels(self.mean) if erase.fill == "mean" else (0, 0, 0)
                draws["erase_color"] = np.tile(np.array(color, np.uint8), (len(samples), 1))
        if cutout > 0:
            draws["cutout"] = geometry.cutout_corners(samples, seed, epoch, size, cutout).astype(np.float32)
        return draws


def draw_views(samplers: Sequence[AugmentationSampler], epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Draw the augmentation of each view of `samples`, int64 [B], with the sampler of the view.

    Returns:
        The arrays of `AugmentationSampler`, [B * views, ...] each. The views of a sample are next to each other.
    """
    drawn = [sampler(epoch, samples) for sampler in samplers]
    if len(drawn) == 1:
        return drawn[0]
    return {
        name: np.stack([draws[name] for draws in drawn], axis=1).reshape(-1, *drawn[0][name].shape[1:])
        for name in drawn[0]
    }
