"""Optimizer and learning-rate schedule. The schedule is a pure function of the step, to be plotted and tested."""

from __future__ import annotations

import math

import torch
from torch import nn

from configs.schema import OptimizerConfig, TrainConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Fused AdamW or SGD; weight decay is left out for biases and norms (parameters with one dimension)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of optimizer update `step` (from 0): linear warm-up, then cosine to min_lr, or constant."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups one learning rate. Does not synchronise."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rates, and AdamW's count of steps, on the device, where each replay of a CUDA graph finds them.

    As numbers they would be frozen into the graph. float32, since that is what torch's fused kernels read.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
