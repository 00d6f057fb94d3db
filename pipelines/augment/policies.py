"""Draw augmentation programs. `ops` defines programs and slots.

The slots are, in this order, the layers of `aug.auto`, color jitter, grayscale and blur. Each of these augmentations
has separate random streams, so enabling or disabling one of them never changes the draws of the others.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from configs.schema.aug import POLICIES, AugConfig, AutoAugmentConfig, BlurConfig, ColorJitterConfig
from pipelines.augment import timm_randaugment, torchvision_tables
from pipelines.augment.ops import Op, Programs, SlotOps, blur_radius, grey_levels
from pipelines.rng import uniform

JITTERS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.HUE)
SlotDraws = list[tuple[np.ndarray, np.ndarray]]  # per slot, operations [B] and values [B]


def build_programs(aug: AugConfig, mean: tuple[float, float, float]) -> Programs | None:
    """Build the settings shared by all augmentation programs of a run: slots, interpolation, fill color, blur radius.

    Args:
        aug: Config section `aug`.
        mean: Per-channel mean of the data set, 0 to 1.

    Returns:
        The settings, or None if `aug` enables no operation.
    """
    slots = _auto_slots(aug.auto) + _jitter_slots(aug.color_jitter)
    if aug.grayscale > 0:
        slots += (frozenset({Op.GRAYSCALE}),)
    sigmas = [timm_randaugment.MAX_SIGMA] if any(Op.BLUR in slot for slot in slots) else []
    if aug.blur.probability > 0:
        slots += (frozenset({Op.BLUR}),)
        sigmas.append(aug.blur.sigma[1])
    if not slots:
        return None
    by_timm = aug.auto.policy not in POLICIES
    fill = aug.auto.fill or ("mean" if by_timm else "black")
    return Programs(
        slots=slots,
        bilinear=(aug.auto.interpolation or ("bilinear" if by_timm else "nearest")) == "bilinear",
        fill=grey_levels(mean) if fill == "mean" else (0, 0, 0),
        radius=blur_radius(max(sigmas, default=0.0)),
    )


def draw_programs(
    aug: AugConfig, samples: np.ndarray, seed: int, epoch: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the programs of a batch.

    Args:
        aug: Config section `aug`.
        samples: Sample indices, int64 [B].
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        size: Height and width of the images, pixels.

    Returns:
        ops, int32 [B, slots], and values, float32 [B, slots], for the slots of `build_programs`.
    """
    drawn = _draw_auto(aug.auto, samples, seed, epoch, size)
    drawn += _draw_jitter(aug.color_jitter, samples, seed, epoch)
    if aug.grayscale > 0:
        drawn += _draw_grayscale(aug.grayscale, samples, seed, epoch)
    if aug.blur.probability > 0:
        drawn += _draw_blur(aug.blur, samples, seed, epoch)
    ops = np.zeros((len(samples), len(drawn)), np.int32)
    values = np.zeros((len(samples), len(drawn)), np.float32)
    for slot, (slot_ops, slot_values) in enumerate(drawn):
        ops[:, slot], values[:, slot] = slot_ops, slot_values
    return ops, values


def _auto_slots(auto: AutoAugmentConfig) -> SlotOps:
    if auto.policy == "none":
        return ()
    if auto.policy.startswith("autoaugment-"):
        table = torchvision_tables.sub_policies(auto.policy)
        return tuple(frozenset(map(Op, column)) for column in table.ops.T)
    if auto.policy in ("randaugment", "trivialaugment"):
        layers = auto.num_ops if auto.policy == "randaugment" else 1
        return (frozenset(torchvision_tables.SPACE) - {Op.IDENTITY},) * layers
    spec, space = timm_randaugment.parse(auto.policy)
    return (frozenset(map(Op, space.formulas["op"])),) * spec.layers


def _draw_auto(auto: AutoAugmentConfig, samples: np.ndarray, seed: int, epoch: int, size: int) -> SlotDraws:
    if auto.policy == "none":
        return []
    if auto.policy == "randaugment":
        return _draw_rand_augment(auto, samples, seed, epoch, size)
    if auto.policy == "trivialaugment":
        return _draw_trivial_augment(auto, samples, seed, epoch, size)
    if auto.policy.startswith("autoaugment-"):
        return _draw_auto_augment(auto, samples, seed, epoch, size)
    return timm_randaugment.draw_layers(auto.policy, samples, seed, epoch, size)


