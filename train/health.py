"""Finds losses and weights that are not finite, on all ranks together, whenever a run's sums are read.

Sums and weights lie on the device and are looked at once per log interval and before every checkpoint, so no step waits
for it, and a checkpoint that stands is a good one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train import dist
from train.largest import largest
from train.loop import Training


class NotFinite(Exception):
    """Raised on all ranks at the same update. Steps are optimizer updates of the run, counted from 1."""

    def __init__(self, what: str, first: int, last: int) -> None:
        super().__init__(what)
        self.what, self.first, self.last = what, first, last

    @property
    def steps(self) -> str:
        return f"step {self.last}" if self.first == self.last else f"steps {self.first} to {self.last}"


class Health:
    """Of one training: `done` below is how many optimizer updates of the run are done."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.begin(0)

    def begin(self, done: int) -> None:
        """The run stands after `done` updates, in a state that is known to be good."""
        self._good = self._reported = done
        guard = self._training.guard
        self._left_out = 0.0 if guard is None else float(guard.left_out)

    def sums(self, done: int) -> Tensor:
        """The training's sums over all ranks, float64 [3] on the host: loss * samples, correct, samples; synchronises.

        Raises NotFinite for the steps since it was last asked.
        """
        training = self._training
        own = torch.cat([training.sums, is_finite(training)[None].double()])
        *sums, finite = dist.sum_over_ranks(own).tolist()
        total = torch.tensor(sums, dtype=torch.float64)
        what = "the loss is" if not bool(total.isfinite().all()) else "the weights are"
        if what == "the loss is" or finite != dist.world_size():
            raise NotFinite(what, min(self._good + 1, done), done)
        self._good = done
        return total

    def left_out(self) -> tuple[int, int]:
        """Updates that train.on_nonfinite=skip left out, of how many, since this was last asked.

        To be asked after `sums`, which has waited for the device.
        """
        guard = self._training.guard
        if guard is None:
            return 0, 0
        before, since = self._left_out, self._reported
        self._left_out, self._reported = float(guard.left_out), self._good
        return int(self._left_out - before), self._good - since


@torch.no_grad()
def is_finite(training: Training) -> Tensor:
    """Whether all weights and floating-point buffers are finite: bool [] on the device; does not synchronise."""
    state = training.network.state_dict().values()
    return largest([tensor for tensor in state if tensor.is_floating_point()]).isfinite()
