"""Tests of tools.runs.sweep_report."""

from __future__ import annotations

from helpers.sweeps import points_of
from tools.runs.sweep_report import edge_hints


def test_best_value_at_the_edge_gives_a_hint() -> None:
    configs = [point.config for point in points_of("train.lr=1e-3,3e-3,1e-2", "data.batch_size=32,64")]
    assert edge_hints(configs, 0) == ["train.lr=0.001 is the smallest that was tried; smaller ones may be better"]
    assert edge_hints(configs, 2) == []
    assert edge_hints(configs, 5) == ["train.lr=0.01 is the largest that was tried; larger ones may be better"]
