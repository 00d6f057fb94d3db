"""Tests of tools.runs.run_slots."""

from __future__ import annotations

import os

import pytest

from configs.utils.errors import UserError
from tools.runs.run_slots import RunSlot, make_slots


def test_gpus_and_threads_are_divided_into_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert make_slots(["0", "1", "2", "3", "4"], 2, None) == [RunSlot(("0", "1"), 2, 2), RunSlot(("2", "3"), 2, 2)]
    assert make_slots(["0"], 1, 2) == [RunSlot(("0",), 1, 4), RunSlot(("0",), 1, 4)]
    assert make_slots([], 1, None) == [RunSlot()]
    assert make_slots([], 1, 3) == [RunSlot((), 1, 2)] * 3
    with pytest.raises(UserError, match="--gpus-per-run 2 exceeds the 1 visible GPUs"):
        make_slots(["0"], 2, None)
    with pytest.raises(UserError, match="--parallel 0 is not"):
        make_slots([], 1, 0)
