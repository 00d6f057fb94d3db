"""The measurement of training throughput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema.optim import EmaConfig, LookaheadConfig
from helpers.loaders import train_loader
from helpers.training import alone, make_state, on_ranks, small_net
from train.distributed.process_group import Ranks
from train.optim.averaging import build_ema, build_lookahead
from train.throughput import measure_images_per_s


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


# Throughput


def throughput(ranks: Ranks, data: Path) -> int:
    """Return the number of measured batches. The clocks run fast, and at a different speed on each rank."""
    batches = 0

    def count(*_: Any) -> None:
        nonlocal batches
        batches += 1

    clock = time.perf_counter
    time.perf_counter = lambda: clock() * 20 * (1 + 2 * ranks.rank)  # type: ignore[assignment]
    state = make_state(small_net())
    state.network.register_forward_hook(count)
    loader = train_loader(data, batch_size=4)
    measure_images_per_s(state, loader, ranks.world_size, warmup_steps=10, seconds=0.1)
    return batches


def test_averages_are_updated_after_each_optimizer_step(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(small_net(12), accumulation_steps=3)
    state.ema = build_ema(state.network, EmaConfig(decay=0.5))
    state.lookahead = build_lookahead(state.network, LookaheadConfig(every_steps=5))
    micro_steps, averaged, synchronized = [], [], []
    state.network.register_forward_hook(lambda *_: micro_steps.append(1))
    monkeypatch.setattr(state.ema, "update", lambda done: averaged.append((done, len(micro_steps))))
    monkeypatch.setattr(state.lookahead, "sync", lambda kept: synchronized.append((kept, len(micro_steps))))
    measure_images_per_s(state, train_loader(npy_data, batch_size=4), 1, warmup_steps=10, seconds=0.01)
    assert len(micro_steps) % 3 == 0
    assert averaged == [(done, 3 * done) for done in range(1, len(micro_steps) // 3 + 1)]
    assert len(averaged) > 2 * 4
    assert synchronized == [(pytest.approx(0), 15 * (n + 1)) for n in range(len(averaged) // 5)]


def test_throughput_makes_same_steps_on_all_ranks(npy_data: Path) -> None:
    first, second = on_ranks(2, throughput, npy_data)
    assert first == second > 2 * 10
