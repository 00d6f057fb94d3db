"""Architectures: shapes and parameter counts of the homework, names and results of torchvision."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torchvision
from torch import nn

from configs.utils.errors import UserError
from helpers.config_models import MEAN, RESNETS, STD, random_pixels
from models import build_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count_parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(name, num_classes).parameters())


def shapes_of(network: nn.Module, layers: list[str], image_size: int) -> list[tuple[int, ...]]:
    """Return the output shape of each layer for one image, without the batch dimension."""
    shapes: list[tuple[int, ...]] = []
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _m, _i, output: shapes.append(tuple(output.shape[1:]))
        )
    network.eval()(torch.zeros(1, 3, image_size, image_size))
    return shapes


def torchvision_resnet(name: str, num_classes: int) -> nn.Module:
    """Build torchvision's ResNet with a stem of 3x3, stride 1 and without pooling."""
    network = torchvision.models.get_model(name, num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


# Architectures


def test_lenet_has_83_126_parameters_with_10_classes() -> None:
    assert [count_parameters("lenet", classes) for classes in (10, 200)] == [83_126, 99_276]


def test_alexnet_has_57_044_810_parameters_with_10_classes() -> None:
    assert [count_parameters("alexnet", classes) for classes in (10, 200)] == [57_044_810, 57_823_240]


def test_resnet18_has_11_173_962_parameters_with_10_classes() -> None:
    assert [count_parameters("resnet18", classes) for classes in (10, 200)] == [11_173_962, 11_271_432]


def test_lenet_shapes_at_32_match_homework() -> None:
    shapes = shapes_of(build_model("lenet", 10), ["conv1", "conv2", "fc1", "fc2", "fc3"], 32)
    assert shapes == [(6, 32, 32), (16, 12, 12), (120,), (84,), (10,)]


def test_lenet_equals_layers_in_homework_order() -> None:
    network = build_model("lenet", 10)
    sigmoid, pool = nn.Sigmoid(), nn.AvgPool2d(2)
    layers = [network.conv1, sigmoid, pool, network.conv2, sigmoid, pool, nn.Flatten()]
    layers += [network.fc1, sigmoid, network.fc2, sigmoid, network.fc3]
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(images), nn.Sequential(*layers)(images))


def test_initial_lenet_logits_differ_between_images() -> None:
    """torch's default initialisation gives a standard deviation of 0.00006, Xavier with gain 4 0.03 (measured)."""
    assert build_model("lenet", 10)(torch.randn(256, 3, 32, 32)).std(dim=0).mean() > 0.01


def test_alexnet_with_torchvision_state_gives_its_logits() -> None:
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    ours = build_model("alexnet", 10, image_size=70).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 70, 70)
    torch.testing.assert_close(ours(images), theirs(images))


