"""Build models by name: a built-in model, timm/NAME for any timm model, or path/to/file.py:NAME for your own.

To add a built-in model, write it in a module of this folder, and add a line to MODELS. It is a class or function with
the argument num_classes. Its other arguments, with type annotations and defaults, are its options in configs. If it has
drop_rate or activation, model.drop_rate or model.activation set them. The attributes min_image_size and max_image_size
of the network are optional.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from configs.schema import ModelConfig
from configs.utils.code import FORMS, is_reference, source_file
from configs.utils.errors import UserError
from models.alexnet import AlexNet
from models.custom import build_custom_model
from models.layers import ACTIVATIONS, Normalize, PixelClassifier, check_image_size
from models.lenet import LeNet
from models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from models.speedrun import speedrun94, speedrun95, speedrun96, speedrun96_proxy
from models.timm_models import Options, timm_arguments

MODELS: dict[str, Callable[..., nn.Module]] = {
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
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}  # of models' options
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
        name: One of `list_models()`, timm/NAME, or a reference to the user's own code (see `configs.utils.code`).
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
    elif is_reference(name):
        settings = {"drop_rate": drop_rate, "activation": activation}
        network = build_custom_model(name, num_classes, kwargs, settings, image_size)
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
        raise unknown_model(name)
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
            raise UserError(
                f"{option}={value!r} is not an option of model {name!r}; it has {known or 'none'}; set "
                f"model.options.{option}=null, or leave it out"
            )
        if type(value) is not types[option] and not (types[option] is float and type(value) is int):
            raise UserError(
                f"{option}={value!r} has the wrong type for model {name!r}; use {TYPE_NAMES[types[option]]}"
            )
    settings = {"drop_rate": drop_rate, "activation": activation}
    given = {setting: value for setting, value in settings.items() if value is not None and setting in types}
    network = constructor(num_classes, **given, **options)
    if image_size is not None:
        smallest, largest = getattr(network, "min_image_size", 1), getattr(network, "max_image_size", None)
        check_image_size(name, image_size, image_size, smallest, largest)
    return network


def unknown_model(name: str) -> UserError:
    """Return the error for an unknown name of a model, with the nearest names and with all built-in names."""
    import timm

    plain = name.lower().replace("-", "").replace("_", "")
    close = [plain] if plain in MODELS else difflib.get_close_matches(plain, list_models(), n=2, cutoff=0.7)
    if timm.is_model(name.lower()) and plain not in close:
        close.insert(0, f"timm/{name.lower()}")
    module, _, attribute = name.rpartition(".")
    if not timm.is_model(name.lower()) and module and not name.endswith(".py") and source_file(f"{module}:{attribute}"):
        close = [f"{module}:{attribute}"]
    if name.endswith(".py"):
        close = [f"{name}:NAME, with the name of the class or function"]
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(
        f"model {name!r} is unknown; {guess}use one of {', '.join(list_models())}, timm/NAME for timm's NAME, or your "
        f"own code as {FORMS}"
    )
