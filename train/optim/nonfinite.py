"""Values that are not finite: found in a run's state, and kept out of it by train.on_nonfinite=skip."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from train.distributed import collectives
from train.distributed.process_group import get_world_size


@torch.no_grad()
def max_abs(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of all elements, float32 []; nan where one is nan. Does not synchronise."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], float("inf"))
    return torch.stack([norm.float() for norm in norms]).amax()


class SkipNonFinite:
    """Of a network that lies on its device, and its optimizer. left_out: float64 [], updates left out so far."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        # Statistics of batch norm have seen a bad batch before anyone knows that it is bad.
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self.last_good_buffers = [buffer.clone() for buffer in self._buffers]
        self.skipped = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        self._is_bad = torch.zeros((), dtype=torch.bool)  # this update

    def begin(self) -> None:
        """The buffers as they are now are good."""
        _copy(self._buffers, self.last_good_buffers)

    def mask_counts(self, counts: Tensor) -> Tensor:
        """A pass's sums, or zeros where its loss is not finite."""
        return torch.where(counts.isfinite().all(), counts, 0.0)

    def check(self) -> None:
        """See whether the update is to be left out. Gradients are the same on all ranks by now, and so is this."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._is_bad = max_abs(gradients).isfinite().logical_not()
        self.skipped += self._is_bad

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """The optimizer's step, unless it is to be left out; after `look`, and after any clipping."""
        optimizer, is_bad = self._optimizer, self._is_bad
        if scaler.is_enabled():
            scaler.step(optimizer)  # leaves out the same updates by itself
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # told as torch's own scaler tells them
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif not is_bad:  # waits for the device
            optimizer.step()
        for buffer, sound in zip(self._buffers, self.last_good_buffers, strict=True):
            torch.where(is_bad, sound, buffer, out=sound)
        _copy(self.last_good_buffers, self._buffers)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)


class NonFiniteError(Exception):
    """Raised on all ranks at the same update. Steps are optimizer updates of the run, counted from 1."""

    def __init__(self, what: str, first: int, last: int) -> None:
        super().__init__(what)
        self.what, self.first, self.last = what, first, last

    @property
    def steps(self) -> str:
        return f"step {self.last}" if self.first == self.last else f"steps {self.first} to {self.last}"


class CheckedState(Protocol):
    """The part of a training state that is checked."""

    sums: Tensor
    guard: SkipNonFinite | None

    def floating_tensors(self) -> list[Tensor]: ...


class FiniteCheck:
    """Of one training: `done` below is how many optimizer updates of the run are done."""

    def __init__(self, state: CheckedState) -> None:
        self._state = state
        self.begin(0)

    def begin(self, done: int) -> None:
        """The run stands after `done` updates, in a state that is known to be good."""
        self._good = self._reported = done
        guard = self._state.guard
        self._left_out = 0.0 if guard is None else float(guard.skipped)

    def sums(self, done: int) -> Tensor:
        """The training's sums over all ranks, float64 [3] on the host: loss * samples, correct, samples; synchronises.

        Raises NotFinite for the steps since it was last asked.
        """
        state = self._state
        own = torch.cat([state.sums, max_abs(state.floating_tensors()).isfinite()[None].double()])
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
        guard = self._state.guard
        if guard is None:
            return 0, 0
        before, since = self._left_out, self._reported
        self._left_out, self._reported = float(guard.skipped), self._good
        return int(self._left_out - before), self._good - since
