"""Clipping of gradients by value and adaptively; clipping by norm is in test_step.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from configs.schema import AugConfig, DataConfig
from helpers.training import CPU, alone, lenet, make_state, random_batch, record_gradients
from pipelines import build_train_loader
from pipelines.interfaces import Position
from train.engine.epoch import train_epoch
from train.engine.step import train_step


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def gradients(**settings: Any) -> dict[str, Tensor]:
    """Return the gradients of the first step, as the optimizer receives them."""
    state = make_state(lenet(), **settings)
    seen = record_gradients(state)
    train_step(state, random_batch(16))
    names = [name for name, _ in state.network.named_parameters()]
    return dict(zip(names, seen[0], strict=True))


def clipped_unit_by_unit(weight: Tensor, gradient: Tensor, limit: float) -> Tensor:
    """Clip by equation 3 of arXiv:2102.06171 in float64, per row of weights, and a bias as a whole."""
    rows = [(weight, gradient)] if weight.ndim <= 1 else list(zip(weight, gradient, strict=True))
    result = []
    for w, g in rows:
        most = limit * max(float(w.double().norm()), 1e-3)
        norm = float(g.double().norm())
        result.append(g.double() * (most / norm if norm > most else 1.0))
    return result[0] if weight.ndim <= 1 else torch.stack(result)


def test_clipping_by_value_limits_every_element() -> None:
    plain = gradients()
    limit = float(plain["network.fc3.weight"].abs().median())
    for name, clipped in gradients(clip_grad_value=limit).items():
        torch.testing.assert_close(clipped, plain[name].clamp(-limit, limit))


@pytest.mark.parametrize("limit", [1e-3, 1e-1])
def test_adaptive_clipping_equals_timm_and_excludes_head(limit: float) -> None:
    plain, model = gradients(), lenet()
    weights = dict(model.named_parameters())
    changed = 0
    for name, clipped in gradients(clip_grad_adaptive=limit).items():
        if name.startswith("network.fc3."):
            assert torch.equal(clipped, plain[name])
            continue
        expected = clipped_unit_by_unit(weights[name].detach(), plain[name], limit)
        torch.testing.assert_close(clipped.double(), expected, rtol=1e-5, atol=1e-9)
        theirs = nn.Parameter(weights[name].detach().clone())
        theirs.grad = plain[name].clone()
        adaptive_clip_grad([theirs], clip_factor=limit)
        assert torch.equal(clipped, theirs.grad)
        changed += not torch.equal(clipped, plain[name])
    assert changed > 0


@pytest.mark.parametrize("settings", [{"clip_grad_value": 1e-4}, {"clip_grad_adaptive": 0.01}], ids=["value", "agc"])
def test_float16_is_clipped_without_its_scale(settings: dict[str, float]) -> None:
    sgd = {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    results = []
    for power in (4, 9):
        state = make_state(lenet(), amp="fp16", optimizer=sgd, lr=1.0, **settings)
        state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**power})
        train_step(state, random_batch(16))
        results.append(state.network.state_dict())
    before = lenet().state_dict()
    for name in before:
        first, second = (result[name] - before[name] for result in results)
        torch.testing.assert_close(first, second, rtol=0.05, atol=2e-5)
    assert any(not torch.equal(results[0][name], before[name]) for name in before)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adamw", 1e-3)])
@pytest.mark.parametrize(
    "clipping", [{"clip_grad_norm": 0.1}, {"clip_grad_value": 1e-3}, {"clip_grad_adaptive": 0.01}], ids=str
)
def test_four_micro_steps_of_64_equal_one_step_of_256(
    optimizer: str, lr: float, clipping: dict[str, float], npy_data: Path
) -> None:
    weights = []
    for batch_size, passes in ((256, 1), (64, 4)):
        settings: dict[str, Any] = {"epochs": 2, "lr": lr, "accumulation_steps": passes, **clipping}
        # AdamW's default eps of 1e-8 would amplify the rounding of sums, which depends on the CPU, in tiny gradients.
        options = {"name": "adamw", "eps": 1e-6} if optimizer == "adamw" else {"name": optimizer}
        state = make_state(lenet_of_12(), options, **settings)
        section = DataConfig(path=str(npy_data), batch_size=batch_size)
        aug = AugConfig(crop="pad", flip=0.5)
        loader = build_train_loader(section, aug, seed=3, device=CPU, accumulation_steps=passes)
        for _ in range(2):
            train_epoch(state, loader, seed=0, rank=0)
        assert loader.position == Position(2)
        assert len(loader) == 2 * passes  # four steps
        weights.append(state.network.state_dict())
    begun = lenet_of_12().state_dict()
    assert max(float((weights[0][name] - begun[name]).abs().max()) for name in begun) > 1e-3  # it has learned
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole, rtol=0, atol=1e-6)


def lenet_of_12() -> nn.Module:
    """LeNet for the classes of the tiny data set."""
    torch.manual_seed(0)
    model = lenet()
    model.network.fc3 = nn.Linear(84, 12)  # type: ignore[union-attr]
    return model
