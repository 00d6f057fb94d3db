"""Draws of crops, flips and cutout corners: independent per sample, distributed as in torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop, v2

from helpers.draws import LEAST, assert_independent_of_batch, p_of_counts
from pipelines.augment import geometry

MANY = 10_000
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def crops(
    samples: np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    seed: int = 1,
    epoch: int = 0,
) -> np.ndarray:
    """Draw (top, left, height, width) for images of one size."""
    sizes = np.full(len(samples), height), np.full(len(samples), width)
    return geometry.random_resized_crops(samples, seed, epoch, *sizes, scale, ratio)


def all_draws(samples: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    return [
        geometry.flips(samples, seed, epoch, 0.5),
        geometry.alternating_flips(samples, seed, epoch, 0.5),
        geometry.pad_crop_offsets(samples, seed, epoch, 4),
        geometry.cutout_corners(samples, seed, epoch, 32, 12),
        crops(samples, 60, 80, seed=seed, epoch=epoch),
    ]


def test_geometry_draws_are_independent_of_batch() -> None:
    assert_independent_of_batch(all_draws)


@pytest.mark.parametrize(("height", "width"), [(100, 150), (500, 375), (32, 32)])
@pytest.mark.parametrize("scale", [SCALE, (0.35, 1.0)])
def test_crop_boxes_match_torchvision_distribution(height: int, width: int, scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(MANY)])
    ours = crops(np.arange(MANY), height, width, scale)
    figures = {
        "top": lambda boxes: boxes[:, 0],
        "left": lambda boxes: boxes[:, 1],
        "height": lambda boxes: boxes[:, 2],
        "width": lambda boxes: boxes[:, 3],
        "area": lambda boxes: boxes[:, 2] * boxes[:, 3],
        "aspect": lambda boxes: boxes[:, 3] / boxes[:, 2],
        "centre": lambda boxes: boxes[:, 0] + boxes[:, 1] + boxes[:, 2:].sum(axis=1) / 2,
    }
    for name, figure in figures.items():
        assert stats.ks_2samp(figure(ours), figure(theirs)).pvalue > 0.005, name


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (10, 11), (30, 30), (1, 400), (7, 1)])
def test_crop_fallback_is_torchvisions_central_crop(height: int, width: int) -> None:
    # an area share above 1 never fits, so both implementations fall back
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.5, 1.5], list(RATIO))
    boxes = crops(np.arange(5), height, width, scale=(1.5, 1.5))
    np.testing.assert_array_equal(boxes, np.broadcast_to(theirs, (5, 4)))


def test_fallback_and_drawn_crops_share_a_batch() -> None:
    samples, heights, widths = np.arange(3), np.array([50, 4, 50]), np.array([50, 400, 50])
    boxes = geometry.random_resized_crops(samples, 0, 0, heights, widths, (0.5, 0.5), (1.0, 1.0))
    assert boxes[:, 2:].tolist() == [[35, 35], [4, 4], [35, 35]]
    assert boxes[1].tolist() == [0, 198, 4, 4]


sides = st.integers(1, 600)
shares = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: (min(pair), max(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: (min(pair), max(pair)))


@given(height=sides, width=sides, scale=shares, ratio=ratios, seed=st.integers(0, 2**63 - 1))
def test_crop_boxes_are_nonempty_and_inside_image(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    boxes = crops(np.arange(20), height, width, scale, ratio, seed)
    top, left, box_height, box_width = boxes.T
    assert boxes.dtype == np.int32
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_flips_occur_with_their_probability(probability: float) -> None:
    flips = geometry.flips(np.arange(MANY), 2, 0, probability)
    assert set(flips.tolist()) <= {0, 1}
    assert abs(flips.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / MANY)


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_flip_frequency_matches_torchvision(probability: float) -> None:
    torch.manual_seed(0)
    transform, image = v2.RandomHorizontalFlip(probability), torch.tensor([[[0.0, 1.0]]])
    theirs = [int(transform(image)[0, 0, 0]) for _ in range(MANY)]
    assert p_of_counts(geometry.flips(np.arange(MANY), 2, 0, probability).tolist(), theirs) > LEAST


def test_alternating_flips_invert_every_epoch() -> None:
    samples = np.arange(MANY)
    first, second, third = (geometry.alternating_flips(samples, 2, epoch, 0.5) for epoch in range(3))
    np.testing.assert_array_equal(first, geometry.flips(samples, 2, 0, 0.5))
    np.testing.assert_array_equal(second, 1 - first)
    np.testing.assert_array_equal(third, first)
    assert first.dtype == np.int32
    assert 0.45 < (first == geometry.alternating_flips(samples, 3, 0, 0.5)).mean() < 0.55  # another seed


@pytest.mark.parametrize("cutout", [1, 12, 32])
def test_cutout_squares_are_uniform_inside_image(cutout: int) -> None:
    corners = geometry.cutout_corners(np.arange(MANY), 2, 0, 32, cutout)
    places = 32 - cutout + 1
    assert corners.dtype == np.int32
    assert corners.min() == 0
    assert corners.max() == places - 1
    for column in corners.T:
        counts = np.bincount(column, minlength=places)
        assert places == 1 or stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_pad_crop_offsets_are_uniform(padding: int) -> None:
    offsets = geometry.pad_crop_offsets(np.arange(MANY), 2, 0, padding)
    side = 2 * padding + 1
    cells = (offsets[:, 0] + padding) * side + offsets[:, 1] + padding
    counts = np.bincount(cells, minlength=side * side)
    assert np.abs(offsets).max() == padding
    assert len(counts) == side * side
    assert padding == 0 or stats.chisquare(counts).pvalue > 0.01


def test_pad_crop_offsets_match_torchvision_distribution() -> None:
    torch.manual_seed(0)
    transform, image = v2.RandomCrop(32, padding=4), torch.zeros(3, 32, 32)
    drawn = [transform.make_params([image]) for _ in range(MANY)]
    theirs = [(params["top"] - 4, params["left"] - 4) for params in drawn]  # relative to the padding's corner
    ours = geometry.pad_crop_offsets(np.arange(MANY), 2, 0, 4)
    assert p_of_counts([tuple(row) for row in ours.tolist()], theirs) > LEAST
