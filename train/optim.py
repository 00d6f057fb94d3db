"""Optimizer and learning-rate schedule. The schedule is a pure function of the step, to be plotted and tested."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig, TrainConfig
from models.speedrun import whitening_of
from train.muon import Muon

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Fused AdamW or SGD, or Muon; weight decay is left out for biases and norms, unless `decay_biases` says otherwise.

    A group's `lr_scale` is its peak learning rate divided by `lr`; group `whitening` holds a whitening layer's bias.
    """
    groups = _parameter_groups(model, config, lr)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.name == "muon":
        return Muon(
            groups,
            lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            steps=config.newton_schulz_steps,
            normalize=config.normalize_filters,
            sgd_momentum=config.sgd_momentum,
        )
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def _parameter_groups(model: nn.Module, config: OptimizerConfig, lr: float) -> list[dict[str, Any]]:
    """Trained parameters by what is special about them, those with weight decay first."""
    whitening = whitening_of(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            own_lr = None
            if parameter.ndim <= 1 and name == "bias":
                own_lr = config.norm_bias_lr if isinstance(module, NORMS) else config.bias_lr
            elif isinstance(module, nn.Linear):
                own_lr = config.linear_lr
            lr_scale = 1.0 if own_lr is None else own_lr / lr
            muon = config.name == "muon" and parameter.ndim == 4
            decays = (parameter.ndim > 1 or config.decay_biases) and not (muon and config.normalize_filters)
            group = {
                # divided, so that a step takes away lr * weight_decay of every parameter, whatever its own rate
                "weight_decay": config.weight_decay / lr_scale if decays else 0.0,
                "lr": lr * lr_scale,
                "lr_scale": lr_scale,
                "muon": muon,
                "whitening": module is whitening,
            }
            key = (not decays, *group.values())
            groups.setdefault(key, {"params": [], **group})["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of optimizer update `step` (from 0): linear warm-up, then what `schedule` says."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup))
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, whitening_lr: float | None = None) -> None:
    """Give all parameter groups their multiple of one learning rate; group `whitening` that of `whitening_lr`.

    Does not synchronise.
    """
    for group in optimizer.param_groups:
        rate = whitening_lr if group.get("whitening") and whitening_lr is not None else lr
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rates, and AdamW's count of steps, on the device, where each replay of a CUDA graph finds them.

    As numbers they would be frozen into the graph. float32, since that is what torch's fused kernels read.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True


def whitening_learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The same for the bias of a whitening layer, which is trained for the first `whiten_bias_epochs` only."""
    if config.whiten_bias_epochs is None:
        return learning_rate(step, steps_per_epoch, config)
    steps = config.whiten_bias_epochs * steps_per_epoch
    if step >= steps:
        return 0.0
    return config.lr * (1 - step / steps) if config.whiten_bias_anneal else learning_rate(step, steps_per_epoch, config)
