"""Detect non-finite losses, weights and optimizer states, and skip steps with non-finite gradients.

The state is checked on the device, at log intervals, at the end of each epoch and before each checkpoint. Other steps
do not wait for a check of the state, and checkpoints contain only finite weights and optimizer states.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from train.distributed import collectives
from train.distributed.process_group import get_world_size


@torch.no_grad()
def max_abs(tensors: list[Tensor]) -> Tensor:
    """Return the largest absolute value of all elements, float32 [], or nan if any is nan. Does not synchronize."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], float("inf"))
    return torch.stack([norm.float() for norm in norms]).amax()


class SkipNonFinite:
    """Skips optimizer steps with non-finite gradients, for train.on_nonfinite=skip.

    A skipped step does not change weights, optimizer state or floating-point buffers. The check runs on the device.
    Torch's fused optimizers also skip the step on the device. With other optimizers or in fp16, the host waits for the
    result of the check.

    Attributes:
        skipped: Number of skipped steps, float64 [].
        last_good_buffers: Copies of the floating-point buffers after the last step that was not skipped.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        # Batch norm updates its statistics in the forward pass, before the gradients are checked.
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self.last_good_buffers = [buffer.clone() for buffer in self._buffers]
        self.skipped = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        self._is_bad = torch.zeros((), dtype=torch.bool)  # whether the current step has non-finite gradients

    def start(self) -> None:
        """Store the current buffers as those of the last step that was not skipped."""
        copy_tensors(self._buffers, self.last_good_buffers)

    def mask_counts(self, counts: Tensor) -> Tensor:
        """Return `counts`, the sums of a micro-step, or zeros if any of them is not finite."""
        return torch.where(counts.isfinite().all(), counts, 0.0)

    def check(self) -> None:
        """Check the gradients, and count the step in `skipped` if they are not finite.

        The result is the same on all ranks, since the gradients are already reduced.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._is_bad = max_abs(gradients).isfinite().logical_not()
        self.skipped += self._is_bad

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Run the optimizer step, or restore the last good buffers if `check` found non-finite gradients.

        Call this method after `check` and after clipping.
        """
        optimizer, is_bad = self._optimizer, self._is_bad
        if scaler.is_enabled():
            scaler.step(optimizer)  # the scaler skips the same steps
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # the protocol of torch's GradScaler
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif not is_bad:  # synchronizes
            optimizer.step()
        for buffer, good in zip(self._buffers, self.last_good_buffers, strict=True):
            torch.where(is_bad, good, buffer, out=good)
        copy_tensors(self.last_good_buffers, self._buffers)


@torch.no_grad()
def copy_tensors(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy each source to the target at the same place, in few kernels."""
    if sources:
        torch._foreach_copy_(targets, sources)


class NonFiniteError(Exception):
    """Raised on all ranks at the same step when the loss or the state is not finite.

    Attributes:
        what: Subject and verb of the message, e.g. "the loss is".
        first: First optimizer step that may be affected, counted from 1 as in metrics.
        last: Last optimizer step that may be affected, counted from 1.
    """

    def __init__(self, what: str, first: int, last: int) -> None:
        super().__init__(what)
        self.what, self.first, self.last = what, first, last

    @property
    def steps(self) -> str:
        """Return the steps that may be affected as text, e.g. "steps 3 to 5"."""
        return f"step {self.last}" if self.first == self.last else f"steps {self.first} to {self.last}"


class CheckedState(Protocol):
    """The part of a training state that `FiniteCheck` reads."""

    sums: Tensor
    guard: SkipNonFinite | None

    def floating_tensors(self) -> list[Tensor]: ...


class FiniteCheck:
    """Checks a training state for non-finite values, on all ranks together.

    The argument `done` of the methods is the number of optimizer steps of the run so far.
    """

    def __init__(self, state: CheckedState) -> None:
        self._state = state
        self.start(0)

    def start(self, done: int) -> None:
        """Start checking after `done` steps. The state at this point must be finite."""
        self._good = self._reported = done
        guard = self._state.guard
        self._skipped = 0.0 if guard is None else float(guard.skipped)

    def sums(self, done: int) -> Tensor:
        """Check the loss and the state, and return the sums of the epoch so far over all ranks.

        All ranks must call this method. Synchronizes the device.

        Returns:
            The sums (loss * samples, correct, samples), float64 [3] on the host.

        Raises:
            NonFiniteError: The loss or state is not finite. The error names the steps since the last successful check.
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
        """Return the number of skipped steps and the total number of steps, both since the previous call or `start`.

        Call this method after `sums`, which waits for the device. Return (0, 0) if the state has no guard.
        """
        guard = self._state.guard
        if guard is None:
            return 0, 0
        before, since = self._skipped, self._reported
        self._skipped, self._reported = float(guard.skipped), self._good
        return int(self._skipped - before), self._good - since
