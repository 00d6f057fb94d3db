"""Averages of the weights: the moving average, timm's ModelEmaV3, and Lookahead's slow copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import EmaConfig, LookaheadConfig
from configs.utils.errors import UserError
from train.distributed import collectives


class Ema:
    """Follows a network that it was built beside, on its device; it is a second network in memory."""

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        from timm.utils.model_ema import ModelEmaV3  # seconds, which runs without an average save

        assert config.decay is not None
        self._network, self._every_steps = network, config.every_steps
        self._average = ModelEmaV3(
            network, decay=config.decay, use_warmup=config.warmup, warmup_gamma=1.0, warmup_power=2 / 3
        )

    def start(self) -> None:
        """The average begins at the weights as they are now."""
        self._average.set(self._network)

    def update(self, done: int) -> None:
        """After `done` optimizer updates of the run: the first update of the average takes the weights as they are.

        Does not synchronise, and is no part of a captured graph: the share that is kept depends on `done`.
        """
        if done % self._every_steps == 0:
            self._average.update(self._network, step=done // self._every_steps)

    def state(self) -> dict[str, Tensor]:
        """Of the same names as the network's."""
        tensors: dict[str, Tensor] = self._average.module.state_dict()
        return tensors

    def restore(self, state: dict[str, Any]) -> None:
        self._average.module.load_state_dict(state)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network holds the average inside, on all ranks the first rank's, and its own weights again on leaving.

        It keeps its tensors, so that what was compiled for it serves both. Needs memory for a third copy.
        """
        collectives.broadcast_buffers(self._average.module)
        tensors = list(self._network.state_dict().values())
        own = [tensor.clone() for tensor in tensors]
        try:
            _copy(self.state().values(), tensors)
            yield
        finally:
            _copy(own, tensors)


@torch.no_grad()
def _copy(sources: Any, targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def build_ema(network: nn.Module, config: EmaConfig) -> Ema | None:
    return Ema(network, config) if config.decay is not None else None


def uses_ema(ema: Ema | None, weights: str) -> bool:
    """Whether it is the average whose results count; weights: eval.weights. Raises UserError where there is none."""
    if weights == "ema" and ema is None:
        raise UserError("eval.weights=ema, but no average is kept; set train.ema.decay, or use eval.weights=auto")
    return ema is not None and weights != "raw"


def eval_weights(ema: Ema | None, weights: str) -> AbstractContextManager[None]:
    """The network holds the weights that count inside; see `uses_ema`."""
    if uses_ema(ema, weights):
        assert ema is not None
        return ema.swapped_in()
    return nullcontext()


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
