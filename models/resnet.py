"""ResNets with the CIFAR stem: one 3x3 convolution of stride 1 and no pooling before the first block.

Parameter names are torchvision's; only the shape of conv1.weight differs from its ImageNet models.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.image_size import check_image_size


class BasicBlock(nn.Module):
    """features: float [B, in_channels, H, W] -> [B, width, H / stride, W / stride], by two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        activated: Tensor = self.relu(residual + self.downsample(features))
        return activated


class Bottleneck(nn.Module):
    """features: float [B, in_channels, H, W] -> [B, 4 * width, H / stride, W / stride], by 1x1, 3x3, 1x1.

    The stride is the 3x3 convolution's, as in torchvision ("ResNet V1.5"), not the first 1x1's as in the paper.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        activated: Tensor = self.relu(residual + self.downsample(features))
        return activated


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where the shapes agree, else the paper's option B: a 1x1 convolution, unpadded, and batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResNet(nn.Module):
    """images: float [B, 3, H, W], sides from 25 -> logits [B, num_classes].

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385; the four widths
    64/128/256/512 of its ImageNet models behind a stem of stride 1, as for CIFAR. Shapes of ResNet-18 at 32x32: stem
    and layer1 [64, 32, 32] -> layer2 [128, 16, 16] -> layer3 [256, 8, 8] -> layer4 [512, 4, 4] -> global mean [512].
    """

    # From 25, layer4 ends in at least 4x4 positions: what the homework's 4x4 pooling window needs.
    smallest_image_size = 25
    largest_image_size: int | None = None

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        zero_init_residual: bool = False,
    ) -> None:
        """depths: blocks per stage. zero_init_residual: every block starts as the identity (arXiv:1706.02677, 5.1)."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = build_stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = build_stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = build_stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = build_stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self.reset_parameters(zero_init_residual)

    def reset_parameters(self, zero_init_residual: bool) -> None:
        """Kaiming normal, fan out, for convolutions (arXiv:1502.01852); BatchNorm and fc keep torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> Tensor:
        check_image_size("ResNet", images.shape[2], images.shape[3], self.smallest_image_size)
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


def build_stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` blocks of one width; the first changes channels and stride."""
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(depth - 1)))


def resnet18(num_classes: int, zero_init_residual: bool = False) -> ResNet:
    """11,173,962 parameters with 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, zero_init_residual)


def resnet34(num_classes: int, zero_init_residual: bool = False) -> ResNet:
    """21,282,122 parameters with 10 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, zero_init_residual)


def resnet50(num_classes: int, zero_init_residual: bool = False) -> ResNet:
    """23,520,842 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, zero_init_residual)


def resnet101(num_classes: int, zero_init_residual: bool = False) -> ResNet:
    """42,512,970 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, zero_init_residual)


def resnet152(num_classes: int, zero_init_residual: bool = False) -> ResNet:
    """58,156,618 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, zero_init_residual)
