"""ResNets with the stem of the CIFAR models, with that of the ImageNet models, or with one for sizes in between.

Parameter names are those of torchvision's ImageNet models. Apart from the head, only the shape of conv1.weight depends
on the stem.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from configs.utils.errors import UserError
from models.layers import build_activation, check_image_size


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: float [B, in_channels, H, W] -> [B, width, ceil(H / stride), ceil(W / stride)]."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.activation = build_activation(activation)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.activation(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        activated: Tensor = self.activation(residual + self.downsample(features))
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: float [B, in_channels, H, W] -> [B, 4 * width, H', W'].

    H' and W' are ceil(H / stride) and ceil(W / stride). The stride is in the 3x3 convolution, as in torchvision
    ("ResNet V1.5"), not in the first 1x1 convolution as in the paper.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.activation = build_activation(activation)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.activation(self.bn1(self.conv1(features)))
        residual = self.activation(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        activated: Tensor = self.activation(residual + self.downsample(features))
        return activated


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build the identity if the shape is unchanged, otherwise a 1x1 convolution and batch norm.

    This is option B in arXiv:1512.03385.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


@dataclass(frozen=True)
class Stem:
    """The layers before the first stage: a convolution, batch norm, the activation and, if `pools`, max pooling."""

    kernel_size: int
    stride: int
    pools: bool  # 3x3 with stride 2
    min_image_size: int


# With the homework's stem, layer4 has at least 4x4 positions for sizes from 25, the pooling window in the homework
# (docs/homework.md). With the others, it has at least 2x2 positions.
STEMS = {
    "homework": Stem(kernel_size=3, stride=1, pools=False, min_image_size=25),
    "half": Stem(kernel_size=3, stride=2, pools=False, min_image_size=17),
    "imagenet": Stem(kernel_size=7, stride=2, pools=True, min_image_size=33),
}


class ResNet(nn.Module):
    """ResNet: images float [B, 3, H, W] -> logits [B, num_classes].

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. With the default
    width of 64, the four stages have the widths of the paper's ImageNet models, 64/128/256/512. The stem is a key of
    STEMS: "homework" is that of the paper's CIFAR-10 models with stride 1, "imagenet" that of its ImageNet models, and
    "half" a 3x3 convolution with stride 2. The first stage sees images of the full size, a quarter and half of it.

    Shapes of ResNet-18 at 32x32 with the homework's stem: stem and layer1 [64, 32, 32] -> layer2 [128, 16, 16] ->
    layer3 [256, 8, 8] -> layer4 [512, 4, 4] -> global mean [512].
    """

    max_image_size: int | None = None

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        zero_init_residual: bool = False,
        width: int = 64,
        activation: str = "relu",
        drop_rate: float = 0.0,
        stem: str = "homework",
    ) -> None:
        """Build the network.

        Args:
            block: Type of all blocks.
            depths: Number of blocks in each stage.
            num_classes: Number of logits.
            zero_init_residual: Whether the residual branch of every block starts at 0 (arXiv:1706.02677, section 5.1).
            width: Width of the blocks in the first stage. Each stage has twice the width of the previous one.
            activation: A key of `models.layers.ACTIVATIONS`.
            drop_rate: Dropout probability before fc.
            stem: A key of STEMS.

        Raises:
            UserError: `width` is below 1, or `stem` is unknown.
        """
        super().__init__()
        if width < 1:
            raise UserError(f"width={width} is not a number of channels; use 1 or more, or leave it out for 64")
        if stem not in STEMS:
            raise UserError(f"stem={stem!r} is unknown; use one of {', '.join(STEMS)}")
        kernel_size, stride = STEMS[stem].kernel_size, STEMS[stem].stride
        self.conv1 = nn.Conv2d(3, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.activation = build_activation(activation)
        self.pools, self.min_image_size = STEMS[stem].pools, STEMS[stem].min_image_size
        expanded = width * block.expansion
        self.layer1 = build_stage(block, width, width, depths[0], 1, activation)
        self.layer2 = build_stage(block, expanded, 2 * width, depths[1], 2, activation)
        self.layer3 = build_stage(block, 2 * expanded, 4 * width, depths[2], 2, activation)
        self.layer4 = build_stage(block, 4 * expanded, 8 * width, depths[3], 2, activation)
        self.fc = nn.Linear(8 * expanded, num_classes)
        self.drop_rate = drop_rate
        self.reset_parameters(zero_init_residual)

    def reset_parameters(self, zero_init_residual: bool) -> None:
        """Initialize convolutions with Kaiming normal, fan out (arXiv:1502.01852). Other layers keep torch's defaults.

        If `zero_init_residual` is True, the last batch norm of each block starts with weight 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        check_image_size("ResNet", images.shape[2], images.shape[3], self.min_image_size)
        features = self.activation(self.bn1(self.conv1(images)))
        if self.pools:
            features = F.max_pool2d(features, kernel_size=3, stride=2, padding=1)
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        features = F.dropout(features.mean(dim=(2, 3)), self.drop_rate, self.training)
        logits: Tensor = self.fc(features)
        return logits


def build_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int, activation: str
) -> nn.Sequential:
    """Build a stage of `depth` blocks. The first block has the stride and changes the number of channels."""
    first = block(in_channels, width, stride, activation)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, activation) for _ in range(depth - 1)))


# The arguments are num_classes and ResNet's options. The comments are the numbers of parameters with 10 classes.
resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))  # 11,173,962
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))  # 21,282,122
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))  # 23,520,842
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))  # 42,512,970
resnet152 = partial(ResNet, Bottleneck, (3, 8, 36, 3))  # 58,156,618
