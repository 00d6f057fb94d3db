"""The measurement of training throughput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema.optim import EmaConfig, LookaheadConfig
from helpers.loaders import train_loader
from helpers.training import alone, make_state, on_ranks, random_batch, small_net
from train.distributed.process_group import Ranks
from train.optim.averaging import build_ema, build_lookahead
from train.throughput import full_step, measure_images_per_s


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


def test_averages_are_updated_as_often_as_in_training() -> None:
    state = make_state(small_net(), accumulation_steps=2)
    state.ema = build_ema(state.network, EmaConfig(decay=0.5, every_steps=3))
    state.lookahead = build_lookahead(state.network, LookaheadConfig(every_steps=3))
    assert state.ema is not None
    assert state.lookahead is not None
    copies = (state.ema.state()["head.weight"], state.lookahead.slow["head.weight"])
    changes: tuple[list[int], list[int]] = ([], [])
    for number in range(12):
        before = [tensor.clone() for tensor in copies]
        full_step(state, random_batch(4), number // 2, optimizer_step=number % 2 == 1)
        for old, new, changed in zip(before, copies, changes, strict=True):
            changed += [] if torch.equal(old, new) else [number]
    assert changes == ([5, 11], [5, 11])


def test_throughput_makes_same_steps_on_all_ranks(npy_data: Path) -> None:
    first, second = on_ranks(2, throughput, npy_data)
    assert first == second > 2 * 10
