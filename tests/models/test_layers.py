"""Activations and normalisation, and the options of built-in models that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as pixels

from configs.schema import ModelConfig
from configs.utils.errors import UserError
from helpers.config_models import MEAN, SPEEDRUNS, STD, random_pixels
from models import Normalize, PixelClassifier, build_model
from models.layers import ACTIVATIONS, build_activation, init_gain

FUNCTIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_activation_names_match_schema() -> None:
    literal, _ = get_args(ModelConfig.model_fields["activation"].annotation)
    assert set(ACTIVATIONS) == set(get_args(literal)) == set(FUNCTIONS)


def reference_state(name: str) -> dict[str, Tensor]:
    """Return the initial state of a model without options for activation, dropout and width.

    LeNet and ResNet-18 layer by layer in the order of construction; AlexNet from torchvision.
    """
    if name == "alexnet":
        return torchvision.models.alexnet(num_classes=10).state_dict()
    layers: dict[str, nn.Module]
    if name == "lenet":
        layers = {
            "conv1": nn.Conv2d(3, 6, 5),
            "conv2": nn.Conv2d(6, 16, 5),
            "fc1": nn.Linear(576, 120),
            "fc2": nn.Linear(120, 84),
            "fc3": nn.Linear(84, 10),
        }
        for layer, module in layers.items():
            nn.init.xavier_uniform_(module.weight, gain=1.0 if layer == "fc3" else 4.0)
            nn.init.zeros_(module.bias)
    else:
        layers = {"conv1": nn.Conv2d(3, 64, 3, bias=False), "bn1": nn.BatchNorm2d(64)}
        before = 64
        for stage, width in enumerate((64, 128, 256, 512), 1):
            for block in range(2):
                inside = {
                    "conv1": nn.Conv2d(before, width, 3, bias=False),
                    "bn1": nn.BatchNorm2d(width),
                    "conv2": nn.Conv2d(width, width, 3, bias=False),
                    "bn2": nn.BatchNorm2d(width),
                }
                if before != width:
                    inside |= {
                        "downsample.0": nn.Conv2d(before, width, 1, bias=False),
                        "downsample.1": nn.BatchNorm2d(width),
                    }
                layers |= {f"layer{stage}.{block}.{layer}": module for layer, module in inside.items()}
                before = width
        layers["fc"] = nn.Linear(512, 10)
        for module in layers.values():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return {f"{layer}.{key}": value for layer, module in layers.items() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["lenet", "alexnet", "resnet18"])
def test_default_weights_match_reference_bitwise(name: str) -> None:
    ours = build_model(name, 10).state_dict()
    torch.manual_seed(0)
    before = reference_state(name)
    assert list(ours) == list(before)
    assert [key for key in before if not torch.equal(ours[key], before[key])] == []


def plain_forward(network: nn.Module, name: str, activation: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the logits of a network in evaluation mode, computed with this activation between its layers."""
    if name == "alexnet":
        layers = [*network.features, network.avgpool, nn.Flatten(), *network.classifier]
        for layer in layers:
            kept = isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.Linear, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout))
            images = layer(images) if kept else activation(images)
        return images
    if name == "lenet":
        for layer in (network.conv1, network.conv2):
            images = network.pool(activation(layer(images)))
        return network.fc3(activation(network.fc2(activation(network.fc1(images.flatten(1))))))
    images = activation(network.bn1(network.conv1(images)))
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            convs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
            convs += [(block.conv3, block.bn3)] if hasattr(block, "conv3") else []
            residual = images
            for number, (conv, norm) in enumerate(convs):
                residual = norm(conv(residual if number == 0 else activation(residual)))
            images = activation(residual + block.downsample(images))
    return network.fc(images.mean((2, 3)))


@pytest.mark.parametrize("name", ["lenet", "resnet18", "resnet50"])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activation_follows_every_layer(name: str, activation: str) -> None:
    options = {} if name == "lenet" else {"width": 4}
    network = build_model(name, 10, activation=activation, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), plain_forward(network, name, FUNCTIONS[activation], images))


def test_activation_follows_every_layer_of_alexnet() -> None:
    network = build_model("alexnet", 10, activation="mish").eval()
    images = torch.randn(1, 3, 63, 63)
    with torch.no_grad():
        torch.testing.assert_close(network(images), plain_forward(network, "alexnet", F.mish, images))
    assert sum(isinstance(module, nn.Mish) for module in network.modules()) == 7


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_inplace_activations_match_gradients_of_functions(activation: str) -> None:
    inputs = torch.linspace(-3, 3, 61, dtype=torch.float64)
    gradients = []
    for function in (build_activation(activation), FUNCTIONS[activation]):
        leaf = inputs.clone().requires_grad_()
        function(leaf * 1).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("activation", [name for name in FUNCTIONS if name != "sigmoid"])
def test_gain_keeps_mean_square_of_normal_signals(activation: str) -> None:
    signals = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1))
    assert (init_gain(activation) * FUNCTIONS[activation](signals)).square().mean() == pytest.approx(1, abs=0.01)


