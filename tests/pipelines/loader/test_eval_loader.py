"""The checksum is independent of order and batches and differs for other samples."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.loader.eval_loader import MODULUS, SampleChecksum, checksum, split_checksum


def plain_checksum(samples: list[int]) -> int:
    """Sum splitmix64 sample by sample, in Python integers."""
    total, mask = 0, 2**64 - 1
    for sample in samples:
        value = (sample + 0x9E3779B97F4A7C15) & mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        total += value ^ (value >> 31)
    return total % 2**64


@given(st.permutations(range(40)), st.integers(1, 45))
def test_checksum_is_independent_of_order_and_batches(order: list[int], batch_size: int) -> None:
    batches = [order[begin : begin + batch_size] for begin in range(0, 40, batch_size)]
    found = [checksum(np.array(batch)) for batch in batches]
    assert found == [SampleChecksum(len(batch), plain_checksum(batch)) for batch in batches]
    assert sum(one.checksum for one in found) % MODULUS == split_checksum(40).checksum
    assert checksum(np.array(order)) == split_checksum(40) == SampleChecksum(40, plain_checksum(order))


def test_no_samples_have_an_empty_checksum() -> None:
    assert checksum(np.empty(0, np.int64)) == SampleChecksum()


@given(st.integers(2, 3000), st.data())
def test_duplicate_sample_changes_the_checksum(samples: int, data: st.DataObject) -> None:
    place, other = data.draw(st.lists(st.integers(0, samples - 1), min_size=2, max_size=2, unique=True))
    indices = np.arange(samples)
    indices[place] = other
    found = checksum(indices)
    assert found.samples == samples
    assert found != split_checksum(samples)
