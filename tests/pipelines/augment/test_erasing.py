"""Random erasing: boxes are distributed like torchvision's, colors like those of the data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms.v2 import RandomErasing

from helpers.draws import LEAST, MANY, p_of_counts, p_of_numbers
from pipelines.augment.geometry import erase_boxes, erase_colors

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)
MEAN, STD = (0.485, 0.456, 0.05), (0.229, 0.3, 0.2)


def boxes(
    samples: Any = None,
    size: int = 64,
    probability: float = 1.0,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    seed: int = 3,
    epoch: int = 1,
) -> np.ndarray:
    indices = np.arange(MANY) if samples is None else np.asarray(samples)
    return erase_boxes(indices, seed, epoch, size, probability, scale, ratio)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        (224, SCALE, RATIO),
        (32, SCALE, RATIO),
        (32, (0.3, 1.0), (0.1, 2.0)),  # attempts fail
        (32, (0.93, 1.0), (0.2, 5.0)),  # often all ten
        (8, (0.001, 0.03), RATIO),  # empty boxes
        (64, (0.1, 0.1), (0.5, 0.5)),
    ],
)
def test_erase_boxes_match_torchvision_distribution(size: int, scale: Any, ratio: Any) -> None:
    torch.manual_seed(0)
    transform, image = RandomErasing(1.0, scale, ratio), torch.zeros(3, size, size)
    drawn = [transform.make_params([image]) for _ in range(MANY)]
    theirs = np.array([[0] * 4 if box["v"] is None else [box[side] for side in "ijhw"] for box in drawn])
    ours = boxes(size=size, scale=scale, ratio=ratio)
    theirs[(theirs[:, 2:] == 0).any(axis=1)] = 0  # an empty box erases nothing
    erased, erased_by_theirs = ours.any(axis=1), theirs.any(axis=1)
    assert p_of_counts(erased.tolist(), erased_by_theirs.tolist()) > LEAST
    ours, theirs = ours[erased], theirs[erased_by_theirs]
    figures = {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "bottom": lambda box: box[:, 0] + box[:, 2],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 2] / box[:, 3],
    }
    for name, figure in figures.items():
        assert p_of_numbers(figure(ours), figure(theirs)) > LEAST, name


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erase_probability_is_independent_of_boxes(probability: float) -> None:
    drawn = boxes(probability=probability)
    erased = drawn.any(axis=1)
    np.testing.assert_array_equal(drawn[erased], boxes()[erased])
    areas, others = (box[:, 2] * box[:, 3] for box in (drawn[erased], boxes(seed=5)))
    assert not erased.any() or p_of_numbers(areas, others) > LEAST
    assert stats.binomtest(int(erased.sum()), MANY, probability).pvalue > LEAST


shares = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: (min(pair), max(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: (min(pair), max(pair)))


@given(size=st.integers(1, 300), scale=shares, ratio=ratios, seed=st.integers(0, 2**63 - 1))
def test_erase_boxes_are_smaller_than_and_inside_image(size: int, scale: Any, ratio: Any, seed: int) -> None:
    drawn = boxes(np.arange(20), size, 1.0, scale, ratio, seed)
    top, left, height, width = drawn.T
    assert drawn.dtype == np.int32
    assert (drawn >= 0).all()
    assert ((height > 0) == (width > 0)).all()
    assert (drawn[height == 0] == 0).all()
    assert (np.maximum(height, width) < size).all()
    assert (np.maximum(top + height, left + width) <= size).all()


def test_erase_colors_match_data_set_distribution() -> None:
    torch.manual_seed(0)
    theirs = (torch.tensor(MEAN) + torch.tensor(STD) * torch.randn(MANY, 3)).mul(255).round().clamp(0, 255).numpy()
    ours = erase_colors(np.arange(MANY), 3, 1, MEAN, STD)
    assert ours.dtype == np.uint8
    for our_channel, their_channel in zip(ours.T, theirs.T, strict=True):
        assert p_of_numbers(our_channel, their_channel) > LEAST
    correlation = np.corrcoef(ours, rowvar=False) - np.eye(3)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY)


def test_erase_colors_round_to_nearest_grey_level() -> None:
    colors = erase_colors(np.arange(3), 3, 1, (100.7 / 255, 3.2 / 255, 1.0), (0.0, 0.0, 0.0))
    assert colors.tolist() == [[101, 3, 255]] * 3


def test_erase_draws_are_independent_of_batch() -> None:
    samples = np.random.default_rng(0).permutation(1_500_000)[:64]
    for part in ([17], [63, 0, 5], np.arange(64)[::-1]):
        np.testing.assert_array_equal(boxes(samples, probability=0.5)[part], boxes(samples[part], probability=0.5))
        colors = erase_colors(samples, 3, 1, MEAN, STD)
        np.testing.assert_array_equal(colors[part], erase_colors(samples[part], 3, 1, MEAN, STD))


@pytest.mark.parametrize(("seed", "epoch"), [(3, 2), (4, 1)])
def test_erase_draws_differ_between_epochs_and_seeds(seed: int, epoch: int) -> None:
    samples = np.arange(MANY)
    first, other = (
        np.concatenate([boxes(seed=key[0], epoch=key[1]), erase_colors(samples, *key, MEAN, STD)], axis=1)
        for key in ((3, 1), (seed, epoch))
    )
    assert np.abs(np.corrcoef(first, other, rowvar=False)[:7, 7:]).max() < 5 / np.sqrt(MANY)
