"""Build timm models. Arguments are first tried on the meta device, where tensors have shapes but no data.

timm is imported inside functions, since the import takes seconds and built-in models do not need it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configs.utils.errors import UserError

# Sizes tried in search of the smallest supported one if image_size fails: every size up to 96, then every 16th.
CANDIDATE_SIZES = (*range(1, 97), *range(112, 513, 16))


Options = dict[str, Any]  # keyword arguments of a model's constructor


def timm_arguments(
    name: str,
    num_classes: int,
    options: Options,
    *,
    image_size: int | None = None,
    drop_rate: float | None = None,
    activation: str | None = None,
) -> Options:
    """Return the arguments for timm.create_model(name), after trying them on the meta device.

    Args:
        name: Name of the model without timm/.
        num_classes: Number of logits.
        options: Further arguments of the constructor.
        image_size: Height and width in pixels that the model must support. It is passed on as img_size if the
            constructor has such an argument (ViT, Swin and other models built for one size). If None, the size is not
            checked.
        drop_rate: Dropout probability, or None for the model's default.
        activation: A key of `models.layers.ACTIVATIONS`, or None for the model's default.

    Raises:
        UserError: The name is unknown, or the model does not support the size or an argument.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"close names: {', '.join('timm/' + match for match in close)}" if close else "see timm.list_models()"
        raise UserError(f"model 'timm/{name}' is unknown to timm {timm.__version__}; {hint}")
    arguments: Options = {"num_classes": num_classes, **options}
    if drop_rate is not None:
        arguments["drop_rate"] = drop_rate
    problem = caught_error(build_shapes_only, name, arguments)
    if problem:
        raise UserError(
            f"model 'timm/{name}' cannot be built with {arguments}: {problem}; change that option, or leave it "
            "out (model.options.NAME=null if the config contains it)"
        )
    if activation is not None:
        arguments["act_layer"] = find_act_layer(name, arguments, activation)
    if image_size is not None:
        if takes_img_size(name, arguments, image_size):
            arguments.setdefault("img_size", image_size)
        check_size(name, arguments, image_size, options)
    return arguments


def find_act_layer(name: str, arguments: Options, activation: str) -> str | type[nn.Module]:
    """Return the value of the argument act_layer: the activation's name, or its class if the name does not work.

    The name is preferred, since timm writes it to config.json.

    Raises:
        UserError: The model rejects or ignores both, or `arguments` already contains act_layer.
    """
    from timm.layers import get_act_layer

    if "act_layer" in arguments:
        raise UserError(
            f"activation={activation} and the option act_layer={arguments['act_layer']!r} are the same setting of "
            f"model 'timm/{name}'; leave out one"
        )
    layer: type[nn.Module] = get_act_layer(activation)

    def try_out(choice: str | type[nn.Module]) -> None:
        network = build_shapes_only(name, {**arguments, "act_layer": choice})
        if not any(isinstance(part, layer) for part in network.modules()):
            raise ValueError("it accepts an act_layer but does not use it")

    problem = caught_error(try_out, activation)
    if problem is None:
        return activation
    if caught_error(try_out, layer) is None:
        return layer
    raise UserError(f"activation={activation} cannot be applied to model 'timm/{name}': {problem}; leave it out")


def takes_img_size(name: str, arguments: Options, image_size: int) -> bool:
    """Return True if the constructor has an argument img_size.

    The constructor is called on the meta device to find out, since the signatures of timm's entry points accept any
    keyword argument.
    """
    problem = caught_error(build_shapes_only, name, {**arguments, "img_size": image_size})
    return problem is None or "unexpected keyword argument" not in problem


def check_size(name: str, arguments: Options, image_size: int, options: Options) -> None:
    """Check on the meta device that the model computes logits from an image of `image_size`.

    If the model fails at its default size too, and `options` are not the cause, the size is not checked.

    Args:
        name: Name of the model without timm/.
        arguments: Arguments for timm.create_model.
        image_size: Height and width in pixels.
        options: The arguments that the user chose. These, rather than the size, may cause the failure.

    Raises:
        UserError: The model does not support the size, or does not run with `options`.
    """
    import timm

    problem = caught_error(build_and_run, name, arguments, image_size)
    if problem is None:
        return
    config = timm.get_pretrained_cfg(name)
    default_size = config.input_size[-1] if config else 224
    if default_problem := caught_error(build_and_run, name, {**arguments, "img_size": None}, default_size):
        plain = {"num_classes": arguments["num_classes"]}
        if options and caught_error(build_and_run, name, plain, default_size) is None:
            raise UserError(f"model 'timm/{name}' does not run with {options}: {default_problem}; change those options")
        return  # the model does not run on the meta device at any size
    smallest = find_min_size(name, arguments) or default_size
    raise UserError(
        f"image_size {image_size}x{image_size} is not supported by timm/{name} ({problem}): the smallest is "
        f"{smallest}, and its default size is {default_size}"
    )


def find_min_size(name: str, arguments: Options) -> int | None:
    """Return the smallest of CANDIDATE_SIZES that works, or None if none does.

    The sizes are tried in ascending order rather than by bisection, since a size above a working one may fail.
    """
    if "img_size" in arguments:
        sized = ((size, {**arguments, "img_size": size}) for size in CANDIDATE_SIZES)
        return next((size for size, these in sized if caught_error(build_and_run, name, these, size) is None), None)
    network, classes = build_shapes_only(name, arguments), arguments["num_classes"]
    return next((size for size in CANDIDATE_SIZES if caught_error(run_one_image, network, size, classes) is None), None)


def build_shapes_only(name: str, arguments: Options) -> nn.Module:
    """Build the model on the meta device in evaluation mode, without downloading or loading weights."""
    import timm

    options = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path")}
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, **options)
    return network.eval()


def run_one_image(network: nn.Module, image_size: int, num_classes: int) -> None:
    """Run one image through a network on the meta device.

    Raises:
        ValueError: The output is not logits [1, num_classes].
    """
    with torch.device("meta"), torch.no_grad():
        logits = network(torch.empty(1, 3, image_size, image_size))
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"its output is {shape} instead of [1, {num_classes}]")


def build_and_run(name: str, arguments: Options, image_size: int) -> None:
    run_one_image(build_shapes_only(name, arguments), image_size, arguments["num_classes"])


def caught_error(attempt: Callable[..., object], *arguments: object) -> str | None:
    """Call `attempt` and return the first line of its error, or None if it succeeds."""
    try:
        attempt(*arguments)
    except Exception as error:  # bad sizes raise many types of errors in timm and torch
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return None
