"""Inputs of models."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SPEEDRUNS = ("speedrun94", "speedrun95", "speedrun96", "speedrun96_proxy")


def random_pixels(batch: int, height: int, width: int | None = None) -> Tensor:
    """Return uint8 [B, 3, H, W] with channels_last strides, like a batch of the loader."""
    return torch.randint(0, 256, (batch, height, width or height, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
