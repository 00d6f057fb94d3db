"""models/: sizes, counts and names are the homework's; the architectures are compared with torchvision's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pixels

import models
from configs.schema import ModelConfig
from configs.utils.errors import UserError
from models import Normalize, PixelClassifier, build_from_config, build_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SPEEDRUNS = ("speedrun94", "speedrun95", "speedrun96", "speedrun96_proxy")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count_parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(name, num_classes).parameters())


def random_pixels(batch: int, height: int, width: int | None = None) -> Tensor:
    """uint8 [B, 3, H, W] with channels_last strides, as the loader hands it over."""
    return torch.randint(0, 256, (batch, height, width or height, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def shapes_of(network: nn.Module, layers: list[str], image_size: int) -> list[tuple[int, ...]]:
    """The output shape of each layer for one image, without the batch dimension."""
    shapes: list[tuple[int, ...]] = []
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _m, _i, output: shapes.append(tuple(output.shape[1:]))
        )
    network.eval()(torch.zeros(1, 3, image_size, image_size))
    return shapes


def torchvision_resnet(name: str, num_classes: int) -> nn.Module:
    """torchvision's ResNet of that name with its stem replaced by 3x3, stride 1, no pooling."""
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
    """torch's default initialisation spreads them by 0.00006, Xavier with gain 4 by 0.03 (measured)."""
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


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_state_has_torchvisions_names_and_shapes(name: str) -> None:
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
    with pytest.raises(UserError, match="smallest is 32, so make both sides from 32 to 35"):
        build_model("lenet", 10, image_size=36)


def test_alexnet_layers_fail_below_smallest_size() -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="too small"):
        build_model("alexnet", 10).features(torch.empty(1, 3, 62, 62))


# Names and options


def test_listed_models_are_sorted_and_build() -> None:
    assert models.list_models() == sorted(["lenet", "alexnet", *RESNETS, *SPEEDRUNS])
    with torch.device("meta"):
        assert all(isinstance(build_model(name, 10), nn.Module) for name in models.list_models())


def test_unknown_model_error_names_allowed_models() -> None:
    with pytest.raises(UserError, match=r"'resnet8' is unknown; use one of alexnet, lenet, .*resnet50, .*or timm/NAME"):
        build_model("resnet8", 10)


def test_drop_rate_sets_both_dropouts_of_alexnet() -> None:
    for drop_rate, expected in ((None, 0.5), (0.0, 0.0), (0.2, 0.2)):
        with torch.device("meta"):
            network = build_model("alexnet", 10, drop_rate=drop_rate)
        assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [expected, expected]


@pytest.mark.parametrize("name", ["speedrun94", "speedrun96_proxy"])
def test_drop_rate_needs_model_with_dropout(name: str) -> None:
    assert isinstance(build_model(name, 10, drop_rate=0.0), nn.Module)
    with pytest.raises(UserError, match=f"drop_rate=0.1 cannot be applied: model '{name}' has no dropout"):
        build_model(name, 10, drop_rate=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 10, "image_size": 0}, "image_size=0"),
        ({"num_classes": 10, "drop_rate": 1.0}, "drop_rate=1.0"),
        ({"num_classes": 10, "activation": "swish"}, "activation='swish' is unknown; use one of relu, .*silu"),
        ({"num_classes": 10, "width": 0}, "width=0 is not a number of channels"),
        ({"num_classes": 10, "width": "wide"}, "width='wide' has the wrong type for model 'resnet18'; use a whole"),
        ({"num_classes": 10, "width": [16]}, r"width=\[16\] has the wrong type"),
        ({"num_classes": 10, "width": True}, "width=True has the wrong type"),
        ({"num_classes": 10, "zero_init_residual": 1}, "zero_init_residual=1 has the wrong type .*use true or false"),
        (
            {"num_classes": 10, "widht": 2},
            r"widht=2 is not an option of model 'resnet18'; it has \['zero_init_residual', 'width'\]",
        ),
    ],
)
def test_bad_argument_error_names_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model("resnet18", **arguments)


def configured(**settings: Any) -> PixelClassifier:
    return build_from_config(ModelConfig(**settings), 7, image_size=32, mean=MEAN, std=STD)


