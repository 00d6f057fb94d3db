"""Random numbers for fault tests: different in every run, and reproducible by their seed."""

from __future__ import annotations

import os
import random
import time

import pytest


def seeded() -> random.Random:
    """Return a generator and print its seed; set ZHU_FAULT_SEED to reproduce a failure."""
    seed = int(os.environ.get("ZHU_FAULT_SEED", time.time_ns() % 10**9))
    print(f"ZHU_FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def chance() -> random.Random:
    return seeded()
