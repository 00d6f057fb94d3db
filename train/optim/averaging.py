"""Averages of the weights: the moving average (timm's ModelEmaV3) and Lookahead.

Both also average floating-point buffers, e.g. batch norm statistics. The moving average copies integer buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from configs.schema import EmaConfig, LookaheadConfig
from configs.utils.errors import UserError
from train.distributed import collectives
from train.optim.nonfinite import copy_tensors


class Ema:
    """Exponential moving average of a network's weights, stored in a second network on the same device."""

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        from timm.utils.model_ema import ModelEmaV3  # imported here, since it takes seconds

        assert config.decay is not None
        self._network, self._every_steps = network, config.every_steps
        self._average = ModelEmaV3(
            network, decay=config.decay, use_warmup=config.warmup, warmup_gamma=1.0, warmup_power=2 / 3
        )

    def start(self) -> None:
        """Set the average to the current weights."""
        self._average.set(self._network)

    def update(self, done: int) -> None:
        """Update the average after `done` optimizer steps, counted from the start of epoch train.first_epoch.

        No-op unless `done` is a multiple of train.ema.every_steps. The first update copies the weights. Does not
        synchronize. Cannot be part of a captured graph, since the decay depends on `done`.
        """
        if done % self._every_steps == 0:
            self._average.update(self._network, step=done // self._every_steps)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the average, named as in the network's state dict."""
        tensors: dict[str, Tensor] = self._average.module.state_dict()
        return tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        self._average.module.load_state_dict(state)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Copy the average into the network, and restore the network's own weights on exit.

        All ranks must enter the context. They then use the averaged buffers of rank 0. Tensors keep their addresses, so
        compiled functions stay valid. A third copy of the weights is held in memory until exit.
        """
        collectives.broadcast_buffers(self._average.module)
        tensors = list(self._network.state_dict().values())
        own = [tensor.clone() for tensor in tensors]
        try:
            copy_tensors(list(self.state().values()), tensors)
            yield
        finally:
            copy_tensors(own, tensors)


def build_ema(network: nn.Module, config: EmaConfig) -> Ema | None:
    return Ema(network, config) if config.decay is not None else None


def uses_ema(ema: Ema | None, weights: str) -> bool:
    """Return True if evaluation uses the weights of the moving average.

    Args:
        ema: Moving average, or None.
        weights: Value of eval.weights.

    Raises:
        UserError: `weights` is "ema", but there is no moving average.
    """
    if weights == "ema" and ema is None:
        raise UserError("eval.weights=ema, but no average is kept; set train.ema.decay, or use eval.weights=auto")
    return ema is not None and weights != "raw"


def eval_weights(ema: Ema | None, weights: str) -> AbstractContextManager[None]:
    """Return a context in which the network has the weights selected by eval.weights. All ranks must enter it.

    Raises:
        UserError: `weights` is "ema", but there is no moving average.
    """
    return ema.swapped_in() if uses_ema(ema, weights) and ema is not None else nullcontext()


class Lookahead:
    """Lookahead averaging of a network's weights (Zhang et al., arXiv:1907.08610).

    Every `every_steps` steps, a slow copy of the weights moves toward the trained (fast) weights, which are then reset
    to the slow copy. The fraction of the slow copy that is kept grows during training, as in arXiv:2404.00498.
    Floating-point buffers, such as batch norm statistics, are averaged too.

    Attributes:
        slow: Slow copy of each floating-point tensor of the network's state dict, by name.
    """

    def __init__(self, network: nn.Module, config: LookaheadConfig) -> None:
        assert config.every_steps is not None
        self._config, self._every_steps = config, config.every_steps
        self._fast = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        self.slow = {name: value.clone() for name, value in self._fast.items()}

    def start(self) -> None:
        """Set the slow weights to the current fast weights."""
        copy_tensors(list(self._fast.values()), list(self.slow.values()))

    def update(self, step: int, steps: int) -> None:
        """Average slow and fast weights every train.lookahead.every_steps steps.

        After the last step of the run, also copy the slow weights to the fast weights.

        Args:
            step: Index of the optimizer step just completed, counted from 0.
            steps: Total number of optimizer steps in the run.
        """
        done = step + 1
        if done % self._every_steps == 0:
            self.sync(kept_share(done / steps, self._config))
        if done == steps:
            self.sync(1.0)

    @torch.no_grad()
    def sync(self, kept: float) -> None:
        """Set slow = kept * slow + (1 - kept) * fast, then fast = slow. Does not synchronize with the host."""
        fast, slow = list(self._fast.values()), list(self.slow.values())
        torch._foreach_lerp_(slow, fast, 1 - kept)
        copy_tensors(slow, fast)


def kept_share(progress: float, config: LookaheadConfig) -> float:
    """Return the share of the slow weights to keep at a `progress` from 0 (start of the run) to 1 (end of the run)."""
    return config.decay * progress**3


def build_lookahead(network: nn.Module, config: LookaheadConfig) -> Lookahead | None:
    return Lookahead(network, config) if config.every_steps is not None else None
