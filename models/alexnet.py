"""Single-column AlexNet, with torchvision's parameter names, so that torchvision's state dicts can be loaded."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers import build_activation, check_image_size


class AlexNet(nn.Module):
    """AlexNet: images float [B, 3, H, W] with H, W >= 63 -> logits [B, num_classes].

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, after
    Krizhevsky, Sutskever, Hinton, NeurIPS 2012. 57,044,810 parameters with 10 classes.

    Shapes at 70x70: conv [64, 16, 16] -> pool [64, 7, 7] -> conv [192, 7, 7] -> pool [192, 3, 3] -> conv
    [384, 3, 3] -> two convs [256, 3, 3] -> pool [256, 1, 1] -> adaptive pool [256, 6, 6] -> 9216 -> 4096 -> 4096 ->
    num_classes.
    """

    # Below 63, the input of the third 3x3 pooling would be 2x2 or smaller.
    min_image_size = 63
    max_image_size: int | None = None

    def __init__(self, num_classes: int, activation: str = "relu", drop_rate: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            build_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            build_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            build_activation(activation),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            build_activation(activation),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            build_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(256 * 6 * 6, 4096),
            build_activation(activation),
            nn.Dropout(drop_rate),
            nn.Linear(4096, 4096),
            build_activation(activation),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        check_image_size("AlexNet", images.shape[2], images.shape[3], self.min_image_size)
        features = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(features.flatten(1))
        return logits
