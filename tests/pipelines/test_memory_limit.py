"""Limit the memory of a call."""

from __future__ import annotations

import resource

import pytest

from pipelines import memory_limit

MIB = 1 << 20
LARGE = 8192 * MIB  # more than what earlier tests have freed and the process has kept


def test_allocations_beyond_the_limit_fail() -> None:
    with memory_limit.at_most(256 * MIB):
        assert len(bytearray(64 * MIB)) == 64 * MIB
        with pytest.raises(MemoryError):
            bytearray(LARGE)


def test_limit_is_restored_after_an_error() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ZeroDivisionError), memory_limit.at_most(256 * MIB):
        raise ZeroDivisionError
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(512 * MIB)) == 512 * MIB


def test_inner_limit_never_raises_the_outer_one() -> None:
    with memory_limit.at_most(128 * MIB), memory_limit.at_most(2 * LARGE), pytest.raises(MemoryError):
        bytearray(LARGE)
