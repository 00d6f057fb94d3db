"""Muon for convolution filters and SGD for all other parameters, in one optimizer.

Muon orthogonalizes the update of SGD with momentum. Source: Jordan et al., "Muon: an optimizer for hidden layers in
neural networks", 2024 (kellerjordan.github.io).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from train.optim.param_groups import ParameterGroup

Tensors = tuple[Tensor, ...] | list[Tensor]  # as in the annotations of torch._foreach_*

# Coefficients of a x + b x^3 + c x^5, chosen for the largest slope at 0 for which iterates stay near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return an approximation of U V^T for matrices with singular value decomposition U S V^T.

    The Newton-Schulz iterations run in the dtype of the matrices. Five iterations bring the singular values to about
    0.7 to 1.2. Small singular values need more iterations than large ones.

    Args:
        matrices: [N, rows, columns], with singular values of at most 1.
        steps: Number of iterations.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    for _ in range(steps):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def as_matrices(filters: Iterable[Tensor]) -> Tensor:
    """Stack N weights [filters, channels, height, width] as matrices [N, filters, height * width * channels].

    The order of the columns does not affect the orthogonalized update of a weight. The order chosen here is the memory
    layout of channels_last weights.
    """
    return torch.stack([weight.permute(0, 2, 3, 1).flatten(1) for weight in filters])


def existing_gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


class Muon(torch.optim.Optimizer):
    """Optimizer with Muon for groups where `muon` is True and SGD for all other groups.

    Muon groups contain 4-D convolution weights. `step` does not synchronize. Learning rates can be numbers or tensors
    on the device.

    Args:
        groups: Parameter groups with `muon`, `lr` and `weight_decay`.
        lr: Learning rate of groups without `lr`.
        momentum: Momentum of the Muon groups.
        nesterov: Whether to use Nesterov momentum in the Muon groups.
        steps: Number of Newton-Schulz iterations.
        normalize: Whether to scale each weight of the Muon groups to norm sqrt(filters) before an update. This replaces
            weight decay.
        sgd_momentum: Momentum of the SGD groups. If it is above 0, they use Nesterov momentum.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        lr: float,
        *,
        momentum: float,
        nesterov: bool = True,
        steps: int = 5,
        normalize: bool = False,
        sgd_momentum: float = 0.9,
    ) -> None:
        super().__init__(groups, {"lr": lr, "muon": False, "weight_decay": 0.0})
        self._momentum, self._nesterov, self._steps, self._normalize = momentum, nesterov, steps, normalize
        self._sgd_momentum = sgd_momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            update = self._muon if group["muon"] else self._sgd
            if parameters:
                update(parameters, group["lr"], group["weight_decay"])

    def _averaged(self, parameters: list[Tensor], gradients: Tensors, momentum: float, nesterov: bool) -> Tensors:
        """Update the momentum buffers and return the raw updates.

        Orthogonalization (Muon only) and scaling by the learning rate are left to the caller.
        """
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, gradients)
        return torch._foreach_add(gradients, averages, alpha=momentum) if nesterov else averages

    def _sgd(self, parameters: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        gradients = torch._foreach_add(existing_gradients(parameters), parameters, alpha=weight_decay)
        updates = self._averaged(parameters, gradients, self._sgd_momentum, nesterov=self._sgd_momentum > 0)
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, lr))

    def _muon(self, parameters: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        updates = self._averaged(parameters, existing_gradients(parameters), self._momentum, self._nesterov)
        if self._normalize:
            norms = torch._foreach_norm(parameters)
            torch._foreach_mul_(parameters, [len(p) ** 0.5 / norm for p, norm in zip(parameters, norms, strict=True)])
        elif weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        same_shape = defaultdict(list)  # one batched product per shape, for few large kernels
        for parameter, update in zip(parameters, updates, strict=True):
            same_shape[parameter.shape].append((parameter, update))
        for (filters, channels, height, width), pairs in same_shape.items():
            matrices = as_matrices(update for _, update in pairs)
            matrices = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
            # bfloat16 is precise enough, since the result is only approximately orthogonal
            rounded = matrices.to(torch.bfloat16) if matrices.dtype == torch.float32 else matrices
            steps = orthogonalize(rounded, self._steps).to(matrices.dtype) * lr
            for (parameter, _), step in zip(pairs, steps, strict=True):
                parameter.sub_(step.view(filters, height, width, channels).permute(0, 3, 1, 2))
