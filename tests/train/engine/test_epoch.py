"""An epoch is a plain loop over the loader, and continues bitwise after an interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.loaders import train_loader
from helpers.training import alone, make_state, small_net
from models import build_model
from pipelines.interfaces import Position
from pipelines.loader.train_loader import TrainLoader
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.engine.epoch import train_epoch, training_steps
from train.engine.state import TrainState
from train.optim.schedule import Timeline, learning_rate


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


# The epoch


def test_learning_rate_changes_per_optimizer_step(npy_data: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "lr": 0.1, "warmup_epochs": 1, "accumulation_steps": 3}
    state = make_state(small_net(), optimizer={"name": "sgd"}, **settings)
    loader = train_loader(npy_data, batch_size=50, accumulation_steps=3)
    assert len(loader) == 12
    used: list[float] = []
    state.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    noted: list[tuple[int, float]] = []
    for _ in range(2):
        noted += training_steps(state, loader, seed=0)
    expected = [learning_rate(update, Timeline.even(2, 4), state.config) for update in range(8)]
    assert used == expected
    assert noted == list(enumerate(expected))
    assert len(set(expected[:4])) == 4


def test_epoch_equals_plain_loop_over_loader(npy_data: Path) -> None:
    state = make_state(build_model("lenet", 12, mean=[0.5] * 3, std=[0.3] * 3), epochs=1, schedule="constant")
    model = copy.deepcopy(state.network)
    times = train_epoch(state, train_loader(npy_data), seed=0, rank=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.ndim > 1]
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0})
    for images, labels in train_loader(npy_data):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for ours, theirs in zip(state.network.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert times.micro_steps == 7
    assert 0 <= times.wait_s <= times.time_s


class Interrupted(Exception):
    pass


def train_both_epochs(state: TrainState, loader: TrainLoader, after_step: Callable[[int, float], None]) -> None:
    while loader.position.epoch < 2:
        for step, lr in training_steps(state, loader, seed=0):
            after_step(step, lr)


def trained(data: Path, accumulation_steps: int, *, epochs: int = 2, seed: int = 0, rank: int = 0) -> dict[str, Any]:
    """Return weights and statistics after `epochs` without interruption."""
    state = make_state(small_net(), accumulation_steps=accumulation_steps, epochs=2)
    loader = train_loader(data, batch_size=50, accumulation_steps=accumulation_steps)
    for _ in range(epochs):
        train_epoch(state, loader, seed=seed, rank=rank)
    return state.network.state_dict()


@pytest.mark.parametrize(
    ("accumulation_steps", "break_at"), [(1, 0), (1, 9), (1, 13), (1, 20), (2, 3), (2, 6), (2, 10)]
)
def test_run_with_dropout_resumes_bitwise_after_any_step(
    accumulation_steps: int, break_at: int, npy_data: Path, tmp_path: Path
) -> None:
    def new() -> tuple[TrainState, TrainLoader]:
        state = make_state(small_net(), accumulation_steps=accumulation_steps, epochs=2)
        return state, train_loader(npy_data, batch_size=50, accumulation_steps=accumulation_steps)

    state, loader = new()

    def save_and_break(update: int, lr: float) -> None:
        if update == break_at:
            store.save(tmp_path / "last.pt", state, state.sums, loader_state=asdict(loader.position))
            raise Interrupted

    with pytest.raises(Interrupted):
        train_both_epochs(state, loader, save_and_break)

    torch.manual_seed(99)
    state, loader = new()
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.fill_(0.5)  # a restore that forgets something shows
    content = store.load(tmp_path / "last.pt")
    restore_state(state, content, tmp_path / "last.pt")
    loader.position = Position(**content["loader_state"])
    train_both_epochs(state, loader, lambda *_: None)
    expected = trained(npy_data, accumulation_steps)
    resumed = state.network.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_dropout_differs_between_ranks_and_seeds_and_is_repeatable(npy_data: Path) -> None:
    def weights(**who: int) -> torch.Tensor:
        head: torch.Tensor = trained(npy_data, 1, epochs=1, **who)["head.weight"]
        return head

    first = weights(rank=0, seed=0)
    assert torch.equal(first, weights(rank=0, seed=0))
    assert not torch.equal(first, weights(rank=1, seed=0))
    assert not torch.equal(first, weights(rank=0, seed=1))
