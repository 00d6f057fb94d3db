"""RandAugment as defined by timm: operations, values by magnitude, and the draws of each layer.

Source: timm.data.auto_augment. Unlike in timm, which interpolates, translations are rounded to whole pixels.
`configs.schema.rand_augment` parses the policy strings.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from configs.schema.rand_augment import RandAugmentSpec, parse_rand_augment
from pipelines.augment.ops import Op
from pipelines.rng import normal, uniform

SCALE = 10.0  # the magnitude at which an operation has its full span
MAX_SIGMA = 2.0  # maximum standard deviation of BLUR, pixels
_DRAWN = 0  # marks a sign that is drawn per sample


class Formula(NamedTuple):
    """Parameters of an operation's value: base + sign * span * magnitude / SCALE, clipped to lowest..highest."""

    op: Op
    base: float = 0.0
    sign: int = _DRAWN
    span: float = 0.0
    lowest: float = -math.inf
    highest: float = math.inf
    whole: bool = False  # whether span * magnitude / SCALE is truncated to a whole number
    of_size: bool = False  # whether the value is a share of the image size, rounded to whole pixels


_FORMULA = np.dtype("i4, f8, i8, f8, f8, f8, ?, ?", align=True)  # fields of Formula
_FORMULA.names = Formula._fields
_WITHOUT_VALUE = tuple(Formula(op) for op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT))
_GEOMETRY = (
    Formula(Op.ROTATE, span=30.0),
    Formula(Op.SHEAR_X, span=0.3),
    Formula(Op.SHEAR_Y, span=0.3),
    Formula(Op.TRANSLATE_X, span=0.45, of_size=True),
    Formula(Op.TRANSLATE_Y, span=0.45, of_size=True),
)
_ENHANCEMENTS = (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)
_SOLARIZE_ADD = Formula(Op.SOLARIZE_ADD, sign=1, span=110.0, highest=128.0, whole=True)
_PLAIN = (
    *_WITHOUT_VALUE,
    *_GEOMETRY,
    Formula(Op.POSTERIZE, sign=1, span=4.0, highest=8.0, whole=True),
    Formula(Op.SOLARIZE, sign=1, span=256.0, highest=256.0, whole=True),
    _SOLARIZE_ADD,
    *(Formula(op, base=0.1, sign=1, span=1.8) for op in _ENHANCEMENTS),
)
_SOLARIZE = Formula(Op.SOLARIZE, base=256.0, sign=-1, span=256.0, lowest=0.0, whole=True)
_INCREASING = (
    *_WITHOUT_VALUE,
    *_GEOMETRY,
    Formula(Op.POSTERIZE, base=4.0, sign=-1, span=4.0, lowest=0.0, whole=True),
    _SOLARIZE,
    _SOLARIZE_ADD,
    *(Formula(op, base=1.0, span=0.9, lowest=0.1) for op in _ENHANCEMENTS),
)
_THREE = (  # 3-Augment, arXiv:2204.07118; magnitude 0 already removes half of the color
    _SOLARIZE,
    Formula(Op.COLOR, base=0.5, sign=-1, span=0.5, lowest=0.0),
    Formula(Op.BLUR, base=0.1, sign=1, span=1.9, highest=MAX_SIGMA),
)
_WEIGHTS = {
    Op.ROTATE: 3.0, Op.SHEAR_X: 2.0, Op.SHEAR_Y: 2.0, Op.TRANSLATE_X: 1.0, Op.TRANSLATE_Y: 1.0, Op.COLOR: 0.25,
    Op.SHARPNESS: 0.25, Op.AUTO_CONTRAST: 0.25, Op.SOLARIZE: 0.05, Op.SOLARIZE_ADD: 0.05, Op.CONTRAST: 0.05,
    Op.BRIGHTNESS: 0.05, Op.EQUALIZE: 0.05, Op.POSTERIZE: 0.05, Op.INVERT: 0.05,
}  # fmt: skip
_WEIGHTS_BESIDE_THREE = {
    Op.ROTATE: 3.0, Op.SHEAR_X: 2.0, Op.SHEAR_Y: 2.0, Op.POSTERIZE: 1.0, Op.AUTO_CONTRAST: 1.0, Op.COLOR: 1.0,
    Op.SHARPNESS: 1.0, Op.CONTRAST: 1.0, Op.BRIGHTNESS: 1.0, Op.EQUALIZE: 1.0, Op.INVERT: 1.0,
}  # fmt: skip