def test_relu_gain_matches_torch_and_lenet_applies_gains() -> None:
    assert init_gain("relu") == pytest.approx(nn.init.calculate_gain("relu"))
    bound = (6 / (3 * 25 + 6 * 25)) ** 0.5  # Xavier's
    for activation in ("relu", "mish"):
        largest = build_model("lenet", 10, activation=activation).conv1.weight.abs().max().item()
        assert largest == pytest.approx(init_gain(activation) * bound, rel=0.02)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_initial_lenet_logits_differ_for_every_activation(activation: str) -> None:
    network = build_model("lenet", 10, activation=activation)
    assert network(torch.randn(256, 3, 32, 32)).std(dim=0).mean() > 0.01


@pytest.mark.parametrize(("name", "layer"), [("lenet", "fc2"), ("lenet", "fc3"), ("resnet18", "fc")])
def test_dropout_zeroes_its_share_in_training_only(name: str, layer: str) -> None:
    network = build_model(name, 10, drop_rate=0.4)
    seen: list[Tensor] = []
    network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 32, 32))
        network.eval()(torch.randn(64, 3, 32, 32))
    assert (seen[0] == 0).float().mean() == pytest.approx(0.4, abs=0.03)
    assert (seen[1] == 0).float().mean() < 0.01


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_narrow_resnet_divides_every_width(name: str) -> None:
    with torch.device("meta"):
        wide, narrow = build_model(name, 10).state_dict(), build_model(name, 10, width=16).state_dict()
    assert list(narrow) == list(wide)
    fixed = {3, 10}  # colours and classes
    for key, tensor in wide.items():
        divided = [size if size in fixed or position > 1 else size // 4 for position, size in enumerate(tensor.shape)]
        assert list(narrow[key].shape) == divided, key


def test_resnet18_of_width_16_has_701_466_parameters() -> None:
    stages = sum(
        9 * (2 * w * w + w * before + w * w) + 8 * w + (w * before + 2 * w if w != before else 0)
        for before, w in ((16, 16), (16, 32), (32, 64), (64, 128))
    )
    assert 3 * 9 * 16 + 2 * 16 + stages + 128 * 10 + 10 == 701_466
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("resnet18", 10, width=16).parameters()) == 701_466


def test_speedrun_models_reject_activation() -> None:
    for name in SPEEDRUNS:
        with pytest.raises(
            UserError, match=f"activation=gelu cannot be applied: model '{name}' has a fixed activation"
        ):
            build_model(name, 10, activation="gelu")


# Normalisation


def test_normalize_matches_torchvision_and_keeps_channels_last() -> None:
    images = random_pixels(4, 7, 5)
    expected = pixels.normalize(pixels.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    normalized = Normalize(MEAN, STD)(images)
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert not normalized.is_contiguous()


def test_normalize_expects_floats_in_0_to_255() -> None:
    images, normalize = random_pixels(2, 4), Normalize(MEAN, STD)
    for dtype in (torch.float16, torch.float32, torch.float64):
        torch.testing.assert_close(normalize(images.to(dtype)), normalize(images), rtol=0, atol=0)


def test_normalize_computes_in_float64_after_double() -> None:
    images, normalize = random_pixels(2, 4), Normalize(MEAN, STD).double()
    mean, std = normalize.mean.view(3, 1, 1), normalize.std.view(3, 1, 1)
    torch.testing.assert_close(normalize(images), (images.double() / 255 - mean) / std, rtol=0, atol=1e-14)


def test_pixel_classifier_computes_in_float64_after_double() -> None:
    network = build_model("resnet18", 10, mean=MEAN, std=STD).double()
    assert network(random_pixels(2, 25)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalize_rounds_once_to_autocast_dtype(dtype: torch.dtype) -> None:
    images, normalize = random_pixels(2, 16), Normalize(MEAN, STD)
    exact = normalize(images)
    with torch.autocast("cpu", dtype=dtype):
        normalized = normalize(images)
    torch.testing.assert_close(normalized, exact.to(dtype), rtol=0, atol=0)
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_are_buffers_in_state_dict() -> None:
    network = build_model("lenet", 10, mean=MEAN, std=STD)
    assert isinstance(network, PixelClassifier)
    plain = build_model("lenet", 10)
    assert list(network.state_dict()) == ["normalize.mean", "normalize.std"] + [
        f"network.{k}" for k in plain.state_dict()
    ]
    assert len(list(network.parameters())) == len(list(plain.parameters()))


def test_pixel_classifier_equals_network_on_normalised_images() -> None:
    network, images = build_model("lenet", 10, mean=MEAN, std=STD), random_pixels(2, 32)
    normalised = pixels.normalize(pixels.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(network(images), network.network(normalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": MEAN}, "std=None must be given together"),
        ({"mean": (125, 123, 114), "std": STD}, r"mean=\[125, 123, 114\].*from 0 to 1"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, r"std=\[0.2, 0.0, 0.2\].*above 0"),
        ({"mean": (0.5,), "std": (0.5,)}, r"mean=\[0.5\] is not three numbers"),
    ],
)
def test_bad_statistics_error_names_value(arguments: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model("lenet", 10, **arguments)