def _draw_rand_augment(auto: AutoAugmentConfig, samples: np.ndarray, seed: int, epoch: int, size: int) -> SlotDraws:
    space = np.array(torchvision_tables.SPACE)
    table = torchvision_tables.value_table(False, auto.bins, size)[:, auto.magnitude]
    layers = []
    for layer in range(auto.num_ops):
        drawn = uniform(samples, seed, epoch, f"auto-{layer}", 2)
        ops = space[(drawn[:, 0] * len(space)).astype(np.int64)]
        layers.append((ops, table[ops, (drawn[:, 1] * 2).astype(np.int64)]))
    return layers


def _draw_trivial_augment(auto: AutoAugmentConfig, samples: np.ndarray, seed: int, epoch: int, size: int) -> SlotDraws:
    space = np.array(torchvision_tables.SPACE)
    table = torchvision_tables.value_table(True, auto.bins, size)
    drawn = uniform(samples, seed, epoch, "auto-0", 3)
    choices, negative, bins = (drawn * [len(space), 2, auto.bins]).astype(np.int64).T
    return [(space[choices], table[space[choices], bins, negative])]


def _draw_auto_augment(auto: AutoAugmentConfig, samples: np.ndarray, seed: int, epoch: int, size: int) -> SlotDraws:
    policies = torchvision_tables.sub_policies(auto.policy)
    table = torchvision_tables.value_table(False, torchvision_tables.AUTO_AUGMENT_BINS, size)
    chosen = (uniform(samples, seed, epoch, "auto-choice", 1)[:, 0] * len(policies.ops)).astype(np.int64)
    layers = []
    for layer in range(2):
        drawn = uniform(samples, seed, epoch, f"auto-{layer}", 2)
        applied = drawn[:, 0] < policies.probabilities[chosen, layer]
        ops = np.where(applied, policies.ops[chosen, layer], Op.IDENTITY)  # IDENTITY has only zeros in the table
        layers.append((ops, table[ops, policies.bins[chosen, layer], (drawn[:, 1] * 2).astype(np.int64)]))
    return layers


def _strengths(jitter: ColorJitterConfig) -> tuple[float, ...]:
    """Return the strength of each operation in JITTERS. All strengths are 0 if the probability of jitter is 0."""
    if jitter.probability == 0:
        return (0.0,) * len(JITTERS)
    return jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue


def _jitter_slots(jitter: ColorJitterConfig) -> SlotOps:
    used = frozenset(op for op, strength in zip(JITTERS, _strengths(jitter), strict=True) if strength > 0)
    return (used,) * len(used)


def _draw_jitter(jitter: ColorJitterConfig, samples: np.ndarray, seed: int, epoch: int) -> SlotDraws:
    """Draw color jitter for each sample with probability `jitter.probability`.

    As in torchvision's ColorJitter, the values are uniform and the operations are applied in a random order.
    """
    strengths = np.array(_strengths(jitter))
    orders = _orders(tuple((strengths > 0).tolist()))
    if orders.shape[1] == 0:
        return []
    low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    low[3], high[3] = -jitter.hue, jitter.hue
    drawn = uniform(samples, seed, epoch, "color-jitter", len(JITTERS) + 2)
    factors = low + drawn[:, : len(JITTERS)] * (high - low)
    order = orders[(drawn[:, -2] * len(orders)).astype(np.int64)]
    applied = drawn[:, -1] < jitter.probability
    ops = np.where(applied[:, None], np.array(JITTERS)[order], Op.IDENTITY)
    values = np.where(applied[:, None], np.take_along_axis(factors, order, axis=1), 0.0)
    return list(zip(ops.T, values.T, strict=True))


@lru_cache
def _orders(used: tuple[bool, ...]) -> np.ndarray:
    """Return all 24 orders of JITTERS without the unused operations: indices, int64 [24, number of used operations].

    The four operations are ordered before the unused ones are removed. Enabling an operation therefore keeps the
    relative order of the operations that were already enabled.
    """
    orders = itertools.permutations(range(len(used)))
    return np.array([[jitter for jitter in order if used[jitter]] for order in orders], np.int64)


def _draw_grayscale(probability: float, samples: np.ndarray, seed: int, epoch: int) -> SlotDraws:
    applied = uniform(samples, seed, epoch, "grayscale", 1)[:, 0] < probability
    return [(np.where(applied, Op.GRAYSCALE, Op.IDENTITY), np.zeros(len(samples)))]


def _draw_blur(blur: BlurConfig, samples: np.ndarray, seed: int, epoch: int) -> SlotDraws:
    drawn = uniform(samples, seed, epoch, "blur", 2)
    applied = drawn[:, 0] < blur.probability
    sigmas = blur.sigma[0] + drawn[:, 1] * (blur.sigma[1] - blur.sigma[0])
    return [(np.where(applied, Op.BLUR, Op.IDENTITY), np.where(applied, sigmas, 0.0))]
