"""Draws of one sample: pure, uniform or normal, independent of each other and of the batch."""

from __future__ import annotations

import numpy as np
from scipy import stats

from helpers.draws import assert_independent_of_batch
from pipelines import rng

MANY = 10_000


def all_draws(samples: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    return [
        rng.uniform(samples, seed, epoch, "any", 3),
        rng.normal(samples, seed, epoch, "any", 3),
    ]


def test_draws_of_a_sample_do_not_depend_on_the_batch() -> None:
    assert_independent_of_batch(all_draws)


def test_draws_change_with_the_epoch_and_the_seed() -> None:
    samples = np.arange(MANY)
    first = rng.uniform(samples, 0, 0, "any", 1)[:, 0]
    for seed, epoch, purpose in ((1, 0, "any"), (0, 1, "any"), (0, 0, "other"), (2**40, 0, "any"), (0, 500, "any")):
        other = rng.uniform(samples, seed, epoch, purpose, 1)[:, 0]
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(MANY)


def test_draws_of_one_sample_and_of_neighbours_are_uncorrelated() -> None:
    drawn = rng.uniform(np.arange(MANY), 3, 1, "any", 8)
    table = np.concatenate([drawn[:-1], drawn[1:]], axis=1)
    correlation = np.corrcoef(table, rowvar=False) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY)


def test_uniform_draws_are_uniform_and_below_one() -> None:
    drawn = rng.uniform(np.arange(MANY), 5, 0, "any", 4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 0.01


def test_normal_draws_are_normal_finite_and_uncorrelated() -> None:
    drawn = rng.normal(np.arange(10 * MANY), 5, 0, "any", 3)
    assert np.isfinite(drawn).all()
    for column in drawn.T:
        assert stats.kstest(column, "norm").pvalue > 0.01
    for table in (drawn, np.abs(drawn)):  # pairs that share a radius are uncorrelated, but their sizes are not
        assert np.abs(np.corrcoef(table, rowvar=False) - np.eye(3)).max() < 5 / np.sqrt(10 * MANY)
