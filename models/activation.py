"""The activation functions by the names that configs use, and the gain of initial weights in front of each.

Knows no model. None of them has parameters, so that exchanging one changes no name in a state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

# In place where the gradient follows from the result; the others keep their input for it anyhow.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": partial(nn.ELU, inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}
SIGMOID_GAIN = 4.0


def build_activation(name: str) -> nn.Module:
    """name: one of ACTIVATIONS, which `build_model` has checked."""
    return ACTIVATIONS[name]()


def init_gain(name: str) -> float:
    """What Xavier's initial standard deviation is multiplied by where this activation follows.

    1 / sqrt(E[f(z)^2]) for a standard normal z, so that signals keep their size from layer to layer: sqrt(2) for relu
    (He et al., arXiv:1502.01852), as torch.nn.init.calculate_gain says, which does not know gelu, silu, elu, hardswish
    and mish. For sigmoid it is 4, since its slope is at most 1/4 and most of its size is a constant.
    """
    if name == "sigmoid":
        return SIGMOID_GAIN
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64, device="cpu")
    density = torch.exp(-(z**2) / 2)
    mean_square = (density * build_activation(name)(z.clone()) ** 2).sum() / density.sum()
    return float(mean_square) ** -0.5
