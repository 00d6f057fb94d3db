"""Whether tensors are finite, by few kernels, however many there are."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def max_abs(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of all elements, float32 []; nan where one is nan. Does not synchronise."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], float("inf"))
    return torch.stack([norm.float() for norm in norms]).amax()
