"""The learning rate as a function of the step, and what the optimizer is built with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import OptimizerConfig
from models import build_model
from train.optim import build_optimizer, set_learning_rate

SCALED: dict[str, Any] = {
    "weight_decay": 0.3, "norm_bias_lr": 64.0, "bias_lr": 4.0, "linear_lr": 0.5, "decay_biases": True
}  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_biases_and_linear_layers_have_learning_rates_of_their_own_and_decay_alike(name: Any) -> None:
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


def test_the_learning_rate_is_set_in_every_parameter_group() -> None:
    optimizer = build_optimizer(build_model("resnet18", 10), OptimizerConfig(), lr=1.0)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_leaves_out_biases_and_norms_and_no_parameter_is_lost(name: Any) -> None:
    model = build_model("resnet18", 10)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.3), lr=1.0)
    of_group = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert of_group == {id(p): 0.3 if id(p) in matrices else 0.0 for p in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_step_without_gradients_shrinks_weights_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name == "0.weight" else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_frozen_parameters_are_left_to_nobody() -> None:
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
    ],
    ids=["adamw", "nesterov", "momentum"],
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
