"""Compare all numbers of timm's RandAugment, and the distribution of its draws."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from timm.data.auto_augment import RandAugment, rand_augment_transform

from configs.schema.aug import AugConfig
from helpers.draws import LEAST, MANY, compressed, p_of_counts, p_of_numbers, record_timm
from pipelines.augment.ops import Op
from pipelines.augment.policies import draw_programs
from pipelines.augment.timm_randaugment import op_values, parse

SIZE = 64
SHIFTS = (Op.TRANSLATE_X, Op.TRANSLATE_Y)


def in_whole_pixels(op: Op, value: float) -> tuple[Op, float]:
    return op, float(np.rint(value)) if op in SHIFTS else round(value, 4)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("spaces", ["", "-inc1", "-tweights", "-t3a", "-t3aw"])
def test_values_match_timms_calls_of_pil(spaces: str, negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = f"rand-p1-mmax30{spaces}"
    run, (_, space) = record_timm(monkeypatch), parse(policy)
    transform = rand_augment_transform(policy)
    monkeypatch.setattr(random, "random", lambda: 0.9 if negative else 0.1)  # timm's signs
    for magnitude in (0.0, 0.3, 2.5, 4.99, 5.0, 7.2, 9.0, 9.999, 10.0, 11.7, 20.0, 30.0):
        theirs = []
        for operation in transform.ops:
            operation.magnitude = magnitude
            theirs += run(RandAugment([operation], 1), SIZE)
        rows = np.arange(len(space.formulas))
        values = op_values(space, rows, magnitude, np.full(len(rows), negative), SIZE)
        ours = [(Op(op), value) for op, value in zip(space.formulas["op"].tolist(), values.tolist(), strict=True)]
        # PIL keeps no bits for negative numbers
        theirs = [(op, max(value, 0.0) if op == Op.POSTERIZE else value) for op, value in theirs]
        assert sorted(in_whole_pixels(*pair) for pair in ours) == sorted(in_whole_pixels(*pair) for pair in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m6-mstd3-p0.8",
        "rand-m10-mstd101-mmax20-inc1",
        "rand-m8-mmax0",
        "rand-m5-mstd2-tweights-p1",
        "rand-m9-mstd1-n3-t3a-p0.7",
        "rand-m4-mstd1-t3aw-p1",
    ],
)
def test_operations_and_values_match_timm_distribution(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    np.random.seed(0)  # timm chooses with NumPy's global generator
    run, transform = record_timm(monkeypatch), rand_augment_transform(policy)
    theirs = [run(transform, SIZE) for _ in range(MANY)]
    ours = compressed(*draw_programs(AugConfig(auto=policy), np.arange(MANY), 3, 1, SIZE))
    assert p_of_counts(*([tuple(op for op, _ in program) for program in side] for side in (ours, theirs))) > LEAST
    for op in {op for program in theirs for op, _ in program}:
        both = [values_of(op, side) for side in (ours, theirs)]
        assert p_of_numbers(*both) > LEAST, op


def values_of(op: Op, side: list[Any]) -> list[float]:
    return [in_whole_pixels(op, value)[1] for program in side for other, value in program if other == op]


def test_layer_magnitudes_are_independent() -> None:
    ops, values = draw_programs(AugConfig(auto="rand-m5-mstd2-n2-t3a-p1"), np.arange(4 * MANY), 3, 1, SIZE)
    twice = values[(ops == Op.BLUR).all(axis=1)]
    assert len(twice) > MANY / 4
    assert abs(np.corrcoef(twice, rowvar=False)[0, 1]) < 5 / np.sqrt(len(twice))


def test_weighted_choices_are_without_replacement() -> None:
    ops, _ = draw_programs(AugConfig(auto="rand-n8-tweights-p1"), np.arange(MANY), 3, 1, SIZE)
    assert all(len(set(row)) == 8 for row in ops.tolist())