class Space(NamedTuple):
    """Formulas that a layer chooses from."""

    formulas: np.ndarray  # structured array [formulas] with the fields of Formula
    weights: np.ndarray | None  # for draws without replacement; None for uniform draws with replacement


@lru_cache
def space(increasing: bool, operations: str | None) -> Space:
    """Return the space selected by the parts `inc` (`increasing`) and `t` (`operations`) of a policy string."""
    weights: list[float] | None = None
    if operations == "weights":
        formulas = _INCREASING
        weights = [_WEIGHTS[formula.op] for formula in formulas]
    elif operations == "3aw":
        others = tuple(formula for formula in _INCREASING if formula.op in _WEIGHTS_BESIDE_THREE)
        formulas = (*_THREE, *others)
        weights = [6.0] * len(_THREE) + [_WEIGHTS_BESIDE_THREE[formula.op] for formula in others]
    elif operations == "3a":
        formulas = _THREE
    else:
        formulas = _INCREASING if increasing else _PLAIN
    return Space(np.array(list(formulas), _FORMULA), None if weights is None else np.array(weights))


@lru_cache
def parse(policy: str) -> tuple[RandAugmentSpec, Space]:
    spec = parse_rand_augment(policy)
    return spec, space(spec.increasing, spec.operations)


def op_values(
    space: Space, choices: np.ndarray, magnitudes: np.ndarray | float, negative: np.ndarray, size: int
) -> np.ndarray:
    """Compute the values of the chosen formulas: float64 [B].

    Args:
        space: Formulas to choose from.
        choices: int64 [B], indices of formulas in `space`.
        magnitudes: float64 [B], or one magnitude for all samples.
        negative: bool [B], True for a negative sign. It affects only formulas whose sign is drawn.
        size: Height and width of the images, pixels.
    """
    formulas = space.formulas
    change = magnitudes / SCALE * formulas["span"][choices]
    change = np.where(formulas["whole"][choices], np.trunc(change), change)
    change = np.where(formulas["of_size"][choices], np.rint(change * size), change)
    sign = formulas["sign"][choices]
    sign = np.where(sign == _DRAWN, 1 - 2 * negative, sign)
    return np.clip(formulas["base"][choices] + sign * change, formulas["lowest"][choices], formulas["highest"][choices])


def draw_layers(
    policy: str, samples: np.ndarray, seed: int, epoch: int, size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw all layers of a policy.

    Args:
        policy: Policy string, such as "rand-m9-mstd0.5".
        samples: Sample indices, int64 [B].
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        size: Height and width of the images, pixels.

    Returns:
        For each layer, the operations, int64 [B], and their values, float64 [B]; see `ops`.
    """
    spec, choice = parse(policy)
    chosen = None if choice.weights is None else _without_replacement(choice.weights, samples, seed, epoch)
    layers = []
    for layer in range(spec.layers):
        drawn = uniform(samples, seed, epoch, f"auto-{layer}", 3)
        choices = (drawn[:, 0] * len(choice.formulas)).astype(np.int64) if chosen is None else chosen[:, layer]
        magnitudes = _magnitudes(spec, samples, seed, epoch, f"auto-{layer}-magnitude")
        values = op_values(choice, choices, magnitudes, drawn[:, 2] < 0.5, size)
        applied = drawn[:, 1] < spec.probability
        layers.append((np.where(applied, choice.formulas["op"][choices], Op.IDENTITY), np.where(applied, values, 0.0)))
    return layers


def _magnitudes(spec: RandAugmentSpec, samples: np.ndarray, seed: int, epoch: int, purpose: str) -> np.ndarray | float:
    magnitudes: np.ndarray | float = spec.magnitude
    if spec.deviation == math.inf:
        magnitudes = uniform(samples, seed, epoch, purpose, 1)[:, 0] * spec.magnitude
    elif spec.deviation > 0:
        magnitudes = spec.magnitude + spec.deviation * normal(samples, seed, epoch, purpose, 1)[:, 0]
    return np.clip(magnitudes, 0.0, spec.largest or SCALE)  # like timm, treat mmax0 as unset


def _without_replacement(weights: np.ndarray, samples: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw a weighted random order of all formulas for each sample: int64 [B, formulas].

    Sorting exponential random numbers with rates `weights` gives the order of weighted draws without replacement.
    Source: Efraimidis and Spirakis, "Weighted Random Sampling with a Reservoir", 2006.
    """
    waiting = -np.log1p(-uniform(samples, seed, epoch, "auto-choice", len(weights))) / weights
    return np.argsort(waiting, axis=1)
