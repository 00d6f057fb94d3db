"""Speedruns: warm-up and reuse leave no trace, resumes are bitwise equal, frozen parameters stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import AugConfig, DataConfig, EvalConfig
from helpers.training import CPU, alone, make_state, on_ranks, random_batch, record_gradients, small_net
from helpers.trees import assert_equal_trees
from models import Normalize, PixelClassifier
from models.speedrun import SpeedrunNet, find_whitening
from pipelines import build_eval_loader, build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.distributed.process_group import Ranks
from train.engine.epoch import train_epoch, training_steps
from train.engine.hard_samples import HardSampleSelector
from train.engine.state import TrainState, restart_in_place
from train.engine.step import train_step
from train.engine.warm_up import warm_up
from train.engine.whitening import whiten, whitening_images
from train.optim.averaging import build_lookahead
from train.optim.factory import make_capturable

EPOCHS, STEPS = 3, 6
MUON: dict[str, Any] = {"name": "muon", "momentum": 0.6, "normalize_filters": True, "bias_lr": 0.05, "linear_lr": 0.02}
SGD: dict[str, Any] = {"name": "sgd", "momentum": 0.85, "norm_bias_lr": 0.5, "decay_biases": True}
RECIPES = pytest.mark.parametrize("recipe", ["muon", "sgd"])


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return PixelClassifier(Normalize([0.5] * 3, [0.3] * 3), SpeedrunNet(12, (24, 24, 24)))


def speedrun(recipe: str, seed: int = 0, **settings: Any) -> TrainState:
    """Return a small state with Muon alone, or SGD with Lookahead and a proxy."""
    shared: dict[str, Any] = {"epochs": EPOCHS, "lr": 0.05, "schedule": "linear", "whiten_bias_epochs": 1, **settings}
    if recipe == "muon":
        return make_state(network(seed), MUON, **shared, whiten_bias_anneal=True)
    extras = {"lookahead": {"every_steps": 2, "decay": 0.7}, "proxy": {"model": "x", "every_steps": 2}}
    state = make_state(network(seed), SGD, **shared, **extras)
    small = network(seed + 100)
    find_whitening(small).bias.requires_grad_(False)  # type: ignore[union-attr]
    state.proxy = HardSampleSelector(make_state(small, SGD, **shared), state.config.proxy)
    state.proxy.state.forward.train()
    state.lookahead = build_lookahead(state.network, state.config.lookahead)
    return state


def section_of(data: Path, batch_size: int = 16) -> DataConfig:
    """Train on the 107 samples of val, to be quick."""
    return DataConfig(path=str(data), batch_size=batch_size, train_split="val")


def loaders(data: Path) -> tuple[TrainLoader, EvalLoader]:
    section = section_of(data)
    aug = AugConfig(crop="pad", padding=2, padding_mode="reflect", flip_mode="alternating", cutout=8)
    return build_train_loader(section, aug, seed=3, device=CPU), build_eval_loader(section, EvalConfig(), device=CPU)


def train(state: TrainState, loader: TrainLoader, after_step: Callable[[int, float], None] = lambda *_: None) -> None:
    while loader.position.epoch < EPOCHS:
        for step, lr in training_steps(state, loader, seed=0):
            after_step(step, lr)


def everything(state: TrainState) -> dict[str, Any]:
    """Return everything that must agree between two runs."""
    trainings = [state] + ([state.proxy.state] if state.proxy is not None else [])
    return {
        "networks": [one.network.state_dict() for one in trainings],
        "optimizers": [one.optimizer.state_dict()["state"] for one in trainings],
        "slow": state.lookahead.slow if state.lookahead is not None else {},
        "sums": state.sums,
    }


def finished(recipe: str, data: Path, seed: int = 0) -> TrainState:
    state = speedrun(recipe, seed)
    whiten(state, whitening_images(state, section_of(data)))
    train(state, loaders(data)[0])
    return state


@pytest.mark.slow
@RECIPES
def test_warm_up_leaves_no_trace(recipe: str, npy_data: Path) -> None:
    state, (loader, val_loader) = speedrun(recipe), loaders(npy_data)
    begun = {name: value.clone() for name, value in state.network.state_dict().items()}
    state.plan = replace(state.plan, needs_warmup=True)  # like with a compiled step
    warm_up(state, loader, val_loader, "flip-translate")
    assert loader.position == Position(0)
    assert_equal_trees(state.network.state_dict(), begun)
    whiten(state, whitening_images(state, section_of(npy_data)))
    train(state, loader)
    assert_equal_trees(everything(state), everything(finished(recipe, npy_data)))


@pytest.mark.slow
@RECIPES
def test_run_restarted_in_place_equals_first_run(recipe: str, npy_data: Path) -> None:
    state = finished(recipe, npy_data, seed=5)
    restart_in_place(state, speedrun(recipe))
    whiten(state, whitening_images(state, section_of(npy_data)))
    train(state, loaders(npy_data)[0])
    assert_equal_trees(everything(state), everything(finished(recipe, npy_data)))


def test_restart_in_place_resets_plain_number_step_counts() -> None:
    def three_steps(state: TrainState) -> dict[str, torch.Tensor]:
        for number in range(3):
            torch.manual_seed(number)
            train_step(state, random_batch(8, seed=number))
        return state.network.state_dict()

    state, first = (make_state(small_net(seed=seed), {"name": "lamb"}) for seed in (5, 0))
    three_steps(state)
    restart_in_place(state, make_state(small_net(), {"name": "lamb"}))
    assert_equal_trees(three_steps(state), three_steps(first))


def test_checkpoint_stores_learning_rates_as_numbers(tmp_path: Path) -> None:
    state = speedrun("sgd")
    assert state.proxy is not None
    for optimizer in (state.optimizer, state.proxy.state.optimizer):
        make_capturable(optimizer, CPU)
    store.save(tmp_path / "last.pt", state, state.sums)
    content = store.load(tmp_path / "last.pt")
    for part in (content, content["proxy"]):
        assert {type(group["lr"]) for group in part["optimizer"]["param_groups"]} == {float}


class Interrupted(Exception):
    pass


@pytest.mark.slow
@RECIPES
@pytest.mark.parametrize("break_at", [2, STEPS - 1, STEPS + 1, 3 * STEPS - 1])
def test_interrupted_speedrun_resumes_bitwise(recipe: str, break_at: int, npy_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state, loader = speedrun(recipe), loaders(npy_data)[0]
    whiten(state, whitening_images(state, section_of(npy_data)))

    def save_and_break(update: int, lr: float) -> None:
        if update == break_at:
            store.save(path, state, state.sums, loader_state=asdict(loader.position))
            raise Interrupted

    with pytest.raises(Interrupted):
        train(state, loader, save_and_break)
    resumed, (loader, val_loader) = speedrun(recipe, seed=9), loaders(npy_data)
    resumed.plan = replace(resumed.plan, needs_warmup=True)
    warm_up(resumed, loader, val_loader, "flip")
    content = store.load(path)
    restore_state(resumed, content, path)
    loader.position = Position(**content["loader_state"])
    train(resumed, loader)
    assert_equal_trees(everything(resumed)["networks"], everything(finished(recipe, npy_data))["networks"])


@RECIPES
def test_whitening_bias_trains_in_its_epochs_only(recipe: str, npy_data: Path) -> None:
    state, loader = speedrun(recipe), loaders(npy_data)[0]
    layer = find_whitening(state.network)
    assert layer is not None
    biases = [layer.bias.detach().clone()]
    seen = record_gradients(state)
    for _ in range(EPOCHS):
        train_epoch(state, loader, seed=0, rank=0)
        if state.lookahead is None:
            biases.append(layer.bias.detach().clone())
    assert len(seen[0]) == len(seen[STEPS - 1]) == len(seen[STEPS]) + 1 == len(seen[-1]) + 1
    if state.lookahead is None:
        first, *later = biases
        assert not torch.equal(first, later[0])
        assert all(torch.equal(later[0], bias) for bias in later[1:])


def muon_on_ranks(ranks: Ranks, data: Path) -> list[torch.Tensor]:
    """Return weights after training at global batch 16 without batch statistics."""
    torch.manual_seed(0)
    model = PixelClassifier(Normalize([0.5] * 3, [0.3] * 3), SpeedrunNet(12, (24, 24, 24))).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x, norm=module: x + norm.bias.view(1, -1, 1, 1)  # type: ignore[method-assign]
    state = make_state(model, MUON, epochs=2, lr=0.01, schedule="linear", whiten_bias_epochs=1)
    section = section_of(data, 16 // ranks.world_size)
    aug = AugConfig(crop="pad", padding=2, padding_mode="reflect", flip_mode="alternating")
    loader = build_train_loader(section, aug, seed=3, device=CPU, rank=ranks.rank, world_size=ranks.world_size)
    whiten(state, whitening_images(state, section_of(data)))
    for _ in range(2):
        train_epoch(state, loader, seed=0, rank=ranks.rank)
    return [p.detach().clone() for p in state.network.parameters()]


def test_muon_and_whitening_are_equal_on_one_and_two_ranks(npy_data: Path) -> None:
    alone_ = muon_on_ranks(Ranks(), npy_data)
    first, second = on_ranks(2, muon_on_ranks, npy_data)
    for one, two, three in zip(alone_, first, second, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)
        assert torch.equal(two, three)
