"""Ranks that decide together to stop or save, at the same step."""

from __future__ import annotations

import time

import pytest

from helpers.training import alone, on_ranks
from train.distributed import collectives
from train.distributed.consensus import StopConsensus
from train.distributed.process_group import Ranks

Answers = list[tuple[int, int, bool]]  # (steps done, signal, whether to save), where there is something to do


def answers(ranks: Ranks, signal_at: dict[int, int], due_at: int, steps: int) -> tuple[Answers, int]:
    """Return the decisions over `steps` steps of 2 ms, and how often the ranks communicated.

    signal_at: the step at which each rank receives a signal; due_at: the step at which rank 0 wants to save.
    """
    calls = 0
    max_over_ranks = collectives.max_over_ranks

    def counted(values: list[int]) -> list[int]:
        nonlocal calls
        calls += 1
        return max_over_ranks(values)

    collectives.max_over_ranks = counted
    done, is_saved = 0, False

    def is_due() -> bool:
        return ranks.is_first and done >= due_at and not is_saved

    mine = signal_at.get(ranks.rank, steps + 1)
    consensus = StopConsensus(lambda: 15 if done >= mine else 0, is_due, poll_interval_s=0.02)
    decisions = []
    consensus.reset(0)
    for step in range(1, steps + 1):
        time.sleep(0.002)
        done = step
        signal, saves = consensus.poll(done)
        is_saved = is_saved or saves
        if signal or saves:
            decisions.append((step, signal, saves))
        if signal:
            break
    return decisions, calls


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_stop_soon_at_the_same_step(rank: int) -> None:
    results = on_ranks(3, answers, {rank: 100}, 10**6, 1000)
    assert results[0][0] == results[1][0] == results[2][0]
    ((step, signal, saves),) = results[0][0]
    assert (signal, saves) == (15, False)
    assert 100 <= step < 1000


def test_all_ranks_save_once_by_the_clock_of_rank_0() -> None:
    results = on_ranks(2, answers, {}, 50, 400)
    assert results[0][0] == results[1][0]
    assert [(signal, saves) for _, signal, saves in results[0][0]] == [(0, True)]


def test_ranks_communicate_rarely() -> None:
    (_, calls), _ = on_ranks(2, answers, {}, 10**6, 500)
    assert 5 <= calls <= 250  # about every tenth step of 2 ms, more often at the start and on a busy machine


def test_single_process_stops_and_saves_at_once() -> None:
    with alone():
        decisions, calls = answers(Ranks(), {0: 7}, 5, 20)
        assert decisions == [(5, 0, True), (7, 15, False)]
        assert calls == 0
