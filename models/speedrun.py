"""Networks for CIFAR-10 speedruns: a whitening first layer, three groups of convolutions and one linear layer.

Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, and the author's later networks for
an accuracy of 94, 95 and 96 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import check_image_size


class Whitening(nn.Module):
    """Convolution with the principal directions of 2x2 patches and their negatives.

    Maps float [B, 3, H, W] to [B, 24, H - 1, W - 1]. Without the bias, the outputs have a mean square of about 1 over
    the patches of the images passed to `fit`. The weight is a buffer, since it is not trained.
    """

    KERNEL = 2

    weight: Tensor

    def __init__(self, zero_bias: bool) -> None:
        """Build the layer. If `zero_bias` is True, the bias is initialized to 0, otherwise to torch's default."""
        super().__init__()
        inputs = 3 * self.KERNEL**2
        plain = nn.Conv2d(3, 2 * inputs, self.KERNEL)
        self.register_buffer("weight", plain.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(2 * inputs) if zero_bias else plain.bias.detach().clone())  # type: ignore[union-attr]

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Compute the weight from images [N, 3, H, W], normalized like the input of `forward`.

        `eps` is added to the variance of each direction, so that the weakest directions are not amplified to the scale
        of the stronger ones.
        """
        k = self.KERNEL
        patches = images.double().unfold(2, k, 1).unfold(3, k, 1)  # [N, 3, H - 1, W - 1, k, k]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + eps).sqrt()).T.reshape(-1, 3, k, k)
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight.to(images.dtype), self.bias.to(images.dtype))


def identity_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Build a 3x3 convolution whose first `in_channels` filters copy the input. The other filters are random."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])
    return conv


def bias_norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    """Build a batch norm with a trainable bias and a fixed scale of 1.

    `momentum` is the weight of the newest batch in the running statistics, as in torch.
    """
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm


class ConvGroup(nn.Module):
    """Two or three 3x3 convolutions: float [B, in_channels, H, W] -> [B, width, H // 2, W // 2].

    The third convolution, if any, has a shortcut from the activated output of the first one.
    """

    def __init__(self, in_channels: int, width: int, depth: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = identity_conv(in_channels, width)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = bias_norm(width, momentum)
        self.conv2 = identity_conv(width, width)
        self.norm2 = bias_norm(width, momentum)
        self.conv3 = identity_conv(width, width) if depth == 3 else None
        self.norm3 = bias_norm(width, momentum) if depth == 3 else None

    def forward(self, features: Tensor) -> Tensor:
        first = F.gelu(self.norm1(self.pool(self.conv1(features))))
        features = F.gelu(self.norm2(self.conv2(first)))
        if self.conv3 is not None and self.norm3 is not None:
            features = F.gelu(self.norm3(self.conv3(features)) + first)
        return features


class SpeedrunNet(nn.Module):
    """Speedrun network: images float [B, 3, H, W] with H, W in 25..48 -> logits float32 [B, num_classes].

    Shapes at 32x32: whitening [24, 31, 31] -> groups [widths[0], 15, 15], [widths[1], 7, 7] and [widths[2], 3, 3] ->
    maximum [widths[2]] -> num_classes.
    """

    # For these sizes, the output of the third group is 3x3 to 5x5. The last pooling reduces it to one position.
    min_image_size = 25
    max_image_size: int | None = 48

    def __init__(
        self,
        num_classes: int,
        widths: tuple[int, int, int],
        *,
        depth: int = 2,
        momentum: float = 0.1,
        logit_scale: float = 1 / 9,
        zero_whitening_bias: bool = True,
        unit_head: bool = False,
    ) -> None:
        """Build the network.

        Args:
            num_classes: Number of logits.
            widths: Channels of the three groups.
            depth: Number of convolutions per group, 2 or 3.
            momentum: Momentum of the batch norms, see `bias_norm`.
            logit_scale: Factor by which the logits are multiplied.
            zero_whitening_bias: Whether the bias of the whitening layer starts at 0.
            unit_head: Whether the initial weights of the head are scaled to a standard deviation of 1.
        """
        super().__init__()
        self.whitening = Whitening(zero_whitening_bias)
        channels = (len(self.whitening.bias), *widths)
        self.groups = nn.Sequential(*(ConvGroup(channels[i], channels[i + 1], depth, momentum) for i in range(3)))
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = logit_scale
        if unit_head:
            self.head.weight.data /= self.head.weight.data.std()

    def forward(self, images: Tensor) -> Tensor:
        check_image_size("SpeedrunNet", images.shape[2], images.shape[3], self.min_image_size, self.max_image_size)
        features = self.pool(self.groups(F.gelu(self.whitening(images)))).flatten(1)
        # bfloat16 has 2 to 3 digits, too few to rank the classes of an ambiguous image; this layer is small
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype)) * self.logit_scale
        return logits


def speedrun94(num_classes: int) -> SpeedrunNet:
    """Build the network for 94 % accuracy. It has 1,972,504 parameters with 10 classes."""
    widths = (64, 256, 256)
    return SpeedrunNet(
        num_classes, widths, momentum=0.4, logit_scale=1 / widths[-1], zero_whitening_bias=False, unit_head=True
    )


def speedrun95(num_classes: int) -> SpeedrunNet:
    """Build the network for 95 % accuracy, wider than speedrun94. It has 4,606,232 parameters with 10 classes."""
    return SpeedrunNet(num_classes, (128, 384, 384), momentum=0.4)


def speedrun96(num_classes: int) -> SpeedrunNet:
    """Build the network for 96 % accuracy, with shortcuts. It has 9,918,488 parameters with 10 classes."""
    return SpeedrunNet(num_classes, (128, 384, 512), depth=3)


def speedrun96_proxy(num_classes: int) -> SpeedrunNet:
    """Build the network that selects training samples for speedrun96. It has 146,456 parameters with 10 classes."""
    return SpeedrunNet(num_classes, (32, 64, 64))


def fit_whitening(model: nn.Module, images: Tensor) -> None:
    """Fit the whitening layer of a `PixelClassifier`, if it has one, to raw images, uint8 [N, 3, H, W]."""
    if (whitening := find_whitening(model)) is not None:
        whitening.fit(model.get_submodule("normalize")(images))


def find_whitening(network: nn.Module) -> Whitening | None:
    """Return the whitening layer of a model, or None if there is none."""
    return next((module for module in network.modules() if isinstance(module, Whitening)), None)
