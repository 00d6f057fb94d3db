"""Chance in tests of faults: other instants and places in every run, and yet any run can be repeated."""

from __future__ import annotations

import os
import random
import time

import pytest


def seeded() -> random.Random:
    """The seed is printed, so that a test that fails shows it; ZHU_FAULT_SEED gives it again."""
    seed = int(os.environ.get("ZHU_FAULT_SEED", time.time_ns() % 10**9))
    print(f"ZHU_FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def chance() -> random.Random:
    return seeded()
