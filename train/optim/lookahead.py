"""Lookahead: a slow copy of the weights that follows the trained ones; plain functions of tensors and the progress.

Source: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610, with the rising
decay of arXiv:2404.00498 and batch norm's statistics included.
"""

from __future__ import annotations

import torch
from torch import nn

from configs.schema import LookaheadConfig


class Lookahead:
    """`slow`: a copy of all floating-point tensors of the network's state, by name, on its device."""

    def __init__(self, network: nn.Module, config: LookaheadConfig) -> None:
        assert config.every_steps is not None
        self._config, self._every_steps = config, config.every_steps
        self._fast = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        self.slow = {name: value.clone() for name, value in self._fast.items()}

    def start(self) -> None:
        """The slow copy begins at the weights as they are now."""
        torch._foreach_copy_(list(self.slow.values()), list(self._fast.values()))

    def update(self, update: int, updates: int) -> None:
        """After update `update` (from 0) of `updates`: both copies meet at some; the last leaves the slow one."""
        done = update + 1
        if done % self._every_steps == 0:
            self.sync(kept_share(done / updates, self._config))
        if done == updates:
            self.sync(1.0)

    @torch.no_grad()
    def sync(self, kept: float) -> None:
        """slow = kept * slow + (1 - kept) * fast, then fast = slow; does not synchronise."""
        fast, slow = list(self._fast.values()), list(self.slow.values())
        torch._foreach_lerp_(slow, fast, 1 - kept)
        torch._foreach_copy_(fast, slow)


def kept_share(progress: float, config: LookaheadConfig) -> float:
    """The share of the slow copy that a meeting keeps, after the share `progress` of all updates."""
    return config.decay * progress**3


def build_lookahead(network: nn.Module, config: LookaheadConfig) -> Lookahead | None:
    return Lookahead(network, config) if config.every_steps is not None else None
