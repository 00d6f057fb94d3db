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


def global_batch(positions: np.ndarray, step: int, batch_size: int, world_size: int, machines: int = 1) -> np.ndarray:
    parts = [order.train_batch(positions, step, batch_size, rank, world_size, machines) for rank in range(world_size)]
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


def shards_of(*sizes: int) -> np.ndarray:
    """Return the shard of each sample, int32 [samples]."""
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(any),
    lanes=st.integers(1, 12),
    epoch=st.integers(0, 9),
)
def test_lane_order_is_a_permutation_for_any_shards(sizes: list[int], lanes: int, epoch: int) -> None:
    shard = shards_of(*sizes)
    drawn = order.lane_permutation(shard, lanes, 5, epoch)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(np.sort(drawn), np.arange(len(shard)))
    np.testing.assert_array_equal(drawn, order.lane_permutation(shard, lanes, 5, epoch))


EQUAL, SHORT_LAST, NO_MULTIPLE, UNEQUAL = [60] * 24, [60] * 23 + [7], [60] * 20, [58, 60, 57, 60] * 6


@pytest.mark.parametrize(("sizes", "least"), [(EQUAL, 8), (SHORT_LAST, 7), (NO_MULTIPLE, 4), (UNEQUAL, 7)])
def test_every_batch_mixes_all_lanes_to_the_end_of_the_epoch(sizes: list[int], least: int) -> None:
    shard = shards_of(*sizes)
    for epoch in range(5):
        drawn = order.lane_permutation(shard, 8, 5, epoch)
        batches = shard[drawn[: len(shard) // 32 * 32]].reshape(-1, 32)
        assert min(len(set(batch)) for batch in batches.tolist()) >= least  # the last four shards are split over lanes
        assert max(np.bincount(batch).max() for batch in batches) <= 8  # 4 from each lane, of which two may share one


@pytest.mark.parametrize("sizes", [EQUAL, SHORT_LAST, NO_MULTIPLE, UNEQUAL])
def test_few_more_shards_than_lanes_are_open_at_a_time(sizes: list[int]) -> None:
    shard = shards_of(*sizes)
    schedule = order.shard_schedule(order.lane_permutation(shard, 8, 5, 2), shard, len(shard) // 16, 16)
    for step in range(len(shard) // 16):
        assert np.count_nonzero((schedule.first <= step) & (schedule.last >= step)) <= 16  # 8 end while 8 begin
    used = schedule.last - schedule.first + 1
    assert np.median(used) <= 60 * 8 / 16 + 1


def test_lane_order_shuffles_within_shards_and_differs_between_epochs() -> None:
    shard = shards_of(*[500] * 40)
    orders = [order.lane_permutation(shard, 4, 5, epoch) for epoch in range(4)]
    for i, drawn in enumerate(orders):
        within = drawn[shard[drawn] == 7]
        assert abs(np.corrcoef(within, np.arange(500))[0, 1]) < 5 / np.sqrt(500)  # five standard deviations of chance
        for other in orders[:i]:
            assert set(shard[drawn[:8]]) != set(shard[other[:8]])
            assert abs(np.corrcoef(within, other[shard[other] == 7])[0, 1]) < 5 / np.sqrt(500)
            assert abs(np.corrcoef(drawn, other)[0, 1]) < 5 / np.sqrt(40)  # of shards, not of samples


@pytest.mark.parametrize("sizes", [EQUAL, SHORT_LAST, [60] * 3], ids=["equal", "short last", "few shards"])
@pytest.mark.parametrize("batch_size", [48, 24])
def test_global_batches_are_the_same_for_any_ranks_and_machines(batch_size: int, sizes: list[int]) -> None:
    shard = shards_of(*sizes)
    drawn = order.lane_permutation(shard, 8, seed=3, epoch=1)
    for step in range(len(shard) // batch_size):
        expected = np.sort(drawn[step * batch_size : (step + 1) * batch_size])
        for world_size, machines in [(1, 1), (3, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4), (12, 4), (12, 6)]:
            found = global_batch(drawn, step, batch_size // world_size, world_size, machines)
            np.testing.assert_array_equal(np.sort(found), expected)


@pytest.mark.parametrize("machines", [1, 2, 3, 4])
def test_neighbours_are_in_the_same_batch_on_any_machines(machines: int) -> None:
    for rank in range(12):
        positions = order.train_positions(3, 10, rank, 12, machines)
        np.testing.assert_array_equal(positions[::2] % 2, 0)
        np.testing.assert_array_equal(positions[1::2], positions[::2] + 1)


@pytest.mark.parametrize("epoch", range(3))
@pytest.mark.parametrize(("machines", "world_size"), [(2, 2), (2, 8), (4, 4), (8, 8)])
def test_each_machine_reads_only_its_share_of_the_shards(machines: int, world_size: int, epoch: int) -> None:
    for shards, most in ((24, 24), (20, 20 + 4 * (machines - 1))):  # 20: four shards are split over the eight lanes
        shard = shards_of(*[64] * shards)
        drawn = order.lane_permutation(shard, 8, 5, epoch)
        batch_size = 64 // world_size
        steps = order.batches_per_epoch(len(shard), batch_size, world_size)
        parts = [
            order.shard_schedule(drawn, shard, steps, batch_size, rank, world_size, machines)
            for rank in range(0, world_size, world_size // machines)
        ]
        together = np.concatenate([part.shard for part in parts])
        assert set(together.tolist()) == set(range(shards))
        assert len(together) <= most
        assert max(len(part.shard) for part in parts) <= shards // machines + 4


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("window", [0, 4])
def test_schedule_has_first_and_last_batch_of_each_shard(window: int, machines: int) -> None:
    shard = shards_of(50, 0, 50, 50, 47, 50, 50, 13, 50)
    drawn = order.lane_permutation(shard, window, 5, 2) if window else order.permutation(len(shard), 5, 2)
    steps = order.batches_per_epoch(len(shard), 6, 4)
    for machine in range(machines):
        ranks = range(machine * 4 // machines, (machine + 1) * 4 // machines)
        uses: dict[int, list[int]] = {}
        for step in range(steps):
            for rank in ranks:
                for number in shard[order.train_batch(drawn, step, 6, rank, 4, machines)].tolist():
                    uses.setdefault(number, []).append(step)
        schedule = order.shard_schedule(drawn, shard, steps, 6, ranks[0], 4, machines)
        found = {number: (first, last) for number, first, last in zip(*(a.tolist() for a in schedule), strict=True)}
        assert found == {number: (min(steps), max(steps)) for number, steps in uses.items()}
        assert np.all(np.diff(schedule.first) >= 0)


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
