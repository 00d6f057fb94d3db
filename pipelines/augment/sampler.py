"""All that is drawn for the samples of a training batch, as the inputs that the graphs take. Knows no loader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.schema import AugConfig
from pipelines.augment import geometry, policies
from pipelines.augment.ops import Programs, grey_levels
from pipelines.gpu import dali_graph
from pipelines.storage.split import Split


@dataclass(frozen=True)
class AugmentationSampler:
    """Called with an epoch and sample indices, gives the graph's inputs beside the images, each [N, ...]."""

    aug: AugConfig
    split: Split
    programs: Programs | None
    seed: int
    size: int  # of the images that training sees, pixels
    uses_dali: bool  # which takes some inputs in another form

    def __call__(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        return self._geometry(epoch, samples) | self._program(epoch, samples) | self._painted(epoch, samples)

    def _geometry(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        aug, split, seed = self.aug, self.split, self.seed
        draw_flips = geometry.alternating_flips if aug.flip_mode == "alternating" else geometry.flips
        flips = draw_flips(samples, seed, epoch, aug.flip) if aug.flip > 0 else None
        if aug.crop == "random-resized":
            heights, widths = split.heights[samples], split.widths[samples]
            boxes = geometry.random_resized_crops(samples, seed, epoch, heights, widths, aug.scale, aug.ratio)
            start, end = boxes[:, :2].astype(np.float32), (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
            if flips is not None:
                mirrored = flips == 1
                start[mirrored, 1], end[mirrored, 1] = end[mirrored, 1], start[mirrored, 1]
            return {"crop_start": start, "crop_end": end}
        feeds: dict[str, np.ndarray] = {}
        if aug.crop == "pad":
            offsets = geometry.pad_crop_offsets(samples, seed, epoch, aug.padding)
            shifts = self.uses_dali and aug.padding_mode == "reflect"
            feeds |= {"shift": dali_graph.shifts(offsets, aug.padding)} if shifts else {"offset": offsets}
        if flips is not None:
            feeds["flip"] = flips
        return feeds

    def _program(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        if self.programs is None:
            return {}
        ops, values = policies.draw_programs(self.aug, samples, self.seed, epoch, self.size)
        if self.uses_dali:
            return dali_graph.program_inputs(self.programs, ops, values, self.size)
        return {"ops": ops, "values": values}

    def _painted(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        aug, seed, size = self.aug, self.seed, self.size
        feeds: dict[str, np.ndarray] = {}
        if aug.erase.probability > 0:
            section = aug.erase
            boxes = geometry.erase_boxes(samples, seed, epoch, size, section.probability, section.scale, section.ratio)
            mean, std = self.split.dataset["mean"], self.split.dataset["std"]
            if section.fill == "random":
                colors = geometry.erase_colors(samples, seed, epoch, mean, std)
                feeds["erase_color"] = colors.astype(np.float32) if self.uses_dali else colors
            elif not self.uses_dali:  # whose graph knows these colours
                color = grey_levels(mean) if section.fill == "mean" else (0, 0, 0)
                feeds["erase_color"] = np.tile(np.array(color, np.uint8), (len(samples), 1))
            if self.uses_dali:
                feeds |= {
                    "erase_start": boxes[:, :2].astype(np.float32),
                    "erase_shape": boxes[:, 2:].astype(np.float32),
                }
            else:
                feeds["erase_box"] = boxes
        if aug.cutout > 0:
            feeds["cutout"] = geometry.cutout_corners(samples, seed, epoch, size, aug.cutout).astype(np.float32)
        return feeds
