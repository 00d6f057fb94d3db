"""Ranks that decide together: the same answer at the same update, asked for about once a second."""

from __future__ import annotations

import time

import pytest

from helpers.training import alone, on_ranks
from train.distributed import collectives, consensus
from train.distributed.consensus import StopConsensus
from train.distributed.process_group import Ranks

Answers = list[tuple[int, int, bool]]  # (update, signal, whether to save) where it is not nothing


def answers(ranks: Ranks, asked_at: dict[int, int], due_at: int, updates: int) -> tuple[Answers, int]:
    """What a rank is told over so many updates of 2 ms, and how often it asked the others."""
    asks = 0
    max_over_ranks = collectives.max_over_ranks

    def counted(values: list[int]) -> list[int]:
        nonlocal asks
        asks += 1
        return max_over_ranks(values)

    collectives.max_over_ranks, consensus.POLL_INTERVAL_S = counted, 0.02  # type: ignore[assignment]
    done, is_saved = 0, False

    def is_due() -> bool:
        return ranks.is_first and done >= due_at and not is_saved

    mine = asked_at.get(ranks.rank, updates + 1)
    decide, told = StopConsensus(lambda: 15 if done >= mine else 0, is_due), []
    decide.reset(0)
    for update in range(1, updates + 1):
        time.sleep(0.002)
        done = update
        signal, saves = decide.poll(done)
        is_saved = is_saved or saves
        if signal or saves:
            told.append((update, signal, saves))
        if signal:
            break
    return told, asks


@pytest.mark.parametrize("asked", [0, 2])
def test_all_ranks_stop_soon_at_the_same_step(asked: int) -> None:
    results = on_ranks(3, answers, {asked: 100}, 10**6, 1000)
    assert results[0][0] == results[1][0] == results[2][0]
    ((update, signal, saves),) = results[0][0]
    assert (signal, saves) == (15, False)
    assert 100 <= update < 1000


def test_all_ranks_save_once_by_the_clock_of_rank_0() -> None:
    results = on_ranks(2, answers, {}, 50, 400)
    assert results[0][0] == results[1][0]
    assert [(signal, saves) for _, signal, saves in results[0][0]] == [(0, True)]


def test_ranks_communicate_rarely() -> None:
    (_, asks), _ = on_ranks(2, answers, {}, 10**6, 500)
    assert 5 <= asks <= 250  # about every tenth update of 2 ms, and more often at first and on a busy machine


def test_single_process_stops_and_saves_at_once() -> None:
    with alone():
        told, asks = answers(Ranks(), {0: 7}, 5, 20)
        assert told == [(5, 0, True), (7, 15, False)]
        assert asks == 0
