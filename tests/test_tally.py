"""The checksum of samples: whatever the order and however they are cut into batches, and different for any others."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tally import NOTHING, tally_of, tally_of_split


def plain_checksum(samples: list[int]) -> int:
    """splitmix64, one sample after the other, in whole numbers without an end."""
    total, mask = 0, 2**64 - 1
    for sample in samples:
        value = (sample + 0x9E3779B97F4A7C15) & mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        total += value ^ (value >> 31)
    return total % 2**64


@given(st.permutations(range(40)), st.lists(st.integers(0, 40), max_size=6))
def test_order_and_batches_do_not_matter(order: list[int], cuts: list[int]) -> None:
    batches = np.split(np.array(order, np.int64), sorted(cuts))
    total = reduce(add, map(tally_of, batches), NOTHING)
    assert total == tally_of_split(40)
    assert (total.samples, total.checksum) == (40, plain_checksum(order))


@given(st.integers(2, 3000), st.data())
def test_a_sample_twice_in_the_place_of_another_shows(samples: int, data: st.DataObject) -> None:
    place, other = data.draw(st.lists(st.integers(0, samples - 1), min_size=2, max_size=2, unique=True))
    indices = np.arange(samples)
    indices[place] = other
    assert tally_of(indices).samples == samples
    assert tally_of(indices) != tally_of_split(samples)