def test_model_section_describes_whole_architecture() -> None:
    options = {"width": 8, "zero_init_residual": True}
    network = configured(name="resnet18", activation="gelu", drop_rate=0.3, options=options).network
    assert network.fc.weight.shape == (7, 64)
    assert isinstance(network.layer1[0].activation, nn.GELU)
    assert network.drop_rate == 0.3
    assert network.layer1[0].bn2.weight.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 0.1}, "must not hold 'drop_rate', which is set elsewhere: use model.drop_rate"),
        ({"image_size": 64}, "must not hold 'image_size', which is set elsewhere; leave it out"),
        ({"num_classes": 3}, "use model.num_classes"),
        ({"pretrained_cfg": {}}, "must not hold 'pretrained_cfg'"),
        ({"depth": 3}, "depth=3 is not an option of model 'resnet18'"),
    ],
)
def test_reserved_and_unknown_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(name="resnet18", options=options)


# timm


def test_null_option_means_models_default() -> None:
    for name in ("resnet18", "lenet", "timm/test_resnet"):
        ours = configured(name=name, options={"width": None}).network.state_dict()
        plain = configured(name=name).network.state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in plain.items()}


def test_options_reach_timm_constructor() -> None:
    network = configured(name="timm/resnet18", options={"layers": [1, 1, 1, 1], "drop_path_rate": 0.1}).network
    assert len(network.layer2) == 1


# the last one wants a class where most take a name, and keeps ReLU in its relative positions
@pytest.mark.parametrize(
    ("name", "was", "number"),
    [("timm/resnet18", nn.ReLU, 17), ("timm/test_vit", nn.GELU, 6), ("timm/test_vit_relpos", nn.GELU, 9)],
)
def test_activation_replaces_that_of_timm_model(name: str, was: type[nn.Module], number: int) -> None:
    plain, changed = (
        build_model(name, 10, image_size=32, activation=activation) for activation in (None, "leaky_relu")
    )
    assert count(plain, was) == count(changed, nn.LeakyReLU) == number
    assert count(plain, nn.LeakyReLU) == count(changed, was) == 0
    assert list(plain.state_dict()) == list(changed.state_dict())


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def test_unsupported_activation_of_timm_model_is_an_error() -> None:
    with pytest.raises(UserError, match=r"activation=mish cannot be applied to model 'timm/tnt_s_.*leave it out"):
        build_model("timm/tnt_s_patch16_224", 10, activation="mish")
    with pytest.raises(UserError, match="activation=mish and the option act_layer='relu' are the same setting"):
        build_model("timm/test_resnet", 10, activation="mish", act_layer="relu")


def test_timm_option_without_logits_is_named_instead_of_size() -> None:
    with pytest.raises(
        UserError, match=r"'timm/test_vit' does not run with \{'global_pool': ''\}.*instead of \[1, 10\]"
    ):
        build_model("timm/test_vit", 10, image_size=32, global_pool="")
    with pytest.raises(UserError, match=r"'timm/test_resnet' cannot be built with .*'drop_path_rate': 'much'"):
        build_model("timm/test_resnet", 10, drop_path_rate="much")


def test_building_built_in_model_does_not_import_timm() -> None:
    program = "import sys, models; models.build_model('lenet', 10, image_size=32); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(models.__path__[0])).returncode == 0


def test_timm_resnet_takes_uint8_at_32_pixels() -> None:
    network = build_model("timm/resnet18", 7, image_size=32, mean=MEAN, std=STD).eval()
    assert network(random_pixels(2, 32)).shape == (2, 7)


def test_timm_vit_is_built_for_image_size() -> None:
    network = build_model("timm/vit_tiny_patch16_224", 7, image_size=96, drop_rate=0.1).eval()
    assert network.patch_embed.img_size == (96, 96)
    assert network.head_drop.p == 0.1
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 7)


def test_impossible_timm_size_error_names_smallest_size() -> None:
    for name, image_size, smallest in (("vgg11", 31, 32), ("vit_tiny_patch16_224", 8, 16)):
        with pytest.raises(UserError, match=f"{image_size}x{image_size}.*timm/{name}.*the smallest is {smallest},"):
            build_model(f"timm/{name}", 10, image_size=image_size)


def test_unknown_timm_name_error_suggests_close_names() -> None:
    with pytest.raises(UserError, match=r"'timm/resnet81' is unknown to timm .*close names: .*timm/resnet18"):
        build_model("timm/resnet81", 10)


def test_unknown_timm_option_error_names_option() -> None:
    with pytest.raises(UserError, match=r"'timm/resnet18' cannot be built with .*'widht'"):
        build_model("timm/resnet18", 10, widht=2)
