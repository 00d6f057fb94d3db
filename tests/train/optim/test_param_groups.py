"""Weight decay and learning rate of each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import OptimizerConfig
from configs.utils.errors import UserError
from models import build_model
from train.optim.factory import build_optimizer, set_learning_rate
from train.optim.param_groups import layer_indices, layers_by_registration, names_without_decay, parameter_groups

PIXELS: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.3] * 3}
VIT = "timm/test_vit"
Values = dict[str, float]


def by_name(model: nn.Module, key: str, lr: float = 1.0, **settings: Any) -> Values:
    """Return a value of each parameter's group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig(**settings), lr)
    found = [(names[id(parameter)], group[key]) for group in groups for parameter in group["params"]]
    assert len(found) == len(dict(found)) == len(names)  # each parameter once
    return dict(found)


# Layers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet", ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        ("resnet18", ["conv1 bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("alexnet", ["features.0", "features.3", "features.6", "features.8", "features.10", "classifier.1",
                     "classifier.4", "classifier.6"]),
        ("speedrun94", ["whitening groups", "head"]),  # only the bias of the whitening is trained
    ],
)  # fmt: skip
def test_layers_of_our_models_are_stem_stages_and_head(name: str, expected: list[str]) -> None:
    network = build_model(name, 10)
    layers = layer_indices(network)
    assert layers.keys() == dict(network.named_parameters()).keys()
    parts: list[set[str]] = [set() for _ in range(max(layers.values()) + 1)]
    for parameter, layer in layers.items():
        part = max((p for each in expected for p in each.split() if parameter.startswith(p + ".")), key=len)
        parts[layer].add(part)
    assert [set(each.split()) for each in expected] == parts


def test_norm_before_first_weights_belongs_to_first_layer() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 2))
    assert layers_by_registration(network) == {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1,
                                        "3.bias": 1}  # fmt: skip


def test_layer_decay_falls_with_distance_to_head() -> None:
    scales = by_name(build_model("resnet18", 10, **PIXELS), "lr_scale", layer_decay=0.5)
    above = {"conv1": 5, "bn1": 5, "layer1.0.conv1": 4, "layer3.1.bn2": 2, "layer4.0.conv1": 1, "fc": 0}
    for name, layers in above.items():
        assert scales[f"network.{name}.weight"] == pytest.approx(0.5**layers)


# Patterns


def test_last_matching_pattern_scales_learning_rate() -> None:
    model = build_model("resnet18", 10, **PIXELS)
    patterns = {"layer*": 0.5, "network.layer1.*": 0.1, "layer2.0.conv?.weight": 3.0, "fc.bias": 0.0}
    scales = by_name(model, "lr_scale", lr_scales=patterns)
    assert scales["network.conv1.weight"] == scales["network.fc.weight"] == 1.0
    assert scales["network.layer1.0.bn1.bias"] == 0.1
    assert scales["network.layer2.0.conv2.weight"] == 3.0
    assert scales["network.layer2.0.bn2.weight"] == scales["network.layer4.1.conv2.weight"] == 0.5
    assert scales["network.fc.bias"] == 0.0


def test_learning_rate_factors_multiply_and_own_rates_keep_decay() -> None:
    model = build_model("lenet", 10, **PIXELS)
    settings: dict[str, Any] = {
        "layer_decay": 0.5, "lr_scales": {"fc1.*": 0.1}, "linear_lr": 0.6, "bias_lr": 0.4, "weight_decay": 0.3,
    }  # fmt: skip
    scales = by_name(model, "lr_scale", lr=0.2, **settings)
    assert scales["network.fc1.weight"] == pytest.approx(0.25 * 0.1 * 3)
    assert scales["network.fc1.bias"] == pytest.approx(0.25 * 0.1 * 2)
    assert scales["network.conv1.weight"] == pytest.approx(0.0625)
    decays = by_name(model, "weight_decay", lr=0.2, **settings)
    taken = {name: decay * scales[name] for name, decay in decays.items()}  # decay per step, relative to lr
    assert taken["network.fc1.weight"] == pytest.approx(0.25 * 0.1 * 0.3)
    assert taken["network.conv1.weight"] == pytest.approx(0.0625 * 0.3)
    assert taken["network.fc3.weight"] == pytest.approx(0.3)
    assert {taken[name] for name in taken if name.endswith("bias")} == {0.0}


def test_timm_model_layers_get_timm_decay_and_rates() -> None:
    from timm.optim import param_groups_layer_decay

    model = build_model(VIT, 10, **PIXELS)
    config = OptimizerConfig(weight_decay=0.3, layer_decay=0.7)
    network: Any = model.network
    theirs = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(network, 0.3, network.no_weight_decay(), layer_decay=0.7)
        for parameter in group["params"]
    }
    ours = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, config, lr=0.2)
        for parameter in group["params"]
    }
    assert ours.keys() == theirs.keys()
    for parameter, (scale, decay) in ours.items():
        assert (scale, decay) == pytest.approx(theirs[parameter])


def test_zero_learning_rate_keeps_parameter_unchanged() -> None:
    model = build_model("lenet", 10, **PIXELS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(weight_decay=0.5, lr_scales={"conv1.*": 0.0})
    optimizer = build_optimizer(model, config, lr=0.1)
    set_learning_rate(optimizer, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == {"network.conv1.weight", "network.conv1.bias"}


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        (
            {"layer9.*": 0.1},
            r"lr_scales has 'layer9\.\*', which matches no parameter .*; there are names",
        ),
        ({"network.conv1.weigth": 0.1}, r"names like network\.conv1\.weight"),
        ({"fc.*": -1.0}, r"lr_scales has -1\.0 for 'fc\.\*'; use 0 or more"),
    ],
)
def test_invalid_patterns_are_refused(scales: Values, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_optimizer(build_model("resnet18", 10, **PIXELS), OptimizerConfig(lr_scales=scales), lr=0.1)


# Weight decay


def test_timm_no_weight_decay_list_is_respected() -> None:
    model = build_model(VIT, 10, **PIXELS)
    listed = model.network.no_weight_decay()  # type: ignore[operator, union-attr]
    expected = {f"network.{name}" for name in listed if name in dict(model.network.named_parameters())}  # type: ignore[union-attr, operator]
    assert names_without_decay(model) == expected
    assert "network.pos_embed" in expected
    for decay_biases in (False, True):
        decays = by_name(model, "weight_decay", weight_decay=0.3, decay_biases=decay_biases)
        for name, parameter in model.named_parameters():
            kept = name in expected or (parameter.ndim <= 1 and not decay_biases)
            assert decays[name] == (0.0 if kept else 0.3)


def test_model_without_list_decays_all_but_biases_and_norms() -> None:
    assert names_without_decay(build_model("resnet18", 10, **PIXELS)) == set()
