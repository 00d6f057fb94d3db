"""The moving average of the weights, timm's ModelEmaV3, and which weights count where there are both.

Floating-point buffers, such as batch norm's statistics, are averaged like weights; counts are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.schema import EmaConfig
from configs.utils.errors import UserError
from train.distributed import collectives

if TYPE_CHECKING:
    from train.engine.epoch import TrainState


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


def uses_ema(state: TrainState, weights: str) -> bool:
    """Whether it is the average whose results count; weights: eval.weights. Raises UserError where there is none."""
    if weights == "ema" and state.ema is None:
        raise UserError("eval.weights=ema, but no average is kept; set train.ema.decay, or use eval.weights=auto")
    return state.ema is not None and weights != "raw"


def eval_weights(state: TrainState, weights: str) -> AbstractContextManager[None]:
    """The network holds the weights that count inside; see `uses_ema`."""
    if uses_ema(state, weights):
        assert state.ema is not None
        return state.ema.swapped_in()
    return nullcontext()
