"""Finds what is not finite, on all ranks together, whenever a run's sums are read: losses, weights, optimizer state.

Sums and weights lie on the device and are looked at once per log interval and before every checkpoint, so no step waits
for it, and a checkpoint that stands is a good one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from train.distributed import collectives
from train.distributed.process_group import get_world_size
from train.engine.epoch import TrainState
from train.optim.largest import max_abs


class NonFiniteError(Exception):
    """Raised on all ranks at the same update. Steps are optimizer updates of the run, counted from 1."""

    def __init__(self, what: str, first: int, last: int) -> None:
        super().__init__(what)
        self.what, self.first, self.last = what, first, last

    @property
    def steps(self) -> str:
        return f"step {self.last}" if self.first == self.last else f"steps {self.first} to {self.last}"


class FiniteCheck:
    """Of one training: `done` below is how many optimizer updates of the run are done."""

    def __init__(self, state: TrainState) -> None:
        self._training = state
        self.begin(0)

    def begin(self, done: int) -> None:
        """The run stands after `done` updates, in a state that is known to be good."""
        self._good = self._reported = done
        guard = self._training.guard
        self._left_out = 0.0 if guard is None else float(guard.skipped)

    def sums(self, done: int) -> Tensor:
        """The training's sums over all ranks, float64 [3] on the host: loss * samples, correct, samples; synchronises.

        Raises NotFinite for the steps since it was last asked.
        """
        state = self._training
        own = torch.cat([state.sums, is_finite(state)[None].double()])
        *sums, finite = collectives.sum_over_ranks(own).tolist()
        total = torch.tensor(sums, dtype=torch.float64)
        what = "the loss is" if not bool(total.isfinite().all()) else "the weights or the optimizer's state are"
        if what == "the loss is" or finite != get_world_size():
            raise NonFiniteError(what, min(self._good + 1, done), done)
        self._good = done
        return total

    def skipped(self) -> tuple[int, int]:
        """Updates that train.on_nonfinite=skip left out, of how many, since this was last asked.

        To be asked after `sums`, which has waited for the device.
        """
        guard = self._training.guard
        if guard is None:
            return 0, 0
        before, since = self._left_out, self._reported
        self._left_out, self._reported = float(guard.skipped), self._good
        return int(self._left_out - before), self._good - since


@torch.no_grad()
def is_finite(state: TrainState) -> Tensor:
    """Whether all that a step goes on from is finite: weights, floating-point buffers, the optimizer's state, those
    of a proxy, and the model's slow copy: bool [] on the device; does not synchronise."""
    slow = state.lookahead.slow.values() if state.lookahead is not None else ()
    tensors = [
        tensor
        for one in state.parts()
        for tensor in (*one.network.state_dict().values(), *_tensors(list(one.optimizer.state.values())))
        if tensor.is_floating_point() and tensor.device == state.sums.device
    ]
    return max_abs([*tensors, *slow]).isfinite()


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    """Of an optimizer, whatever form its state has."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from _tensors(list(value.values()) if isinstance(value, dict) else list(value))
