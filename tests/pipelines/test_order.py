"""Sample order: each sample once, global batches independent of world size, a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import order

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """Reference in Python integers, after Vigna's splitmix64.c."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def global_batch(positions: np.ndarray, step: int, batch_size: int, world_size: int) -> np.ndarray:
    parts = [order.train_batch(positions, step, batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {batch_size}
    return np.concatenate(parts)


@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000))
def test_every_epoch_is_a_permutation_and_a_pure_function(samples: int, seed: int, epoch: int) -> None:
    drawn = order.permutation(samples, seed, epoch)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(np.sort(drawn), np.arange(samples))
    np.testing.assert_array_equal(drawn, order.permutation(samples, seed, epoch))


def test_the_hash_is_splitmix64() -> None:
    states = [0, 1, 1234567, 2**63, MASK]
    assert order.hash64(np.array(states, np.uint64)).tolist() == [splitmix64(state) for state in states]
    assert splitmix64(1234567) == 6457827717110365317  # the first output published for this seed


def test_order_of_a_seed_is_stable_across_versions() -> None:
    # resumed runs and comparisons with older runs rely on it
    assert order.permutation(12, seed=0, epoch=0).tolist() == [1, 11, 3, 6, 5, 0, 7, 9, 10, 4, 8, 2]


def test_orders_of_other_epochs_and_seeds_are_unrelated() -> None:
    samples = 10_000
    orders = [order.permutation(samples, seed, epoch) for seed in range(4) for epoch in range(4)]
    orders += [order.permutation(samples, 2**40, 0), np.arange(samples)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.05  # five standard deviations of chance
            assert np.count_nonzero(first == second) < 10  # chance: 1 on average


def test_every_position_of_a_sample_is_equally_likely() -> None:
    samples, epochs = 10, 5000
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), order.permutation(samples, 7, epoch)] += 1
    chi_square = ((counts - epochs / samples) ** 2).sum() / (epochs / samples)
    assert chi_square < 81 + 5 * np.sqrt(2 * 81)  # 81 degrees of freedom, five standard deviations


@pytest.mark.parametrize("samples", [107, 10_007])
def test_global_batch_does_not_depend_on_world_size(samples: int) -> None:
    positions = order.permutation(samples, seed=3, epoch=1)
    for step in range(order.batches_per_epoch(samples, 24, 1)):
        expected = global_batch(positions, step, 24, 1)
        for world_size in (2, 3, 8):
            np.testing.assert_array_equal(global_batch(positions, step, 24 // world_size, world_size), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [107, 10_007])
def test_epoch_has_samples_once_and_drops_less_than_a_batch(samples: int, world_size: int) -> None:
    positions = order.permutation(samples, seed=3, epoch=1)
    steps = order.batches_per_epoch(samples, 4, world_size)
    seen = np.concatenate([global_batch(positions, step, 4, world_size) for step in range(steps)])
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= samples - len(seen) < 4 * world_size


@given(
    samples=st.integers(1, 5000), batch=st.integers(1, 64), world_size=st.integers(1, 9), accumulation=st.integers(1, 5)
)
def test_steps_are_whole_optimizer_steps_that_fit(samples: int, batch: int, world_size: int, accumulation: int) -> None:
    steps = order.batches_per_epoch(samples, batch, world_size, accumulation)
    assert steps % accumulation == 0
    assert steps * batch * world_size <= samples < (steps + accumulation) * batch * world_size


def test_window_order_has_samples_once_and_keeps_windows_together() -> None:
    shard = np.repeat(np.arange(7), [50, 50, 50, 50, 50, 50, 13])
    drawn = order.window_permutation(shard, 3, seed=5, epoch=2)
    np.testing.assert_array_equal(np.sort(drawn), np.arange(len(shard)))
    met: list[int] = []
    for number in shard[drawn]:
        if number not in met:
            met.append(int(number))
    assert sorted(met) == list(range(7))
    begin = 0
    for window in (met[0:3], met[3:6], met[6:7]):
        length = int(np.isin(shard, window).sum())
        samples = drawn[begin : begin + length]
        assert set(shard[samples]) == set(window)
        if len(window) > 1:  # mixed, not one shard after the other
            assert np.count_nonzero(np.diff(shard[samples])) > length // 3
        begin += length


def test_window_order_depends_on_epoch_and_shuffles_shards() -> None:
    shard = np.repeat(np.arange(40), 5)
    first, second = (order.window_permutation(shard, 4, seed=5, epoch=epoch) for epoch in (0, 1))
    windows = [set(shard[drawn[:20]].tolist()) for drawn in (first, second)]
    assert windows[0] != windows[1]
    assert windows[0] != {0, 1, 2, 3}
    np.testing.assert_array_equal(first, order.window_permutation(shard, 4, seed=5, epoch=0))


@pytest.mark.parametrize("samples", [3, 107, 10_007])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_evaluation_ranges_cover_every_sample_exactly_once(samples: int, world_size: int) -> None:
    ranges = [order.eval_range(samples, rank, world_size) for rank in range(world_size)]
    covered = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    np.testing.assert_array_equal(covered, np.arange(samples))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), share=st.floats(0, 1))
def test_subset_has_every_class_in_proportion(sizes: list[int], share: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    count = round(share * len(labels))
    chosen = order.stratified_subset(labels, count)
    assert len(chosen) == len(set(chosen.tolist())) == min(len(labels), max(count, len(sizes)))
    assert np.all(np.diff(chosen) > 0)
    found = np.array([np.count_nonzero(labels[chosen] == 3 * number) for number in range(len(sizes))])
    assert found.min() >= 1
    if found.min() > 1:  # otherwise classes of one sample take the place of others
        assert np.abs(found - np.array(sizes) * len(chosen) / len(labels)).max() < 1 + len(sizes) / 2


def test_subset_is_balanced_random_and_contained_in_larger_ones() -> None:
    labels = np.arange(10_000) % 10
    small, large = order.stratified_subset(labels, 1000), order.stratified_subset(labels, 1505)
    assert np.bincount(labels[small]).tolist() == [100] * 10
    assert set(np.bincount(labels[large]).tolist()) <= {150, 151}
    assert set(small) <= set(large)
    assert abs(small.mean() - 5000) < 400  # from the whole split, not from its start
    np.testing.assert_array_equal(small, order.stratified_subset(labels, 1000))
