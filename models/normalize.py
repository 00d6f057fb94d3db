"""Owns the step from raw pixels to what a network is trained on; knows nothing of the network or of the loader.

Normalisation is the model's first module, not the loader's last step: a quarter of the bytes reach the device, the
compiler fuses it into the first convolution's input, and a checkpoint takes raw pixels, so that training and prediction
cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.utils.errors import UserError


class Normalize(nn.Module):
    """images: uint8 [B, 3, H, W], or any float type in 0..255 -> (images / 255 - mean) / std, same shape and strides.

    The result has autocast's dtype for the device of `images` where autocast is on, else the dtype of the buffers,
    which `.double()` and `.half()` move together with the network. Channels_last strides come out as they went in.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """mean, std: one number per channel, in units of pixel values from 0 to 1. Raises `UserError` on others."""
        super().__init__()
        for name, values, allowed in (("mean", mean, "from 0 to 1"), ("std", std, "above 0 and at most 1")):
            good = [0 < v <= 1 if name == "std" else 0 <= v <= 1 for v in values]
            if len(good) != 3 or not all(good):
                raise UserError(
                    f"{name}={list(values)} is not three numbers {allowed}; divide statistics of 0..255 pixels by 255"
                )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        autocast = torch.is_autocast_enabled(device)
        # Computed in the buffers' dtype and rounded once: bfloat16 arithmetic would lose a grey level near the mean.
        scale = (1 / (255 * self.std)).view(3, 1, 1)
        bias = (-self.mean / self.std).view(3, 1, 1)
        normalized = images.to(self.mean.dtype) * scale + bias
        return normalized.to(torch.get_autocast_dtype(device)) if autocast else normalized

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class PixelClassifier(nn.Module):
    """images: raw pixels, uint8 [B, 3, H, W] -> logits [B, num_classes]. State names: normalize.* and network.*"""

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits
