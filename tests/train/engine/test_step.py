"""The training step: gradients, clipping, accumulation and counts equal plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.training import CPU, alone, lenet, make_state, random_batch, record_gradients
from pipelines.loader.batches import Batch
from train.engine.execution import amp_dtype
from train.engine.step import train_step


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def plain_gradients(model: nn.Module, batch: Batch, **options: Any) -> list[torch.Tensor]:
    loss = F.cross_entropy(model(batch.images), batch.labels, **options)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def total_norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(()))))


# The step


@pytest.mark.parametrize("share", [0.25, 4.0], ids=["above the limit", "below the limit"])
def test_gradients_are_clipped_to_norm_limit_only_above_it(share: float) -> None:
    batch = random_batch(16)
    plain = plain_gradients(lenet(), batch)
    limit = share * total_norm(plain)
    state = make_state(lenet(), clip_grad_norm=limit)
    seen = record_gradients(state)
    train_step(state, batch)
    factor = min(1.0, share)
    for ours, theirs in zip(seen[0], plain, strict=True):
        torch.testing.assert_close(ours, theirs * factor, rtol=1e-4, atol=1e-7)


def test_clipping_applies_to_the_accumulated_gradient() -> None:
    batches = [random_batch(16, seed=seed) for seed in (1, 2)]
    plain = [(a + b) / 2 for a, b in zip(*(plain_gradients(lenet(), batch) for batch in batches), strict=True)]
    limit = 0.5 * total_norm(plain)
    state = make_state(lenet(), accumulation_steps=2, clip_grad_norm=limit)
    seen = record_gradients(state)
    for last, batch in enumerate(batches):
        train_step(state, batch, optimizer_step=bool(last))
    assert total_norm(seen[0]) == pytest.approx(limit, rel=1e-4)
    for ours, theirs in zip(seen[0], plain, strict=True):
        torch.testing.assert_close(ours, theirs * 0.5, rtol=1e-4, atol=1e-7)


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    batch = random_batch(16)
    state = make_state(lenet(), label_smoothing=0.3)
    seen = record_gradients(state)
    train_step(state, batch)
    model = lenet()
    target = F.one_hot(batch.labels, 10) * 0.7 + 0.03
    loss = -(target * F.log_softmax(model(batch.images), 1)).sum(1).mean()
    assert float(state.sums[0]) == pytest.approx(16 * float(loss.detach()), rel=1e-5)
    for ours, theirs in zip(seen[0], torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_weights_change_in_last_micro_step_only() -> None:
    state = make_state(lenet(), accumulation_steps=3)
    for step in range(2):
        before = copy.deepcopy(state.network.state_dict())
        for micro in range(3):
            train_step(state, random_batch(4, seed=3 * step + micro), optimizer_step=micro == 2)
            same = all(torch.equal(before[name], value) for name, value in state.network.state_dict().items())
            assert same == (micro < 2)
        assert all(parameter.grad is None for parameter in state.network.parameters())


def test_sums_count_loss_hits_and_samples() -> None:
    state = make_state(lenet(), lr=1e-12, optimizer={"weight_decay": 0.0})  # too small to change the weights
    model, expected = lenet(), torch.zeros(3, dtype=torch.float64)
    for seed, size in enumerate((5, 16, 1)):
        batch = random_batch(size, seed=seed)
        train_step(state, batch)
        logits = model(batch.images).detach()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        expected += torch.stack([loss, (logits.argmax(1) == batch.labels).sum(), torch.tensor(size)]).double()
    torch.testing.assert_close(state.sums, expected, rtol=1e-5, atol=0)


def test_float16_overflow_skips_step_and_lowers_scale() -> None:
    state = make_state(lenet(), amp="fp16", clip_grad_norm=1.0)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(state.network.state_dict())
    train_step(state, random_batch(8))
    assert all(torch.equal(before[name], value) for name, value in state.network.state_dict().items())
    assert state.scaler.get_scale() == 2.0**39


def test_float16_clips_unscaled_gradients() -> None:
    batch = random_batch(8)
    norm = total_norm(plain_gradients(lenet(), batch))
    sgd = {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    state = make_state(lenet(), amp="fp16", clip_grad_norm=norm / 2, optimizer=sgd, lr=1.0)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**8})
    train_step(state, batch)
    pairs = zip(lenet().parameters(), state.network.parameters(), strict=True)
    change = total_norm([before.detach() - after.detach() for before, after in pairs])
    assert change == pytest.approx(norm / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "expected"), [("auto", None), ("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_cpu_amp_auto_is_float32(name: str, expected: torch.dtype | None) -> None:
    assert amp_dtype(name, CPU) == expected
