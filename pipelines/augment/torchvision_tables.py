"""Operations, values and sub-policies of RandAugment, TrivialAugment and AutoAugment as defined by torchvision."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipelines.augment.ops import Op

SPACE = (
    Op.IDENTITY, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.BRIGHTNESS, Op.COLOR,
    Op.CONTRAST, Op.SHARPNESS, Op.POSTERIZE, Op.SOLARIZE, Op.AUTO_CONTRAST, Op.EQUALIZE,
)  # fmt: skip
"""Operations of RandAugment (arXiv:1909.13719) and TrivialAugment (arXiv:2103.10158), all equally likely."""
AUTO_AUGMENT_BINS = 10  # magnitude bins of the sub-policies below


class SubPolicies(NamedTuple):
    """AutoAugment sub-policies as arrays [sub-policies, 2], one column per operation."""

    ops: np.ndarray  # int32, members of Op
    probabilities: np.ndarray  # float64
    bins: np.ndarray  # int64, 0 to AUTO_AUGMENT_BINS - 1


@lru_cache(maxsize=16)
def value_table(wide: bool, bins: int, size: int) -> np.ndarray:
    """Return the value of each operation (see `ops`) at each magnitude bin.

    Args:
        wide: Whether to use TrivialAugment's wide space instead of the space of RandAugment and AutoAugment.
        bins: Number of magnitude bins.
        size: Height and width of the images, pixels. Unused if `wide` is True.

    Returns:
        float32 [len(Op), bins, 2], read-only. The last axis holds the values for a positive and a negative sign. Both
        values are equal for operations without a sign.
    """
    shear, pixels, degrees, change, bits = (
        (0.99, 32.0, 135.0, 0.99, 6) if wide else (0.3, 150 / 331 * size, 30.0, 0.9, 4)
    )
    table = np.zeros((len(Op), bins, 2))
    signs = np.array([1.0, -1.0])
    table[[Op.SHEAR_X, Op.SHEAR_Y]] = _linspace(0.0, shear, bins) * signs
    table[[Op.TRANSLATE_X, Op.TRANSLATE_Y]] = np.trunc(_linspace(0.0, pixels, bins)) * signs
    table[Op.ROTATE] = _linspace(0.0, degrees, bins) * signs
    table[[Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS]] = 1.0 + _linspace(0.0, change, bins) * signs
    table[Op.POSTERIZE] = np.rint(8 - np.arange(bins) / ((bins - 1) / bits))[:, None]
    table[Op.SOLARIZE] = 255.0 * _linspace(1.0, 0.0, bins)
    values = table.astype(np.float32)
    values.flags.writeable = False  # all callers share the cached array
    return values


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """Return the exact values of a float32 torch.linspace as float64 [steps, 1].

    torch counts from both ends with fused multiply-adds. Therefore 31 steps from 0 to 32 contain 15.999999 instead of
    16, and a translation by this value is truncated to 15 pixels.
    """
    low, high = np.float32(start), np.float32(end)
    step = np.float64((high - low) / np.float32(steps - 1))
    index = np.arange(steps)
    numbers = np.where(index < steps // 2, low + step * index, high - step * (steps - 1 - index))
    return numbers.astype(np.float32).astype(np.float64)[:, None]


@lru_cache
def sub_policies(policy: str) -> SubPolicies:
    """Return the sub-policies of autoaugment-imagenet, autoaugment-cifar10 or autoaugment-svhn."""
    pairs = {"autoaugment-imagenet": _IMAGENET, "autoaugment-cifar10": _CIFAR10, "autoaugment-svhn": _SVHN}[policy]
    columns = np.array(pairs, np.float64).transpose(2, 0, 1)
    return SubPolicies(columns[0].astype(np.int32), columns[1], columns[2].astype(np.int64))


# Each sub-policy is two tuples (operation, probability, magnitude bin). Source: Cubuk et al., "AutoAugment",
# arXiv:1805.09501, appendix, as implemented in torchvision. Operations without a value have bin 0.
_IMAGENET = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 0), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 0), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.0, 0), (Op.EQUALIZE, 0.8, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 0)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
)
_CIFAR10 = (
    ((Op.INVERT, 0.1, 0), (Op.CONTRAST, 0.2, 6)),
    ((Op.ROTATE, 0.7, 2), (Op.TRANSLATE_X, 0.3, 9)),
    ((Op.SHARPNESS, 0.8, 1), (Op.SHARPNESS, 0.9, 3)),
    ((Op.SHEAR_Y, 0.5, 8), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTO_CONTRAST, 0.5, 0), (Op.EQUALIZE, 0.9, 0)),
    ((Op.SHEAR_Y, 0.2, 7), (Op.POSTERIZE, 0.3, 7)),
    ((Op.COLOR, 0.4, 3), (Op.BRIGHTNESS, 0.6, 7)),
    ((Op.SHARPNESS, 0.3, 9), (Op.BRIGHTNESS, 0.7, 9)),
    ((Op.EQUALIZE, 0.6, 0), (Op.EQUALIZE, 0.5, 0)),
    ((Op.CONTRAST, 0.6, 7), (Op.SHARPNESS, 0.6, 5)),
    ((Op.COLOR, 0.7, 7), (Op.TRANSLATE_X, 0.5, 8)),
    ((Op.EQUALIZE, 0.3, 0), (Op.AUTO_CONTRAST, 0.4, 0)),
    ((Op.TRANSLATE_Y, 0.4, 3), (Op.SHARPNESS, 0.2, 6)),
    ((Op.BRIGHTNESS, 0.9, 6), (Op.COLOR, 0.2, 8)),
    ((Op.SOLARIZE, 0.5, 2), (Op.INVERT, 0.0, 0)),
    ((Op.EQUALIZE, 0.2, 0), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.2, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.COLOR, 0.9, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.AUTO_CONTRAST, 0.8, 0), (Op.SOLARIZE, 0.2, 8)),
    ((Op.BRIGHTNESS, 0.1, 3), (Op.COLOR, 0.7, 0)),
    ((Op.SOLARIZE, 0.4, 5), (Op.AUTO_CONTRAST, 0.9, 0)),
    ((Op.TRANSLATE_Y, 0.9, 9), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTO_CONTRAST, 0.9, 0), (Op.SOLARIZE, 0.8, 3)),
    ((Op.EQUALIZE, 0.8, 0), (Op.INVERT, 0.1, 0)),
    ((Op.TRANSLATE_Y, 0.7, 9), (Op.AUTO_CONTRAST, 0.9, 0)),
)
_SVHN = (
    ((Op.SHEAR_X, 0.9, 4), (Op.INVERT, 0.2, 0)),
    ((Op.SHEAR_Y, 0.9, 8), (Op.INVERT, 0.7, 0)),
    ((Op.EQUALIZE, 0.6, 0), (Op.SOLARIZE, 0.6, 6)),
    ((Op.INVERT, 0.9, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.6, 0), (Op.ROTATE, 0.9, 3)),
    ((Op.SHEAR_X, 0.9, 4), (Op.AUTO_CONTRAST, 0.8, 0)),
    ((Op.SHEAR_Y, 0.9, 8), (Op.INVERT, 0.4, 0)),
    ((Op.SHEAR_Y, 0.9, 5), (Op.SOLARIZE, 0.2, 6)),
    ((Op.INVERT, 0.9, 0), (Op.AUTO_CONTRAST, 0.8, 0)),
    ((Op.EQUALIZE, 0.6, 0), (Op.ROTATE, 0.9, 3)),
    ((Op.SHEAR_X, 0.9, 4), (Op.SOLARIZE, 0.3, 3)),
    ((Op.SHEAR_Y, 0.8, 8), (Op.INVERT, 0.7, 0)),
    ((Op.EQUALIZE, 0.9, 0), (Op.TRANSLATE_Y, 0.6, 6)),
    ((Op.INVERT, 0.9, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.CONTRAST, 0.3, 3), (Op.ROTATE, 0.8, 4)),
    ((Op.INVERT, 0.8, 0), (Op.TRANSLATE_Y, 0.0, 2)),
    ((Op.SHEAR_Y, 0.7, 6), (Op.SOLARIZE, 0.4, 8)),
    ((Op.INVERT, 0.6, 0), (Op.ROTATE, 0.8, 4)),
    ((Op.SHEAR_Y, 0.3, 7), (Op.TRANSLATE_X, 0.9, 3)),
    ((Op.SHEAR_X, 0.1, 6), (Op.INVERT, 0.6, 0)),
    ((Op.SOLARIZE, 0.7, 2), (Op.TRANSLATE_Y, 0.6, 7)),
    ((Op.SHEAR_Y, 0.8, 4), (Op.INVERT, 0.8, 0)),
    ((Op.SHEAR_X, 0.7, 9), (Op.TRANSLATE_Y, 0.8, 3)),
    ((Op.SHEAR_Y, 0.8, 5), (Op.AUTO_CONTRAST, 0.7, 0)),
    ((Op.SHEAR_X, 0.7, 2), (Op.INVERT, 0.1, 0)),
)
