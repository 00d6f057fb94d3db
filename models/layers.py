"""Parts shared by the models: activations, the image size check, and pixel normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from configs.utils.errors import UserError

# Activations by their names in configs. They have no parameters, so changing the activation keeps state-dict names.
# relu, leaky_relu and elu run in place, since their gradients can be computed from the output. The others need their
# input for the backward pass, or torch does not offer an in-place module (tanh and sigmoid).
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
    return ACTIVATIONS[name]()


def init_gain(name: str) -> float:
    """Return the gain of Xavier initialization for a layer followed by this activation.

    The gain is 1 / sqrt(E[f(z)^2]) for a standard normal z. It keeps the scale of signals from layer to layer. For
    relu, it is sqrt(2) (He et al., arXiv:1502.01852), as in torch.nn.init.calculate_gain, which does not support gelu,
    silu, elu, hardswish or mish. For sigmoid, the gain is 4 instead: the slope of a sigmoid is at most 1/4, and most of
    its mean square comes from its mean of 1/2, which carries no signal.
    """
    if name == "sigmoid":
        return SIGMOID_GAIN
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64, device="cpu")
    density = torch.exp(-(z**2) / 2)
    mean_square = (density * build_activation(name)(z.clone()) ** 2).sum() / density.sum()
    return float(mean_square) ** -0.5


def check_image_size(model: str, height: int, width: int, min_size: int, max_size: int | None = None) -> None:
    """Raise `UserError` if the height or width in pixels is below `min_size` or above `max_size`.

    If `max_size` is None, there is no upper limit. Only Python ints (or torch's symbolic ints) are compared, so the
    check launches no kernel and causes no synchronization or graph break.
    """
    if height >= min_size and width >= min_size and (max_size is None or (height <= max_size and width <= max_size)):
        return
    allowed = f"at least {min_size}" if max_size is None else f"from {min_size} to {max_size}"
    raise UserError(
        f"image_size {height}x{width} (height x width) is not supported by {model}: the smallest is {min_size}, so "
        f"make both sides {allowed} (set data.image_size={min_size}) or choose another model"
    )


class Normalize(nn.Module):
    """Normalize images [B, 3, H, W], uint8 or floats in 0..255, to (images / 255 - mean) / std.

    This is the first module of a model rather than the last step of the loader, for three reasons. Images are
    copied to the device as uint8, a quarter of the size of float32. The compiler fuses the normalization into the input
    of the first convolution. Saved models take raw pixels, so training and prediction cannot normalize differently.

    If autocast is enabled for the device of `images`, the result has the autocast dtype. Otherwise it has the dtype of
    the buffers. `.double()` and `.half()` convert the buffers together with the network. Strides (channels_last) are
    preserved.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set mean and std, one number per channel, for pixel values in 0..1.

        Raises:
            UserError: `mean` is not three numbers from 0 to 1, or `std` is not three numbers above 0 and at most 1.
        """
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
        # Computed in the buffers' dtype and rounded once: bfloat16 arithmetic would lose a gray level near the mean.
        scale = (1 / (255 * self.std)).view(3, 1, 1)
        bias = (-self.mean / self.std).view(3, 1, 1)
        normalized = images.to(self.mean.dtype) * scale + bias
        return normalized.to(torch.get_autocast_dtype(device)) if autocast else normalized

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class PixelClassifier(nn.Module):
    """`Normalize` followed by a network: raw pixels, uint8 [B, 3, H, W] -> logits [B, num_classes].

    Names in the state dict start with `normalize.` or `network.`.
    """

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits
