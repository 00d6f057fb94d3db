"""Build models by name: a built-in model, or timm/NAME for any timm model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from configs.schema import ModelConfig
from configs.utils.errors import UserError
from models.alexnet import AlexNet
from models.layers import ACTIVATIONS, Normalize, PixelClassifier, check_image_size
from models.lenet import LeNet
from models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from models.speedrun import SpeedrunNet, speedrun94, speedrun95, speedrun96, speedrun96_proxy
from models.timm_models import Options, timm_arguments

MODELS: dict[str, Callable[..., LeNet | AlexNet | ResNet | SpeedrunNet]] = {
    "lenet": LeNet,
    "alexnet": AlexNet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "speedrun94": speedrun94,
    "speedrun95": speedrun95,
    "speedrun96": speedrun96,
    "speedrun96_proxy": speedrun96_proxy,
}
TYPE_NAMES = {int: "a whole number", bool: "true or false"}  # of the built-in models' options
# Keys rejected in model.options, since another setting controls them, or since they would change the number of input
# channels, the kind of output or the source of the weights.
RESERVED = {
    "name", "num_classes", "image_size", "mean", "std", "drop_rate", "activation", "pretrained", "finetune", "freeze",
    "in_chans", "features_only", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
}  # fmt: skip


def list_models() -> list[str]:
    """Return the sorted names of the built-in models."""
    return sorted(MODELS)


def build_model(
    name: str,
    num_classes: int,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_rate: float | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model with randomly initialized weights: images [B, 3, H, W] -> logits float [B, num_classes].

    Args:
        name: One of `list_models()`, or timm/NAME.
        num_classes: Number of logits.
        image_size: Height and width in pixels that the model must support. It is also passed to timm models that are
            built for a fixed size. If None, the size is not checked.
        mean, std: Three numbers each, for pixel values in 0..1. If they are given, the result is a `PixelClassifier`
            that takes uint8 pixels. Otherwise, it is the plain network, which takes normalized float images.
        drop_rate: Dropout probability, or None for the model's default.
        activation: A key of `models.layers.ACTIVATIONS`, or None for the model's default.
        kwargs: Further arguments of the model's constructor.

    Raises:
        UserError: The name is unknown, an argument is invalid, or the model does not support the size or an argument.
    """
    for argument, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{argument}={value} is not a positive whole number")
    if drop_rate is not None and not 0 <= drop_rate < 1:
        raise UserError(f"drop_rate={drop_rate} is not a probability from 0 up to, not including, 1")
    if (mean is None) != (std is None):
        raise UserError(f"mean={mean} and std={std} must be given together, or neither")

    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if name.startswith("timm/"):
        import timm

        plain = name.removeprefix("timm/")
        arguments = timm_arguments(
            plain, num_classes, kwargs, image_size=image_size, drop_rate=drop_rate, activation=activation
        )
        network: nn.Module = timm.create_model(plain, **arguments)
    else:
        network = _build_builtin_model(name, num_classes, image_size, drop_rate, activation, kwargs)
    return network if mean is None or std is None else PixelClassifier(Normalize(mean, std), network)


def build_from_config(
    config: ModelConfig, num_classes: int, *, image_size: int | None, mean: Sequence[float], std: Sequence[float]
) -> PixelClassifier:
    """Build the model described by config section `model`, with randomly initialized weights.

    See `build_model` for the arguments. The settings `pretrained`, `finetune` and `freeze` are ignored.

    Raises:
        UserError: `config.options` contains a key in RESERVED, or `build_model` rejects a setting.
    """
    model = build_model(
        config.name,
        num_classes,
        image_size=image_size,
        mean=mean,
        std=std,
        drop_rate=config.drop_rate,
        activation=config.activation,
        **model_options(config),
    )
    assert isinstance(model, PixelClassifier)
    return model


def model_options(config: ModelConfig) -> Options:
    """Return model.options without its null values, since null means the model's default.

    Raises:
        UserError: A key is in RESERVED.
    """
    for key in sorted(RESERVED & config.options.keys()):
        raise UserError(
            f"model.options={config.options} must not contain {key!r}, which is set elsewhere"
            + (f": use model.{key}" if key in ModelConfig.model_fields else "; leave it out")
        )
    return {key: value for key, value in config.options.items() if value is not None}


def _build_builtin_model(
    name: str,
    num_classes: int,
    image_size: int | None,
    drop_rate: float | None,
    activation: str | None,
    options: Options,
) -> nn.Module:
    """Build a built-in model. See `build_model` for the arguments and errors."""
    if name not in MODELS:
        raise UserError(
            f"model {name!r} is unknown; use one of {', '.join(list_models())}, or timm/NAME for timm's NAME"
        )
    constructor = MODELS[name]
    types = {name: one.annotation for name, one in inspect.signature(constructor, eval_str=True).parameters.items()}
    if drop_rate and "drop_rate" not in types:
        raise UserError(
            f"drop_rate={drop_rate} cannot be applied: model {name!r} has no dropout; leave it out or use 0"
        )
    if activation and "activation" not in types:
        raise UserError(
            f"activation={activation} cannot be applied: model {name!r} has a fixed activation; leave it out"
        )
    known = [option for option in types if option not in ("num_classes", "drop_rate", "activation")]
    for option, value in options.items():
        if option not in known:
            raise UserError(f"{option}={value!r} is not an option of model {name!r}; it has {known or 'none'}")
        if type(value) is not types[option]:
            raise UserError(
                f"{option}={value!r} has the wrong type for model {name!r}; use {TYPE_NAMES[types[option]]}"
            )
    settings = {"drop_rate": drop_rate, "activation": activation}
    given = {setting: value for setting, value in settings.items() if value is not None and setting in types}
    network = constructor(num_classes, **given, **options)
    if image_size is not None:
        check_image_size(name, image_size, image_size, network.min_image_size, network.max_image_size)
    return network
