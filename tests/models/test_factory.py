"""Names, arguments and options of models."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import models
from configs.schema import ModelConfig
from configs.utils.errors import UserError
from helpers.config_models import MEAN, RESNETS, SPEEDRUNS, STD
from models import PixelClassifier, build_from_config, build_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_listed_models_are_sorted_and_build() -> None:
    assert models.list_models() == sorted(["lenet", "alexnet", *RESNETS, *SPEEDRUNS])
    with torch.device("meta"):
        assert all(isinstance(build_model(name, 10), nn.Module) for name in models.list_models())


def test_unknown_model_error_names_allowed_models() -> None:
    with pytest.raises(UserError, match=r"'resnet8' is unknown; .*use one of alexnet, lenet, .*resnet50, .*timm/NAME"):
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
            r"widht=2 is not an option of model 'resnet18'; it has \['zero_init_residual', 'width', 'stem'\]; set "
            r"model\.options\.widht=null",
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
        ({"drop_rate": 0.1}, "must not contain 'drop_rate', which is set elsewhere: use model.drop_rate"),
        ({"image_size": 64}, "must not contain 'image_size', which is set elsewhere; leave it out"),
        ({"num_classes": 3}, "use model.num_classes"),
        ({"pretrained_cfg": {}}, "must not contain 'pretrained_cfg'"),
        ({"depth": 3}, "depth=3 is not an option of model 'resnet18'"),
    ],
)
def test_reserved_and_unknown_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(name="resnet18", options=options)


def test_null_option_means_the_default() -> None:
    for name in ("resnet18", "lenet", "timm/test_resnet"):
        ours = configured(name=name, options={"width": None}).network.state_dict()
        plain = configured(name=name).network.state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in plain.items()}


@pytest.mark.slow
def test_building_built_in_model_does_not_import_timm() -> None:
    program = "import sys, models; models.build_model('lenet', 10, image_size=32); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(models.__path__[0])).returncode == 0
