"""LeNet for color images, as in the homework (docs/homework.md): average pooling, sigmoids, linear output layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import build_activation, check_image_size, init_gain


class LeNet(nn.Module):
    """LeNet: images float [B, 3, H, W] with H, W in 32..35 -> logits [B, num_classes].

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998.
    The paper's sparse connections, scaled tanh and RBF output are left out. 83,126 parameters with 10 classes.

    Shapes at 32x32: conv1 [6, 32, 32] -> pool [6, 16, 16] -> conv2 [16, 12, 12] -> pool [16, 6, 6] -> 576 -> 120 -> 84
    -> num_classes.
    """

    # Only these sizes give 6x6 positions after the second pooling, and therefore fc1's 576 inputs.
    min_image_size = 32
    max_image_size: int | None = 35

    def __init__(self, num_classes: int, activation: str = "sigmoid", drop_rate: float = 0.0) -> None:
        """Build the network. `drop_rate` is the dropout probability after fc1 and after fc2."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.activation = build_activation(activation)
        self.pool = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.drop_rate = drop_rate
        self.reset_parameters(init_gain(activation))

    def reset_parameters(self, gain: float) -> None:
        """Initialize weights with Xavier uniform, scaled by `gain` (see `init_gain`), and biases with 0.

        Source: Glorot and Bengio, AISTATS 2010. With torch's default initialization and sigmoids, the difference
        between the activations of two images would shrink about tenfold per layer (measured: to 0.00006 in the logits),
        and training would start on a plateau. fc3 has gain 1, since it is not followed by an activation.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter, gain=1.0 if name == "fc3.weight" else gain)

    def forward(self, images: Tensor) -> Tensor:
        check_image_size("LeNet", images.shape[2], images.shape[3], self.min_image_size, self.max_image_size)
        features = self.pool(self.activation(self.conv1(images)))
        features = self.pool(self.activation(self.conv2(features)))
        for layer in (self.fc1, self.fc2):
            features = self.activation(layer(features.flatten(1)))
            features = F.dropout(features, self.drop_rate, self.training)
        logits: Tensor = self.fc3(features)
        return logits
