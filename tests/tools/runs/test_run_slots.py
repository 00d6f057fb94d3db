"""Tests of tools.runs.run_slots."""

from __future__ import annotations

import os

import pytest

from configs.utils.errors import UserError
from pipelines.cluster.connection import Node
from tools.runs.run_slots import RunSlot, make_cluster_slot, make_slots


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


def nodes(*sizes: tuple[int, int]) -> list[Node]:
    return [Node(str(number), "host", *size) for number, size in enumerate(sizes)]


def test_runs_on_a_cluster_share_the_cpus_of_a_node() -> None:
    gpu_nodes = nodes((32, 0), (16, 4), (64, 8))
    assert make_cluster_slot(gpu_nodes, 1, None, None) == (RunSlot((), 1, 4), 4, 1)
    assert make_cluster_slot(gpu_nodes, 2, None, 1) == (RunSlot((), 2, 4), 8, 2)
    assert make_cluster_slot(gpu_nodes, 8, None, None) == (RunSlot((), 8, 8), 64, 8)
    assert make_cluster_slot(gpu_nodes, 4, 2, None) == (RunSlot((), 4, 1), 2, 4)
    assert make_cluster_slot(nodes((8, 0), (4, 0)), 1, None, None) == (RunSlot((), 1, 4), 4, 0)
    assert make_cluster_slot(nodes((8, 0), (4, 0)), 1, None, 3) == (RunSlot((), 1, 2), 2, 0)
    assert make_cluster_slot(nodes((8, 0), (4, 0)), 1, 6, 3) == (RunSlot((), 1, 6), 6, 0)


def test_run_that_fits_no_node_is_refused() -> None:
    with pytest.raises(UserError, match="--gpus-per-run 3 exceeds the 2 GPUs of the cluster's largest node; use fewer"):
        make_cluster_slot(nodes((8, 2), (8, 1)), 3, None, None)
    with pytest.raises(UserError, match="--gpus-per-run 2 exceeds the 0 GPUs"):
        make_cluster_slot(nodes((8, 0)), 2, None, None)
    with pytest.raises(UserError, match="--cpus-per-run 9 exceeds the 8 CPUs of the cluster's largest node; use fewer"):
        make_cluster_slot(nodes((8, 0), (4, 0)), 1, 9, None)
    with pytest.raises(UserError, match="--cpus-per-run 0 is not a positive whole number"):
        make_cluster_slot(nodes((8, 0)), 1, 0, None)
