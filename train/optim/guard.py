"""train.on_nonfinite=skip: leaves out an update whose gradients are not finite, as if its batch had not been there.

On the device, without the host looking, where the optimizer can leave out a step by itself, as torch's fused ones can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.optim.largest import max_abs


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
