"""Record the operations that torchvision and timm request, and compare draws statistically."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment
from torchvision.transforms.v2 import _auto_augment

from pipelines.augment.ops import Op

MANY = 10_000
LEAST = 1e-4  # p-value; all seeds are fixed, so tests are not flaky
Program = tuple[tuple[Op, float], ...]  # operations other than IDENTITY with their values, in order
NAMES = {
    "ShearX": "SHEAR_X",
    "ShearY": "SHEAR_Y",
    "TranslateX": "TRANSLATE_X",
    "TranslateY": "TRANSLATE_Y",
    "AutoContrast": "AUTO_CONTRAST",
    "SolarizeAdd": "SOLARIZE_ADD",
    "Desaturate": "COLOR",
    "GaussianBlur": "BLUR",
}


def op_of(name: str) -> Op:
    """Return the operation that has this name in torchvision or timm."""
    name = name.removesuffix("Increasing").removesuffix("Rel")
    return Op[NAMES.get(name, name.upper())]


def compressed(ops: np.ndarray, values: np.ndarray) -> list[Program]:
    """Return drawn programs without IDENTITY."""
    rows = zip(ops.tolist(), values.tolist(), strict=True)
    return [tuple((Op(op), value) for op, value in zip(*row, strict=True) if op != Op.IDENTITY) for row in rows]


def p_of_counts(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float:
    """Return the p-value of a chi-square test of equal distributions; rare outcomes are merged."""
    our_counts, their_counts = Counter(ours), Counter(theirs)
    outcomes = dict.fromkeys([*our_counts, *their_counts])
    table = np.array([[our_counts[outcome], their_counts[outcome]] for outcome in outcomes])
    rare = table.sum(axis=1) < 10
    table = np.concatenate([table[~rare], table[rare].sum(axis=0, keepdims=True)])
    table = table[table.sum(axis=1) > 0]
    return 1.0 if len(table) == 1 else float(stats.chi2_contingency(table).pvalue)


def p_of_numbers(ours: Any, theirs: Any) -> float:
    """Return the p-value for numbers: Kolmogorov-Smirnov, or chi-square for few distinct values."""
    ours, theirs = np.round(np.asarray(ours, float), 4), np.round(np.asarray(theirs, float), 4)
    if len(np.unique(np.concatenate([ours, theirs]))) <= 50:
        return p_of_counts(ours.tolist(), theirs.tolist())
    return float(stats.ks_2samp(ours, theirs).pvalue)


def record_torchvision(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Program]:
    """Replace torchvision's functional operations; return run(action), which returns the operations requested."""
    program: list[tuple[Op, float]] = []

    def note(value: float) -> None:
        program[-1] = program[-1][0], value

    def affine(image: Any, translate: list[int], shear: list[float], **_: Any) -> Any:
        note(sum(translate) + sum(math.tan(math.radians(degrees)) for degrees in shear))
        return image

    def operation(image: Any, *_: Any, **values: Any) -> Any:
        note(float(next(iter(values.values()), 0)))
        return image

    def rotate(image: Any, angle: float, **_: Any) -> Any:
        return operation(image, angle=angle)

    names = ("brightness", "saturation", "contrast", "sharpness")
    others = ("posterize", "solarize", "autocontrast", "equalize", "invert")
    fakes = dict.fromkeys([*(f"adjust_{name}" for name in names), *others], operation)
    apply = _auto_augment._AutoAugmentBase._apply_image_or_video_transform

    def named(self: Any, image: Any, transform_id: str, *args: Any, **kwargs: Any) -> Any:
        program.append((op_of(transform_id), 0.0))
        return apply(self, image, transform_id, *args, **kwargs)

    def run(action: Callable[[], Any]) -> Program:
        program.clear()
        action()
        return tuple((op, value) for op, value in program if op is not Op.IDENTITY)

    monkeypatch.setattr(_auto_augment, "F", SimpleNamespace(affine=affine, rotate=rotate, **fakes))
    monkeypatch.setattr(_auto_augment._AutoAugmentBase, "_apply_image_or_video_transform", named)
    return run


class AskedImage:
    """Stand-in for a PIL image that records the number PIL was called with."""

    mode = "RGB"

    def __init__(self, size: int) -> None:
        self.size = (size, size)
        self.asked = 0.0

    def note(self, value: float, **_: Any) -> AskedImage:
        self.asked = float(value)
        return self

    rotate = note

    def transform(self, size: tuple[int, int], method: int, matrix: tuple[float, ...], **_: Any) -> AskedImage:
        return self.note(sum(matrix) - 2)  # all numbers but one are those of an identity

    def point(self, levels: list[int]) -> AskedImage:
        return self.note(levels[0])  # the new level of black

    def filter(self, blur: Any) -> AskedImage:
        return self.note(blur.radius)


def record_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[[auto_augment.RandAugment, int], Program]:
    """Replace PIL's operations; return run(policy, image size), which returns the operations requested."""
    program: list[tuple[Op, float]] = []

    def enhancement(image: AskedImage) -> SimpleNamespace:
        return SimpleNamespace(enhance=image.note)

    def leave(image: AskedImage) -> AskedImage:
        return image.note(0)

    enhancements = dict.fromkeys(["Color", "Contrast", "Brightness", "Sharpness"], enhancement)
    others = dict.fromkeys(["autocontrast", "equalize", "invert"], leave)
    monkeypatch.setattr(auto_augment, "ImageEnhance", SimpleNamespace(**enhancements))
    fakes = SimpleNamespace(posterize=AskedImage.note, solarize=AskedImage.note, **others)
    monkeypatch.setattr(auto_augment, "ImageOps", fakes)

    def noted(op: Op, original: Callable[..., Any], image: AskedImage, *args: Any, **kwargs: Any) -> AskedImage:
        image.asked = 8.0  # timm does not call PIL if all 8 bits are kept
        original(image, *args, **kwargs)
        program.append((op, image.asked))
        return image

    def run(policy: auto_augment.RandAugment, size: int) -> Program:
        for operation in policy.ops:
            if not isinstance(operation.aug_fn, partial):
                operation.aug_fn = partial(noted, op_of(operation.name), operation.aug_fn)
        program.clear()
        policy(AskedImage(size))
        return tuple(program)

    return run


def assert_independent_of_batch(draw: Callable[..., Sequence[np.ndarray]]) -> None:
    """Assert that draw(samples, seed, epoch) gives a sample the same values in every batch and at every position."""
    samples = np.random.default_rng(0).permutation(1_500_000)[:64]
    whole = draw(samples, seed=9, epoch=4)
    for i in (0, 17, 63):
        for drawn, alone in zip(whole, draw(samples[i : i + 1], seed=9, epoch=4), strict=True):
            np.testing.assert_array_equal(drawn[i], alone[0])
    for drawn, reverse in zip(whole, draw(samples[::-1], seed=9, epoch=4), strict=True):
        np.testing.assert_array_equal(drawn, reverse[::-1])
