"""Optimizers by name equal those of torch and timm; groups are in test_param_groups.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from configs.load import load_config, parse_config, to_yaml
from configs.schema import Config, OptimizerConfig
from configs.utils.errors import UserError
from helpers.training import CPU, DIGITS, alone, make_state, random_batch, small_net
from models import build_model
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.engine import warm_up
from train.engine.state import TrainState
from train.engine.step import train_step
from train.optim.factory import build_optimizer, make_capturable, set_learning_rate, with_timm_defaults

SCALED: dict[str, Any] = {
    "weight_decay": 0.3, "norm_bias_lr": 64.0, "bias_lr": 4.0, "linear_lr": 0.5, "decay_biases": True
}  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_bias_and_linear_rates_keep_weight_decay(name: Any) -> None:
    model = build_model("speedrun96_proxy", 10)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, **SCALED), lr=2.0)
    names = {p: n for n, p in model.named_parameters()}
    set_learning_rate(optimizer, 1.0, 0.25)  # half of the peak, and an eighth for the whitening bias
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        found |= {names[p]: group["lr"] for p in group["params"]}
        assert group["weight_decay"] * group["lr_scale"] == pytest.approx(0.3)
    for parameter, lr in found.items():
        if parameter == "whitening.bias":
            assert lr == pytest.approx(4.0 / 8)
        elif parameter == "head.weight":
            assert lr == pytest.approx(0.5 / 2)
        else:
            assert lr == pytest.approx(64.0 / 2 if parameter.endswith("bias") else 1.0)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_normalised_filters_are_not_decayed() -> None:
    config = OptimizerConfig(name="muon", normalize_filters=True, **SCALED)
    optimizer = build_optimizer(build_model("speedrun96_proxy", 10), config, lr=2.0)
    decays = {bool(group["muon"]): group["weight_decay"] > 0 for group in optimizer.param_groups}
    assert decays == {True: False, False: True}


def test_learning_rate_is_set_in_every_parameter_group() -> None:
    optimizer = build_optimizer(build_model("resnet18", 10), OptimizerConfig(), lr=1.0)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("whitening_lr", [None, 0.7])
def test_rates_on_the_device_equal_those_on_the_host(whitening_lr: float | None) -> None:
    config = OptimizerConfig(name="sgd", **{**SCALED, "bias_lr": 0.3, "linear_lr": 0.7})
    host, device = (build_optimizer(build_model("speedrun96_proxy", 10), config, lr=1.1) for _ in range(2))
    make_capturable(device, CPU)
    for lr in (0.1, 0.123456789):
        for optimizer in (host, device):
            set_learning_rate(optimizer, lr, whitening_lr)
        rates = [group["lr"] for group in device.param_groups]
        assert torch.equal(torch.stack(rates), torch.tensor([group["lr"] for group in host.param_groups]))
    assert len({float(rate) for rate in rates}) > 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_excludes_biases_and_norms(name: Any) -> None:
    model = build_model("resnet18", 10)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.3), lr=1.0)
    of_group = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert of_group == {id(p): 0.3 if id(p) in matrices else 0.0 for p in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_step_without_gradients_only_shrinks_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name == "0.weight" else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(), lr=0.1)
    assert [p is model.bias for group in optimizer.param_groups for p in group["params"]] == [True]


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"name": "adamw", "weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 1e-3},
         lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, betas=(0.7, 0.9), eps=1e-3)),
        ({"name": "sgd", "weight_decay": 0.1, "momentum": 0.8, "nesterov": True},
         lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.8, nesterov=True)),
        ({"name": "sgd", "weight_decay": 0.0, "momentum": 0.8, "nesterov": False},
         lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
        ({"name": "adam", "weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "options": {"amsgrad": True}},
         lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, betas=(0.7, 0.9), eps=1e-3, amsgrad=True)),
        ({"name": "rmsprop", "weight_decay": 0.1, "momentum": 0.8, "eps": 1e-3, "options": {"alpha": 0.9}},
         lambda p: torch.optim.RMSprop(p, lr=0.05, weight_decay=0.1, momentum=0.8, eps=1e-3, alpha=0.9)),
        ({"name": "sgd", "weight_decay": 0.0, "options": {"fused": False, "foreach": True}},
         lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
        ({"name": "lion", "weight_decay": 0.1}, lambda p: timm.optim.Lion(p, lr=0.05, weight_decay=0.1)),
        ({"name": "lion", "weight_decay": 0.1, "betas": (0.7, 0.9)},
         lambda p: timm.optim.Lion(p, lr=0.05, weight_decay=0.1, betas=(0.7, 0.9))),
        ({"name": "lamb", "weight_decay": 0.1, "eps": 1e-3, "options": {"max_grad_norm": 0.5}},
         lambda p: timm.optim.Lamb(p, lr=0.05, weight_decay=0.1, eps=1e-3, max_grad_norm=0.5)),
        ({"name": "lion", "weight_decay": 0.1, "betas": (0.9, 0.999)},
         lambda p: timm.optim.Lion(p, lr=0.05, weight_decay=0.1, betas=(0.9, 0.999))),
        ({"name": "lamb", "weight_decay": 0.1, "eps": 1e-8},
         lambda p: timm.optim.Lamb(p, lr=0.05, weight_decay=0.1, eps=1e-8)),
        ({"name": "adan", "weight_decay": 0.1, "options": {"betas": [0.9, 0.8, 0.7]}},
         lambda p: timm.optim.Adan(p, lr=0.05, weight_decay=0.1, betas=(0.9, 0.8, 0.7))),
        ({"name": "adan", "weight_decay": 0.1, "betas": [0.9, 0.8, 0.7]},
         lambda p: timm.optim.Adan(p, lr=0.05, weight_decay=0.1, betas=(0.9, 0.8, 0.7))),
        ({"name": "sgdw", "weight_decay": 0.1, "momentum": 0.7},
         lambda p: timm.optim.SGDW(p, lr=0.05, weight_decay=0.1, momentum=0.7, nesterov=True)),
        ({"name": "sgdw", "weight_decay": 0.1, "nesterov": False},
         lambda p: timm.optim.SGDW(p, lr=0.05, weight_decay=0.1, momentum=0.9)),
        ({"name": "timm/adamw", "weight_decay": 0.1},
         lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    ],
    ids=["adamw", "nesterov", "momentum", "adam", "rmsprop", "implementation", "lion", "lion's betas", "lamb",
         "lion with adamw's betas", "lamb with adamw's eps", "adan's options", "adan", "sgdw", "sgdw without nesterov",
         "timm's adamw"],
)  # fmt: skip
def test_every_optimizer_setting_takes_effect(settings: dict[str, Any], reference: Any) -> None:
    def trained(build: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
        optimizer = build(model)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1 + step, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    ours = trained(lambda model: build_optimizer(model, OptimizerConfig(**settings), lr=0.05))
    theirs = trained(lambda model: reference(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert math.isfinite(ours.sum().item())


# Names and options


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "adamww"}, r"name=adamww is unknown; .* such as .*adamw"),
        ({"name": "timm/lam"}, r"name=timm/lam is unknown; .*lamb"),
        ({"name": "x_lamb"}, r"name=x_lamb is unknown"),  # timm would build lamb
        ({"name": "adahessian"}, r"name=adahessian needs second derivatives.*; take one of first order"),
        ({"name": "lookahead_lamb"}, r"use train\.optimizer\.name=lamb train\.lookahead\.every_steps"),
        ({"name": "bnbadam8bit"}, r"name=bnbadam8bit is not available here"),
        ({"options": {"alpha": 0.9}}, r"options\.alpha=0\.9 is not an option of adamw; it has betas, .*amsgrad"),
        ({"name": "lamb", "options": {"lr": 0.9}}, r"options\.lr=0\.9 is not an option of lamb; it has bias_corr"),
        ({"name": "muon", "options": {"eps": 1}}, r"muon has its settings in train\.optimizer"),
        (
            {"name": "adan", "betas": (0.5, 0.6)},
            r"betas=\[0\.5, 0\.6\] are not the 3 that adan takes; give 3, or leave it out",
        ),
        ({"name": "rmsprop", "options": {"alpha": -1}}, r"rmsprop refuses its settings \(Invalid alpha value: -1\)"),
        (
            {"name": "lion", "options": {"betas": [2, 3]}},
            r"lion refuses its settings \(.*; change train\.optimizer\.opt",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unknown_optimizer_or_option_is_refused_with_advice(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        build_optimizer(nn.Linear(3, 4), OptimizerConfig(**settings), lr=0.1)
    assert "\n" not in str(refused.value)


# Without those that need a GPU, second derivatives or (kron) ten seconds of compilation; a few cautious variants.
TIMM = list(timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian", "kron*", "c*"]))
TIMM += ["cadamw", "clion", "csgdw"]


@pytest.mark.parametrize("name", [f"timm/{name}" for name in TIMM] + ["adamw", "sgd", "rmsprop", "muon"])
def test_config_with_timm_defaults_builds_the_same_optimizer(name: str) -> None:
    def built(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
        optimizer = build_optimizer(nn.Linear(2, 2), config.train.optimizer, 0.1)
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        return group, {key: value for key, value in vars(optimizer).items() if isinstance(value, bool | int | float)}

    asked = load_config(DIGITS, [f"train.optimizer.name={name}"])
    used = with_timm_defaults(asked)
    group, attributes = built(asked)
    for key in ("betas", "eps", "nesterov"):
        assert getattr(used.train.optimizer, key) == group.get(key, getattr(asked.train.optimizer, key))
    again = parse_config(to_yaml(used), "config.yaml")
    assert again == used
    assert with_timm_defaults(again) == used
    assert built(again) == (group, attributes)


def test_timm_defaults_fill_unset_optimizer_settings() -> None:
    def used(*settings: str) -> tuple[Any, Any]:
        optimizer = with_timm_defaults(load_config(DIGITS, settings)).train.optimizer
        return optimizer.betas, optimizer.eps

    assert used("train.optimizer.name=lion") == ((0.9, 0.99), None)
    assert used("train.optimizer.name=lion", "train.optimizer.betas=[0.9, 0.999]") == ((0.9, 0.999), None)
    assert used("train.optimizer.name=lamb") == ((0.9, 0.999), 1e-6)
    assert used("train.optimizer.name=lamb", "train.optimizer.eps=1e-8") == ((0.9, 0.999), 1e-8)
    assert used("train.optimizer.name=lamb", "train.optimizer.eps=null") == ((0.9, 0.999), 1e-6)
    assert used() == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize("name", TIMM)
def test_timm_optimizers_step_resume_and_warm_up(name: str, tmp_path: Path) -> None:
    def new(seed: int) -> TrainState:
        return make_state(small_net(10, seed), {"name": f"timm/{name}", "layer_decay": 0.9}, lr=1e-3)

    def steps(state: TrainState, numbers: range) -> dict[str, torch.Tensor]:
        for number in numbers:
            torch.manual_seed(number)
            train_step(state, random_batch(8, seed=number))
        return state.network.state_dict()

    with alone():
        state, begun = new(0), small_net(10).state_dict()
        after = steps(state, range(3))
        assert all(torch.isfinite(value).all() for value in after.values())
        assert not torch.equal(after["head.weight"], begun["head.weight"])
        store.save(tmp_path / "last.pt", state, state.sums)
        other = new(1)
        warm_up.warm_up_training(other, warm_up.blank_batch(8, 32, CPU))  # undoes changes to any kind of state
        restore_state(other, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
        warm_up.warm_up_training(other, warm_up.blank_batch(8, 32, CPU))
        expected, found = (steps(one, range(3, 6)) for one in (state, other))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
