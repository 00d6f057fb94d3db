"""The learning rate as a function of the step, and what the optimizer is built with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from configs.schema import OptimizerConfig, TrainConfig
from models import build_model
from train.optim import build_optimizer, learning_rate, set_learning_rate, whitening_learning_rate


def schedule(steps_per_epoch: int, **settings: Any) -> list[float]:
    config = TrainConfig(**settings)
    return [learning_rate(step, steps_per_epoch, config) for step in range(config.epochs * steps_per_epoch)]


def test_warmup_rises_by_the_same_amount_at_every_step_and_ends_at_the_peak() -> None:
    rates = schedule(10, epochs=5, lr=0.8, warmup_epochs=2, warmup_lr=0.1)
    rises = [after - before for before, after in zip([0.1, *rates], rates[:20], strict=False)]
    assert rises == pytest.approx([0.7 / 20] * 20)
    assert rates[19] == pytest.approx(0.8)


def test_warmup_may_last_a_fraction_of_an_epoch() -> None:
    rates = schedule(10, epochs=2, lr=1.0, warmup_epochs=0.5, schedule="constant")
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)


def test_warmup_of_all_epochs_rises_to_the_end() -> None:
    rates = schedule(4, epochs=2, lr=1.0, warmup_epochs=2)
    assert rates == pytest.approx([step / 8 for step in range(1, 9)])


def test_cosine_is_torchs_cosine_annealing_at_every_step() -> None:
    rates = schedule(7, epochs=3, lr=0.3, min_lr=0.02)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21, eta_min=0.02)
    expected = []
    for _ in range(21):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected, rel=1e-12)


def test_cosine_starts_at_the_peak_after_warmup_and_reaches_min_lr_when_the_last_step_is_done() -> None:
    settings: dict[str, Any] = {"epochs": 4, "lr": 0.5, "min_lr": 0.1, "warmup_epochs": 1}
    config = TrainConfig(**settings)
    assert learning_rate(10, 10, config) == pytest.approx(0.5)
    assert learning_rate(25, 10, config) == pytest.approx((0.5 + 0.1) / 2)  # half-way between 10 and 40
    assert learning_rate(40, 10, config) == pytest.approx(0.1)
    rates = schedule(10, **settings)
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert set(schedule(5, epochs=3, lr=0.25, schedule="constant", min_lr=0.1)) == {0.25}


@pytest.mark.parametrize("lowest", [0.0, 0.02])
def test_linear_with_a_warmup_is_the_triangle_of_its_formula(lowest: float) -> None:
    rates = schedule(10, epochs=5, lr=0.8, warmup_epochs=1, warmup_lr=0.16, min_lr=lowest, schedule="linear")
    rising = [0.16 + 0.64 * (step + 1) / 10 for step in range(10)]
    falling = [0.8 + (lowest - 0.8) * step / 40 for step in range(40)]
    assert rates == pytest.approx(rising + falling)


def test_a_whitening_bias_follows_the_schedule_or_falls_to_zero_in_its_own_epochs() -> None:
    def rates(**settings: Any) -> list[float]:
        config = TrainConfig(epochs=4, lr=0.5, schedule="linear", **settings)
        return [whitening_learning_rate(step, 5, config) for step in range(20)]

    shared = [0.5 * (1 - step / 20) for step in range(20)]
    assert rates() == pytest.approx(shared)
    assert rates(whiten_bias_epochs=2) == pytest.approx(shared[:10] + [0] * 10)
    own = [0.5 * (1 - step / 10) for step in range(10)]
    assert rates(whiten_bias_epochs=2, whiten_bias_anneal=True) == pytest.approx(own + [0] * 10)
    assert rates(whiten_bias_epochs=0, whiten_bias_anneal=True) == [0] * 20


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


@given(
    epochs=st.integers(1, 20),
    steps_per_epoch=st.integers(1, 50),
    warmup=st.floats(0, 1),
    lr=st.floats(1e-6, 10),
    lowest=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_every_learning_rate_lies_between_the_lowest_setting_and_the_peak(
    epochs: int, steps_per_epoch: int, warmup: float, lr: float, lowest: float, kind: Any
) -> None:
    low = lr * lowest
    rates = schedule(
        steps_per_epoch, epochs=epochs, lr=lr, min_lr=low, warmup_lr=low, warmup_epochs=warmup * epochs, schedule=kind
    )
    assert all(low * (1 - 1e-9) <= rate <= lr * (1 + 1e-9) for rate in rates)


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
