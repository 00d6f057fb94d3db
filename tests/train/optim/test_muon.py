"""Muon equals its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import OptimizerConfig
from train.optim.factory import build_optimizer
from train.optim.muon import as_matrices, orthogonalize


def matrices(rows: int, columns: int) -> Tensor:
    """Three random matrices of norm 1, float64."""
    drawn = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn / torch.linalg.matrix_norm(drawn, keepdim=True)


@pytest.mark.parametrize(("rows", "columns"), [(16, 60), (60, 16)])
def test_five_iterations_orthogonalize_approximately(rows: int, columns: int) -> None:
    before = matrices(rows, columns)
    after = orthogonalize(before, steps=5)
    u, _, vh = torch.linalg.svd(before, full_matrices=False)
    inner = u.mT @ after @ vh.mT  # diagonal if the directions are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() <= values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-9)


def test_iteration_applies_polynomial_to_singular_values() -> None:
    before = matrices(8, 8)
    u, s, vh = torch.linalg.svd(before)
    for steps in (1, 2, 3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(orthogonalize(before, steps), u @ torch.diag_embed(s) @ vh)


def test_bfloat16_agrees_within_a_few_percent() -> None:
    before = matrices(16, 60)
    rounded = orthogonalize(before.bfloat16(), 5).double()
    assert torch.linalg.matrix_norm(rounded - orthogonalize(before, 5)).max() < 0.05 * 4


def test_matrices_have_one_row_per_filter() -> None:
    weight = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    expected = torch.stack([weight[:, :, y, x] for y in range(2) for x in range(2)], dim=1).flatten(1)
    for given in (weight, weight.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(as_matrices([given])[0], expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convs(images).amax((2, 3)))
        return logits


SETTINGS: dict[str, Any] = {"name": "muon", "momentum": 0.6, "newton_schulz_steps": 3, "sgd_momentum": 0.8}


def plain_muon(weight: Tensor, buffer: Tensor, gradient: Tensor, lr: float, normalize: bool, decay: float) -> None:
    """Compute one step by singular values; it shares only the polynomial with Muon."""
    buffer.mul_(0.6).add_(gradient)
    direction = (gradient + 0.6 * buffer).flatten(1)
    u, s, vh = torch.linalg.svd(direction / (direction.norm() + 1e-7), full_matrices=False)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    if normalize:
        weight *= len(weight) ** 0.5 / weight.norm()
    else:
        weight *= 1 - lr * decay
    weight -= lr * (u @ torch.diag(s) @ vh).view_as(weight)


@pytest.mark.parametrize("normalize", [False, True])
def test_three_steps_equal_the_formula_in_float64(normalize: bool) -> None:
    torch.manual_seed(0)
    model = Net().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = OptimizerConfig(**SETTINGS, normalize_filters=normalize, weight_decay=0.1, bias_lr=0.5, linear_lr=0.25)
    optimizer = build_optimizer(model, settings, lr=0.05)
    expected = {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    for seed in range(3):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).double()
        model(images).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, weight in expected.items():
            if weight.ndim == 4:
                plain_muon(weight, buffers[name], gradients[name], 0.05, normalize, decay=0.1)
                continue
            lr = {"head.weight": 0.25, "convs.1.weight": 0.05, "convs.1.bias": 0.05}.get(name, 0.5)
            decay = 0.1 * 0.05 / lr if name == "head.weight" else 0.0
            gradient = gradients[name] + decay * weight
            buffers[name].mul_(0.8).add_(gradient)
            weight -= lr * (gradient + 0.8 * buffers[name])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_learning_rate_may_be_a_tensor() -> None:
    def trained(as_tensor: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net()
        optimizer = build_optimizer(model, OptimizerConfig(**SETTINGS), lr=0.1)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1) if as_tensor else 0.1
        model(torch.ones(2, 3, 12, 12)).sum().backward()
        optimizer.step()
        return list(model.parameters())

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, theirs)
