"""Draw mixup and CutMix: the share of each sample, and the box filled by its neighbour.

Neighbours are positions 2i and 2i + 1 of an epoch's order. Batches are contiguous parts of that order with an even
length, so mixing is independent of the number of ranks and of how a global batch is split. `train.engine` mixes the
images and labels.
"""

from __future__ import annotations

import numpy as np

from configs.schema import DataConfig, MixConfig
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from pipelines.rng import uniform


def mixing_enabled(mix: MixConfig) -> bool:
    """Return True if any sample of any epoch may be mixed."""
    return (mix.mixup > 0 or mix.cutmix > 0) and mix.probability > 0 and mix.off_epoch != 0


def check_mixing(data: DataConfig, mix: MixConfig) -> None:
    """Raise UserError if a batch would leave a sample without a neighbour."""
    sizes = [data_at(data, epoch).batch_size for epoch in stage_starts(data)]
    odd = [size for size in sizes if size % 2]
    if mixing_enabled(mix) and odd:
        raise UserError(
            f"a batch of {odd[0]} samples (data.batch_size, data.stages) cannot be mixed, since aug.mix pairs "
            "neighbours; use an even number, or set aug.mix.mixup and aug.mix.cutmix to 0"
        )


def identity_table(samples: int) -> np.ndarray:
    """Return the table of a batch that is not mixed."""
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
    """Draw how a batch of this rank is mixed.

    Args:
        mix: Config section `aug.mix`.
        seed: Seed of the run.
        epoch, step: Position of the batch; step counts batches.
        samples: Number of samples in the batch.
        size: Height and width of the images, pixels.
        rank, world_size: Position of this process.
        accumulation_steps: Batches per optimizer step.

    Returns:
        float32 [B, 5]: the share of the sample in its image and label (for CutMix, exactly the area outside the box),
        then the neighbour's box (top, bottom, left, right), all 0 for mixup and for samples that are not mixed.
    """
    if mix.off_epoch is not None and epoch >= mix.off_epoch:
        return identity_table(samples)
    positions = (step * world_size + rank) * samples + np.arange(samples)  # positions in the epoch's order
    if mix.mode == "batch":
        one = draw_mixes(mix, np.array([step // accumulation_steps]), seed, epoch, size)
        return np.repeat(one, samples, axis=0)
    if mix.mode == "pair":
        return np.repeat(draw_mixes(mix, positions[::2] // 2, seed, epoch, size), 2, axis=0)
    return draw_mixes(mix, positions, seed, epoch, size)


def draw_mixes(mix: MixConfig, keys: np.ndarray, seed: int, epoch: int, size: int) -> np.ndarray:
    """Draw rows of `mix_table`, float32 [N, 5]; keys: int64 [N], numbers of optimizer steps, pairs or samples.

    The distributions are those of timm's Mixup. The CutMix box has a uniform center and the drawn share of the area,
    and is clipped to the image.
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
