"""Models of timm: sizes, activations and options are tried before building."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.schema import ModelConfig
from configs.utils.errors import UserError
from helpers.config_models import MEAN, STD, random_pixels
from models import build_from_config, build_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_options_reach_timm_constructor() -> None:
    settings = ModelConfig(name="timm/resnet18", options={"layers": [1, 1, 1, 1], "drop_path_rate": 0.1})
    network = build_from_config(settings, 7, image_size=32, mean=MEAN, std=STD).network
    assert len(network.layer2) == 1


# The last one needs a class instead of a name, and keeps ReLU in its relative position embedding.
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
    with pytest.raises(UserError, match=r"'timm/test_resnet' cannot be built .* argument 'stem'.*NAME=null"):
        build_model("timm/test_resnet", 10, stem="imagenet")


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
