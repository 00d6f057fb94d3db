"""Build models with pretrained weights, read either from the local cache of timm's weights or from a file.

Nothing is downloaded. Weights of timm models are first loaded by timm, which converts old names and resamples position
embeddings. After that, every tensor outside the head must match in name and shape, unless model.pretrained_partial is
set. timm itself is less strict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from configs.suggestions import format_value
from configs.utils.errors import UserError
from models.factory import build_from_config, model_options
from models.layers import PixelClassifier
from models.timm_models import timm_arguments
from models.weights import copy_weights, head_layers, read_weights
from models.weights_config import NAME, WeightsConfig, read_weights_config

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def build_pretrained(
    config: ModelConfig,
    num_classes: int,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
) -> tuple[PixelClassifier, str]:
    """Build a model like `models.build_from_config`, with the weights that `config.pretrained` selects.

    Args:
        config: Config section `model`. `pretrained` is True for published weights, or the path of a file.
        num_classes: Number of logits. The head is reinitialized if the weights have a different number of classes.
        image_size: Height and width in pixels.
        mean, std: Normalization of the data set. It is used only if neither the config.json beside the file nor timm
            specifies one.
        classes: Names of the classes, or None if unknown. The head is reinitialized if the config.json lists
            different names or a different order.

    Returns:
        The model, and a note for the log about the weights and the normalization.

    Raises:
        UserError: The weights are missing, invalid, or do not match the model; or the config.json is invalid; or
            `build_from_config` rejects a setting.
    """
    timm_name = config.name.removeprefix("timm/") if config.name.startswith("timm/") else None
    is_file = isinstance(config.pretrained, str)
    path = Path(config.pretrained) if isinstance(config.pretrained, str) else published_file(config.name)
    weights = read_weights(path)
    described = (read_weights_config(path) if is_file else None) or WeightsConfig(path.parent / NAME)
    by = "the data set's"
    if described.mean is not None and described.std is not None:
        mean, std, by = described.mean, described.std, f"as specified by {described.path}"
    elif timm_name is not None:
        published = published_config(timm_name)
        mean, std, by = list(published.mean), list(published.std), f"timm's for {timm_name}"
    if is_file and described.mean is None:
        by += f", since no {NAME} beside the file specifies others"
    model = build_from_config(config, num_classes, image_size=image_size, mean=mean, std=std)
    partial = config.pretrained_partial
    if timm_name is not None:
        try:
            weights = convert_with_timm(config, num_classes, image_size, weights, path, described.num_classes)
        except UserError:
            if not partial:  # else by the names in the file
                raise
    new_head = classes is not None and described.classes not in (None, list(classes))
    head = head_layers(model.network)
    result = copy_weights(model.network, weights, head, f"weights {path}", new_head=new_head, partial=partial)
    notes = [result.summary(path), f"images are normalised with mean {_numbers(mean)} and std {_numbers(std)}, {by}"]
    if described.image_size not in (None, image_size):
        notes.append(f"the weights were trained at {described.image_size} pixels, and images here have {image_size}")
    arguments = model_options(config) | ({} if config.activation is None else {"activation": config.activation})
    if described.arguments not in (None, arguments):
        notes.append(
            f"the weights were trained with the arguments {format_value(described.arguments)}, "
            f"and the model here has {arguments}"
        )
    return model, "; ".join(notes)


def _numbers(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


def published_config(name: str) -> PretrainedCfg:
    """Return timm's PretrainedCfg of a model, or an empty one if timm does not know the model.

    `name` has no timm/ prefix.

    Raises:
        UserError: The model is known, but the tag in `name` is not.
    """
    import timm

    try:
        return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        raise UserError(f"model 'timm/{name}' is not one of timm's: {str(error).rstrip('.')}") from None


def published_file(name: str) -> Path:
    """Return the path of a model's published weights on this machine. `name` has the form timm/NAME.

    Raises:
        UserError: The model has no published weights, its tag is unknown, or the weights are not on this machine.
    """
    if not name.startswith("timm/"):
        raise UserError(
            f"model.pretrained=true needs published weights, but model {name!r} has none; give the path of a "
            "weights file, or name a timm model"
        )
    from huggingface_hub import constants, try_to_load_from_cache

    plain = name.removeprefix("timm/")
    published = published_config(plain)
    if not published.has_weights:
        raise UserError(
            f"model.pretrained=true is not possible, since timm publishes no weights of {name}; "
            "give the path of a weights file"
        )
    folder = constants.HF_HUB_CACHE
    if published.hf_hub_id:
        repository, _, revision = published.hf_hub_id.partition("@")
        for file in [published.hf_hub_filename] if published.hf_hub_filename else HUB_FILES:
            found = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if published.url:
        address = published.url if isinstance(published.url, str) else published.url[0]
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(address).name)
        if cached.is_file():
            return cached
        if not published.hf_hub_id:
            folder = str(cached.parent)
    raise UserError(
        f"the published weights of {name} are not in {folder}, and training does not download them; run python -c "
        f"\"import timm; timm.create_model('{plain}', pretrained=True)\" once with network access, "
        "or give the path of a file in model.pretrained"
    )


def convert_with_timm(
    config: ModelConfig,
    num_classes: int,
    image_size: int,
    weights: dict[str, Tensor],
    path: Path,
    described_classes: int | None,
) -> dict[str, Tensor]:
    """Return the weights as timm loads them into a temporary model that `config` describes.

    The temporary model has as many classes as the weights, so all tensors must match. If the number of classes
    differed, timm would replace the head and silently skip other tensors that do not match.

    Args:
        config: Config section `model`.
        num_classes: Number of logits of the model that gets the weights.
        image_size: Height and width in pixels.
        weights: Tensors by name.
        path: Path of the weights file, for error messages.
        described_classes: Number of classes in the config.json beside the file, or None if unknown.

    Raises:
        UserError: The weights do not match the model, or `timm_arguments` rejects a setting.
    """
    import timm

    name = config.name.removeprefix("timm/")
    options = model_options(config)
    arguments = timm_arguments(name, num_classes, options, image_size=image_size, activation=config.activation)
    classes = num_classes_in(weights, published_config(name), described_classes)
    arguments |= {
        "num_classes": classes,
        "pretrained": True,
        "pretrained_cfg_overlay": {"state_dict": weights, "num_classes": classes},
    }
    try:
        with torch.random.fork_rng([]):  # must not change later random numbers
            converted: nn.Module = timm.create_model(name, **arguments)
    except Exception as error:  # timm's conversion of names raises many types of errors on unknown names
        reasons = [line.strip().rstrip(".") for line in str(error).splitlines()] or [type(error).__name__]
        reason = reasons[1] if len(reasons) > 1 else reasons[0]
        raise UserError(
            f"weights {path} do not fit model {config.name!r}: {reason[:300]}; take weights of the same architecture "
            "and options"
        ) from None
    return converted.state_dict()


def num_classes_in(weights: dict[str, Tensor], published: PretrainedCfg, described: int | None) -> int:
    """Return the number of classes that weights were trained on.

    `published` is timm's PretrainedCfg of the model. `described` is the number of classes in config.json, or None if
    unknown. If the weights do not include the head, the result is `described` or, if that is None,
    `published.num_classes`.
    """
    heads = published.classifier or ()
    for head in [heads] if isinstance(heads, str) else heads:
        if (weight := weights.get(f"{head}.weight")) is not None:
            # some weights start with an additional background class, which timm removes
            has_background = len(weight) == published.num_classes + (published.label_offset or 0)
            return published.num_classes if has_background else len(weight)
    return int(published.num_classes) if described is None else described
