"""Tests of tools.common.model_costs, against known values and hand computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import EmaConfig, OptimizerConfig, TrainConfig
from helpers.training import CPU
from models import build_model
from tools.common.model_costs import Costs, count_costs

BATCH = 4
WEIGHTS = 12 * 5 + 5 + 5 * 3 + 3
# saved per sample: pixels, the sigmoid's output (also the input of `last`), the ReLU's output, log-probabilities, label
SAVED = 4 * (12 + 5 + 3 + 3) + 8
TOTAL_WEIGHT = 4  # cross_entropy saves the number of samples


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def costs_of(name: str, size: int, batch_size: int = BATCH, amp: torch.dtype | None = None, **train: Any) -> Costs:
    network = build_model(name, 10, image_size=size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    config = TrainConfig(**train)
    return count_costs(network, config, batch_size=batch_size, image_size=size, device=CPU, amp=amp)


# multiply-adds: the homework's own counts
@pytest.mark.parametrize(
    ("name", "size", "multiply_adds"), [("lenet", 32, 0.886e6), ("alexnet", 70, 94.8e6), ("resnet18", 32, 555.4e6)]
)
def test_parameters_and_multiply_adds_match_known_values(name: str, size: int, multiply_adds: float) -> None:
    costs = costs_of(name, size)
    assert costs.parameters == costs.trainable == sum(p.numel() for p in build_model(name, 10).parameters())
    assert costs.forward_flops / (2 * BATCH) == pytest.approx(multiply_adds, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "amp"),
    [("lenet", 32, None), ("resnet18", 32, torch.bfloat16), ("speedrun94", 32, None),
     ("timm/vit_tiny_patch16_224", 32, torch.bfloat16)],
)  # fmt: skip
def test_layers_sum_to_the_totals(name: str, size: int, amp: torch.dtype | None) -> None:
    costs = costs_of(name, size, amp=amp)
    assert sum(layer.parameters for layer in costs.layers) == costs.parameters
    assert sum(layer.flops for layer in costs.layers) == costs.forward_flops > 0
    assert sum(layer.saved_bytes for layer in costs.layers) == costs.activation_bytes > 0


def test_layers_follow_execution_order_including_repeated_calls() -> None:
    names = [layer.name.removeprefix("network.") for layer in costs_of("lenet", 32).layers]
    assert names == [
        "normalize", "conv1", "activation", "pool", "conv2", "activation", "pool", "fc1", "activation", "fc2",
        "activation", "fc3", "loss",
    ]  # fmt: skip


def test_only_activations_grow_with_the_batch() -> None:
    small, large = costs_of("resnet18", 32, batch_size=16), costs_of("resnet18", 32, batch_size=10_000)
    assert large.activation_bytes / small.activation_bytes == pytest.approx(625, rel=0.01)
    assert large.forward_flops == 625 * small.forward_flops
    for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(large, kind) == getattr(small, kind)


class TinyNet(nn.Module):
    """Network of 12 pixels -> 5 -> sigmoid -> 3, with an in-place ReLU, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sigmoid, self.last = nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 3)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Parameter(torch.zeros(7), requires_grad=False)
        self.register_buffer("constant", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.last(self.sigmoid(self.first(images.float().flatten(1)))))


def tiny_costs(amp: torch.dtype | None = None, **optimizer: Any) -> Costs:
    config = TrainConfig(optimizer=OptimizerConfig(**optimizer))
    return count_costs(TinyNet(), config, batch_size=6, image_size=2, device=CPU, amp=amp)


def test_every_kind_of_memory_matches_hand_computation() -> None:
    costs = tiny_costs(name="sgd")
    assert (costs.parameters, costs.trainable) == (WEIGHTS + 7, WEIGHTS)
    assert costs.weight_bytes == 4 * (WEIGHTS + 7 + 2)
    assert costs.gradient_bytes == costs.optimizer_bytes == 4 * WEIGHTS
    assert costs.activation_bytes == 6 * SAVED + TOTAL_WEIGHT
    assert costs.memory_bytes == 4 * (3 * WEIGHTS + 9) + 6 * SAVED + TOTAL_WEIGHT
    assert costs.forward_flops == 6 * 2 * (12 * 5 + 5 * 3)
    assert costs.training_flops == 6 * 2 * (2 * 12 * 5 + 3 * 5 * 3)  # the first layer's input needs no gradient


def test_optimizer_bytes_include_lookahead_and_moving_average() -> None:
    counts = 4 * 4  # AdamW's step counter of each tensor
    assert tiny_costs(name="adamw").optimizer_bytes == 2 * 4 * WEIGHTS + counts
    assert tiny_costs(name="sgd", momentum=0.0, nesterov=False).optimizer_bytes == 0
    config = TrainConfig(optimizer=OptimizerConfig(name="sgd"), lookahead={"every_steps": 2})
    costs = count_costs(TinyNet(), config, batch_size=6, image_size=2, device=CPU, amp=None)
    assert costs.optimizer_bytes == 4 * WEIGHTS + 4 * (WEIGHTS + 7 + 2)
    config = config.model_copy(update={"ema": EmaConfig(decay=0.9)})
    averaged = count_costs(TinyNet(), config, batch_size=6, image_size=2, device=CPU, amp=None)
    assert averaged.optimizer_bytes == costs.optimizer_bytes + 4 * (WEIGHTS + 7 + 2)


def test_autocast_halves_activations_and_copies_weights() -> None:
    costs = tiny_costs(amp=torch.bfloat16, name="sgd")
    assert costs.weight_bytes == 4 * (WEIGHTS + 7 + 2) + 2 * WEIGHTS
    # bfloat16: the pixels and the outputs of sigmoid and ReLU; the loss is computed in float32
    assert costs.activation_bytes == 6 * (2 * (12 + 5 + 3) + 4 * 3 + 8) + TOTAL_WEIGHT


def test_activation_bytes_equal_a_real_forward_pass() -> None:
    network = build_model("lenet", 10, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in own:
            kept[pointer] = tensor
        return tensor

    images = torch.zeros(BATCH, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(network(images), torch.zeros(BATCH, dtype=torch.int64))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert loss.requires_grad
    assert costs_of("lenet", 32).activation_bytes == real


def test_grouped_convolution_backward_costs_twice_the_forward() -> None:
    grouped = (nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 3, groups=2))
    network = nn.Sequential(nn.Conv2d(3, 8, 1), *grouped, nn.Flatten())
    cast = nn.Sequential(Floats(), network)
    costs = count_costs(cast, TrainConfig(), batch_size=2, image_size=8, device=CPU, amp=None)
    first, rest = 2 * 64 * 3 * 8, 2 * 36 * 8 * 9 + 2 * 36 * 8 * 2 * 9
    assert costs.forward_flops == 2 * (first + rest)
    assert costs.training_flops == 2 * (2 * first + 3 * rest)


class Floats(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()