def test_resnet18_shapes_at_32_match_homework() -> None:
    shapes = shapes_of(build_model("resnet18", 10), ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"], 32)
    assert shapes == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (10,)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_with_torchvision_state_gives_its_logits_and_statistics(name: str) -> None:
    theirs, ours = torchvision_resnet(name, 10), build_model(name, 10)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_with_imagenet_stem_and_torchvision_state_gives_its_logits(name: str) -> None:
    theirs, ours = torchvision.models.get_model(name, num_classes=10), build_model(name, 10, stem="imagenet")
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_first_stage_of_half_stem_has_half_the_image_size() -> None:
    network = build_model("resnet18", 10, width=8, stem="half")
    shapes = shapes_of(network, ["conv1", "layer1", "layer2", "layer3", "layer4"], 96)
    assert shapes == [(8, 48, 48), (8, 48, 48), (16, 24, 24), (32, 12, 12), (64, 6, 6)]


@pytest.mark.parametrize(("stem", "smallest", "positions"), [("homework", 25, 4), ("half", 17, 2), ("imagenet", 33, 2)])
def test_smallest_image_size_depends_on_the_stem(stem: str, smallest: int, positions: int) -> None:
    network = build_model("resnet18", 10, image_size=smallest, width=8, stem=stem)
    assert shapes_of(network, ["layer4"], smallest) == [(64, positions, positions)]
    assert shapes_of(network, ["layer4"], smallest + 103)[0][1] > positions
    with pytest.raises(UserError, match=f"not supported by resnet18: the smallest is {smallest}"):
        build_model("resnet18", 10, image_size=smallest - 1, stem=stem)
    with pytest.raises(UserError, match=f"not supported by ResNet: the smallest is {smallest}"):
        network(torch.zeros(1, 3, smallest, smallest - 1))


def test_unknown_stem_is_an_error() -> None:
    with pytest.raises(UserError, match="stem='cifar' is unknown; use one of homework, half, imagenet"):
        build_model("resnet18", 10, stem="cifar")


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_state_matches_torchvision_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_model(name, 200).state_dict(), torchvision_resnet(name, 200).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_resnet_convolutions_start_kaiming_normal_by_fan_out() -> None:
    weight = build_model("resnet18", 10).layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_zero_init_residual_starts_blocks_as_shortcuts() -> None:
    for name, options in (("resnet18", {"zero_init_residual": True}), ("resnet50", {"zero_init_residual": True})):
        network = build_model(name, 10, **options)
        features = torch.randn(2, network.layer1[0].conv1.in_channels, 8, 8)
        for stage in (network.layer1, network.layer2):
            for block in stage:
                expected = block.downsample(features).relu()
                features = block(features)
                torch.testing.assert_close(features, expected)


def test_resnet_blocks_start_with_residuals_by_default() -> None:
    block = build_model("resnet18", 10).layer1[0]
    features = torch.randn(2, 64, 8, 8)
    assert (block(features) - features.relu()).abs().max() > 0.1


# Memory format and compiler


@pytest.mark.parametrize(("name", "image_size"), [("lenet", 32), ("alexnet", 63), ("resnet18", 32), ("resnet50", 25)])
def test_channels_last_gives_the_same_logits(name: str, image_size: int) -> None:
    network = build_model(name, 10, image_size=image_size, mean=MEAN, std=STD).eval()
    images = random_pixels(2, image_size)
    with torch.no_grad():
        expected = network(images.contiguous())
        torch.testing.assert_close(
            network.to(memory_format=torch.channels_last)(images), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "c++", "clang++")),
    reason="torch.compile on the CPU needs a C++ compiler",
)
def test_compiled_lenet_gives_the_same_logits() -> None:
    torch.compiler.reset()
    network = build_model("lenet", 10, mean=MEAN, std=STD).to(memory_format=torch.channels_last)
    images = random_pixels(4, 32)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True)
        torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "image_size"), [("lenet", 32), ("alexnet", 63), ("resnet18", 25)])
def test_models_have_no_graph_breaks_under_autocast(name: str, image_size: int) -> None:
    torch.compiler.reset()
    network = build_model(name, 10, mean=MEAN, std=STD).eval()
    images = random_pixels(2, image_size)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.compile(network, fullgraph=True, backend="eager")(images)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, network(images))


def test_wrong_size_error_passes_through_compiled_model() -> None:
    torch.compiler.reset()
    network = torch.compile(build_model("lenet", 10), backend="eager")
    network(torch.zeros(2, 3, 32, 32))
    with pytest.raises(UserError, match="smallest is 32"):
        network(torch.zeros(2, 3, 28, 28))


# Image sizes


@pytest.mark.parametrize(("name", "smallest"), [("lenet", 32), ("alexnet", 63), *((name, 25) for name in RESNETS)])
def test_image_below_smallest_size_is_an_error(name: str, smallest: int) -> None:
    with torch.device("meta"):
        network = build_model(name, 10, image_size=smallest).eval()
        assert network(torch.empty(1, 3, smallest, smallest)).shape == (1, 10)
        for height, width in ((smallest - 1, smallest), (smallest, smallest - 1)):
            with pytest.raises(UserError, match=f"{height}x{width}.*smallest is {smallest}"):
                network(torch.empty(1, 3, height, width))
        with pytest.raises(UserError, match=f"{name}.*smallest is {smallest}"):
            build_model(name, 10, image_size=smallest - 1)


def test_lenet_accepts_35_pixels_but_not_36() -> None:
    assert build_model("lenet", 10, image_size=35)(torch.zeros(1, 3, 35, 35)).shape == (1, 10)
    with pytest.raises(
        UserError, match=r"smallest is 32, so make both sides from 32 to 35 \(set data\.image_size=32\)"
    ):
        build_model("lenet", 10, image_size=36)


def test_alexnet_layers_fail_below_smallest_size() -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="too small"):
        build_model("alexnet", 10).features(torch.empty(1, 3, 62, 62))
