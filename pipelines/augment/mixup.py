"""Mixup and CutMix as numbers: the share of each sample that stays, and the box that its neighbour fills.

Neighbours are positions 2i and 2i + 1 of an epoch's order. Batches are contiguous pieces of it of even length, so that
who is mixed with whom, and how, depends neither on ranks nor on how a global batch is cut. Knows no images; what they
and their labels become is in train/engine/mixing.py.
"""

from __future__ import annotations

import numpy as np

from configs.schema import DataConfig, MixConfig
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from pipelines.rng import uniform


def mixing_enabled(mix: MixConfig) -> bool:
    """Whether any sample of any epoch is mixed."""
    return (mix.mixup > 0 or mix.cutmix > 0) and mix.probability > 0 and mix.off_epoch != 0


def check_mixing(data: DataConfig, mix: MixConfig) -> None:
    """Raise UserError where a batch would leave a sample without a neighbour."""
    sizes = [data_at(data, epoch).batch_size for epoch in stage_starts(data)]
    odd = [size for size in sizes if size % 2]
    if mixing_enabled(mix) and odd:
        raise UserError(
            f"a batch of {odd[0]} samples (data.batch_size, data.stages) cannot be mixed, since aug.mix pairs "
            "neighbours; use an even number, or set aug.mix.mixup and aug.mix.cutmix to 0"
        )


def identity_table(samples: int) -> np.ndarray:
    """The table of a batch that stays as it is."""
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
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
) -> np.ndarray:
    """How the batch of `samples` that this rank trains on in batch `step` of `epoch` is mixed.

    size: height and width of the images in pixels, whole numbers of which the boxes have.

    Returns:
        float32 [B, 5]: the share of the sample itself in its image and its label, exactly what CutMix's box leaves;
        and the box that shows the neighbour: top, bottom, left, right, all 0 for mixup and where nothing is mixed.
    """
    if mix.off_epoch is not None and epoch >= mix.off_epoch:
        return identity_table(samples)
    positions = (step * world_size + rank) * samples + np.arange(samples)  # in the epoch's order
    if mix.mode == "batch":
        one = draw_mixes(mix, np.array([step // accumulation_steps]), seed, epoch, size)
        return np.repeat(one, samples, axis=0)
    if mix.mode == "pair":
        return np.repeat(draw_mixes(mix, positions[::2] // 2, seed, epoch, size), 2, axis=0)
    return draw_mixes(mix, positions, seed, epoch, size)


def draw_mixes(mix: MixConfig, keys: np.ndarray, seed: int, epoch: int, size: int) -> np.ndarray:
    """The rows of `mix_table` that belong to keys, int64 [N]: numbers of updates, pairs or samples: float32 [N, 5].

    The distributions are those of timm's Mixup; its CutMix box has a centre that is uniform over the pixels, the share
    of the area that is drawn, and is cut off at the image's edges.
    """
    from scipy.special import betaincinv  # takes 0.1 s, and most runs mix nothing

    drawn = uniform(keys, seed, epoch, "mix", 5)
    is_mixed = drawn[:, 0] < mix.probability
    switch = mix.switch_probability if mix.mixup > 0 and mix.cutmix > 0 else float(mix.cutmix > 0)
    cuts = drawn[:, 1] < switch
    alpha = np.where(cuts, mix.cutmix, mix.mixup)
    share = betaincinv(alpha, alpha, drawn[:, 2])  # the inverse of the distribution function of Beta(alpha, alpha)
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
