"""Compare all numbers of torchvision's tables."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide

from helpers.draws import op_of, record_torchvision
from pipelines.augment.ops import Op
from pipelines.augment.torchvision_tables import SPACE, sub_policies, value_table


@pytest.mark.parametrize(("bins", "size"), [(2, 1), (10, 32), (10, 331), (15, 224), (31, 96), (31, 32), (37, 662)])
@pytest.mark.parametrize("theirs", [RandAugment, AutoAugment, TrivialAugmentWide])
def test_values_match_torchvisions_calls(theirs: type, bins: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, image = record_torchvision(monkeypatch), torch.zeros(3, size, size, dtype=torch.uint8)
    transform = theirs()
    apply = partial(transform._apply_image_or_video_transform, interpolation="nearest", fill=transform._fill)
    table = value_table(theirs is TrivialAugmentWide, bins, size)
    for name, (magnitudes_of, signed) in theirs._AUGMENTATION_SPACE.items():
        magnitudes = magnitudes_of(bins, size, size)
        for number, column in itertools.product(range(bins), range(2)):
            magnitude = 0.0 if magnitudes is None else float(magnitudes[number])
            signed_magnitude = -magnitude if signed and column == 1 else magnitude
            asked = run(partial(apply, image, name, signed_magnitude))
            ((op, value),) = asked or ((Op.IDENTITY, 0.0),)
            assert op == op_of(name)
            assert table[op, number, column] == pytest.approx(value, rel=1e-6), (name, number, column)


def test_space_matches_torchvision() -> None:
    for theirs in (RandAugment, TrivialAugmentWide):
        assert set(SPACE) == {op_of(name) for name in theirs._AUGMENTATION_SPACE}
    assert len(SPACE) == len(set(SPACE))


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_sub_policies_match_torchvision(policy: AutoAugmentPolicy) -> None:
    ours = sub_policies(f"autoaugment-{policy.value}")
    theirs = AutoAugment(policy)._policies
    assert len(theirs) == 25
    np.testing.assert_array_equal(ours.ops, [[op_of(name) for name, _, _ in pair] for pair in theirs])
    np.testing.assert_array_equal(ours.probabilities, [[share for _, share, _ in pair] for pair in theirs])
    np.testing.assert_array_equal(ours.bins, [[number or 0 for _, _, number in pair] for pair in theirs])


def test_shared_table_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        value_table(True, 31, 32)[Op.ROTATE] = 0
