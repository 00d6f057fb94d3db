"""Draw the parameters of mixup and CutMix: the share of each sample, and the box that its neighbor fills.

The samples at positions 2i and 2i + 1 of an epoch's order are neighbors. The batches of a rank have both of them, so
mixing does not depend on how a global batch is split into machines, ranks and forward passes.
`train.engine` mixes the images and labels.
"""

from __future__ import annotations

import numpy as np

from configs.schema import DataConfig, MixConfig
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from pipelines.rng import uniform


def mixing_enabled(mix: MixConfig) -> bool:
    """Return True if samples can be mixed in any epoch."""
    return (mix.mixup > 0 or mix.cutmix > 0) and mix.probability > 0 and mix.off_epoch != 0


def check_mixing(data: DataConfig, mix: MixConfig) -> None:
    """Raise UserError if mixing is enabled and samples have several views, or a batch size is odd.

    With an odd size, one sample would have no neighbor.
    """
    if mixing_enabled(mix) and data.views > 1:
        raise UserError(
            f"data.views={data.views} cannot be combined with mixup or CutMix, which would mix the views of a sample "
            "with each other; use data.views=1, or set aug.mix.mixup and aug.mix.cutmix to 0"
        )
    sizes = [data_at(data, epoch).batch_size for epoch in stage_starts(data)]
    odd = [size for size in sizes if size % 2]
    if mixing_enabled(mix) and odd:
        raise UserError(
            f"a batch of {odd[0]} samples (data.batch_size, data.stages) cannot be mixed, since aug.mix pairs "
            "neighbours; use an even number, or set aug.mix.mixup and aug.mix.cutmix to 0"
        )


def identity_table(samples: int) -> np.ndarray:
    """Return a table that leaves all samples unmixed: float32 [samples, 5], see `mix_table`."""
    table = np.zeros((samples, 5), np.float32)
    table[:, 0] = 1.0
    return table


def mix_table(
    mix: MixConfig,
    seed: int,
    epoch: int,
    step: int,
    samples: int,
    size: int,
    *,
    positions: np.ndarray | None = None,
    accumulation_steps: int = 1,
) -> np.ndarray:
    """Draw how the samples of one batch on this rank are mixed.

    Args:
        mix: Config section `aug.mix`.
        seed: Seed of the run.
        epoch, step: Epoch, and index of the batch within the epoch; both are counted from 0.
        samples: Number of samples in the batch.
        size: Height and width of the images, pixels.
        positions: Positions of the samples in the epoch's order, int64 [samples]. If None, those of a single rank.
        accumulation_steps: Batches per optimizer step.

    Returns:
        float32 [B, 5]. Column 0 is the share of the sample in the mixed image and label. For CutMix, this is exactly
        the share of the area outside the box. Columns 1 to 4 are the top, bottom, left and right of the box that the
        neighbor fills, in pixels. These are 0 for mixup and for samples that are not mixed.
    """
    if mix.off_epoch is not None and epoch >= mix.off_epoch:
        return identity_table(samples)
    if positions is None:
        positions = step * samples + np.arange(samples)
    if mix.mode == "batch":
        one = draw_mixes(mix, np.array([step // accumulation_steps]), seed, epoch, size)
        return np.repeat(one, samples, axis=0)
    if mix.mode == "pair":
        return np.repeat(draw_mixes(mix, positions[::2] // 2, seed, epoch, size), 2, axis=0)
    return draw_mixes(mix, positions, seed, epoch, size)


def draw_mixes(mix: MixConfig, keys: np.ndarray, seed: int, epoch: int, size: int) -> np.ndarray:
    """Draw rows of `mix_table`, float32 [N, 5], with the distributions of timm's Mixup.

    A share is drawn from Beta(alpha, alpha). For mixup, this is the share of the sample. For CutMix, the center of the
    box is uniform in the image, and the box covers 1 - share of the image's area (up to rounding) before it is clipped.

    Args:
        mix: Config section `aug.mix`.
        keys: Keys of the random draws, int64 [N]. Each key is the index of an optimizer step (mode batch), the index of
            a pair of neighbors (pair), or a position in the epoch's order (elem).
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        size: Height and width of the images, pixels.
    """
    from scipy.special import betaincinv  # deferred: importing takes 0.1 s, and most runs do not mix

    drawn = uniform(keys, seed, epoch, "mix", 5)
    is_mixed = drawn[:, 0] < mix.probability
    switch = mix.switch_probability if mix.mixup > 0 and mix.cutmix > 0 else float(mix.cutmix > 0)
    cuts = drawn[:, 1] < switch
    alpha = np.where(cuts, mix.cutmix, mix.mixup)
    share = betaincinv(alpha, alpha, drawn[:, 2])  # inverse distribution function of Beta(alpha, alpha)
    side = np.floor(size * np.sqrt(1.0 - share)).astype(np.int64)
    center = np.floor(drawn[:, 3:] * size).astype(np.int64)  # y, x
    start = np.clip(center - (side // 2)[:, None], 0, size)
    end = np.clip(center + ((side + 1) // 2)[:, None], 0, size)
    left_over = 1.0 - np.prod(end - start, axis=1) / size**2

    table = identity_table(len(keys))
    table[:, 0] = np.where(is_mixed, np.where(cuts, left_over, share), 1.0)
    boxes = np.stack([start[:, 0], end[:, 0], start[:, 1], end[:, 1]], axis=1)
    table[:, 1:] = np.where((is_mixed & cuts)[:, None], boxes, 0)
    return table
