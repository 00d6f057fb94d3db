"""Skipped steps leave no trace, as if their batch had not occurred."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import DataConfig, OptimizerConfig, TrainConfig
from configs.utils.errors import UserError
from helpers.training import CPU, alone, make_state, random_batch, small_net
from helpers.trees import assert_equal_trees
from models import Normalize, PixelClassifier
from models.speedrun import SpeedrunNet
from pipelines.loader.batches import Batch
from train.engine import execution
from train.engine.state import TrainState, restart_in_place
from train.engine.step import train_step
from train.engine.warm_up import blank_batch, warm_up_training
from train.engine.whitening import whiten, whitening_images
from train.optim.nonfinite import max_abs

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd"}, {"name": "adamw"}, {"name": "adam"}, {"name": "rmsprop"}, {"name": "muon"}, {"name": "lamb"},
]  # fmt: skip
BY_NAME = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["name"])


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def guarded(optimizer: dict[str, Any] | None = None, **settings: Any) -> TrainState:
    return make_state(small_net(), optimizer, on_nonfinite="skip", **settings)


def bad_step(state: TrainState, batch: Batch, value: float = float("nan"), *, update: bool = True) -> None:
    """Train a step whose first layer yields `value` once, which reaches the loss and batch norm statistics."""

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 0, 0, 0] = value
        return output

    handle = state.network.stem.register_forward_hook(spoil)  # type: ignore[operator,union-attr]
    train_step(state, batch, optimizer_step=update)
    handle.remove()


def state_of(state: TrainState) -> dict[str, torch.Tensor]:
    counts = {"num_batches_tracked"}  # also counts skipped batches
    tensors = state.network.state_dict()
    return {name: value.clone() for name, value in tensors.items() if name.split(".")[-1] not in counts}


@BY_NAME
@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 0.1}], ids=str)
def test_skipped_step_leaves_no_trace(optimizer: dict[str, Any], settings: dict[str, Any]) -> None:
    state, other = guarded(optimizer, **settings), guarded(optimizer, **settings)
    batches = [random_batch(8, seed=seed, classes=12) for seed in range(4)]
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        train_step(state, batch)
        torch.manual_seed(number)
        train_step(other, batch)
        if number == 1:
            before = state_of(state)
            bad_step(state, random_batch(8, seed=9, classes=12))
            assert all(torch.equal(value, before[name]) for name, value in state_of(state).items())
    ours, theirs = state_of(state), state_of(other)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(state.sums, other.sums)
    assert state.guard is not None
    assert float(state.guard.skipped) == 1


@BY_NAME
def test_finite_steps_equal_those_without_a_guard_bitwise(optimizer: dict[str, Any]) -> None:
    ours, plain = guarded(optimizer), make_state(small_net(), optimizer)
    for seed in range(3):
        for state in (ours, plain):
            torch.manual_seed(seed)
            train_step(state, random_batch(8, seed=seed, classes=12))
    pairs = zip(ours.network.state_dict().values(), plain.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(ours.sums, plain.sums)


@pytest.mark.parametrize("change", ["whiten", "restart", "warm up"])
def test_skipped_first_step_keeps_replaced_buffers(change: str, npy_data: Path) -> None:
    def build(seed: int) -> TrainState:
        torch.manual_seed(seed)
        network = PixelClassifier(Normalize([0.5] * 3, [0.3] * 3), SpeedrunNet(12, (24, 24, 24)))
        return make_state(network, on_nonfinite="skip")

    state = build(0)
    if change == "whiten":
        whiten(state, whitening_images(state, DataConfig(path=str(npy_data))))
    elif change == "restart":
        train_step(state, random_batch(8, classes=12))
        restart_in_place(state, build(1))
    else:
        warm_up_training(state, blank_batch(8, 32, CPU))
    assert state.guard is not None
    before, skipped = state_of(state), float(state.guard.skipped)
    state.network.register_forward_hook(lambda module, images, logits: logits * float("nan"))
    train_step(state, random_batch(8, seed=1, classes=12))
    assert float(state.guard.skipped) == skipped + 1
    assert_equal_trees(state_of(state), before)


def test_without_guard_bad_batch_corrupts_weights() -> None:
    state = make_state(small_net())
    bad_step(state, random_batch(8, classes=12))
    assert not state.network.state_dict()["norm.running_mean"].isfinite().all()
    assert not state.network.state_dict()["head.weight"].isfinite().all()


def test_step_with_one_bad_micro_step_is_skipped() -> None:
    state = guarded(accumulation_steps=2)
    before = state_of(state)
    bad_step(state, random_batch(8, classes=12), update=False)
    train_step(state, random_batch(8, seed=1, classes=12))
    assert all(torch.equal(value, before[name]) for name, value in state_of(state).items())
    assert float(state.sums[2]) == 8  # of the good micro-step only


def test_fp16_overflow_counts_as_a_skipped_step() -> None:
    state = guarded(amp="fp16")
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**60})
    before = state_of(state)
    train_step(state, random_batch(8, classes=12))
    assert torch.equal(state_of(state)["head.weight"], before["head.weight"])
    assert state.guard is not None
    assert float(state.guard.skipped) == 1


def test_optimizer_that_needs_host_is_not_captured() -> None:
    gpu = torch.device("cuda")
    for name, captures in (("adamw", True), ("sgd", True), ("muon", False), ("rmsprop", False)):
        config = TrainConfig(on_nonfinite="skip", optimizer=OptimizerConfig(name=name))
        assert execution.uses_cuda_graph(config, gpu, torch.bfloat16) == captures
        if not captures:
            with pytest.raises(UserError, match=f"checks the gradients of {name} on the host"):
                execution.uses_cuda_graph(config.model_copy(update={"cuda_graph": "on"}), gpu, None)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [([[1.0, -3.0], [2.0]], 3.0), ([[], [2.0]], 2.0), ([[1.0], [float("inf")]], float("inf")),
     ([[1.0, -float("inf")]], float("inf"))],
)  # fmt: skip
def test_max_abs_finds_the_largest_element(tensors: list[list[float]], expected: float) -> None:
    assert float(max_abs([torch.tensor(values) for values in tensors])) == expected


def test_max_abs_is_nan_if_any_element_is() -> None:
    assert max_abs([torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])]).isnan()
