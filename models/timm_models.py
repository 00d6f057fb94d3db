"""Models of timm, tried on the meta device (shapes only, no memory) before the real one is built.

timm is imported inside the functions: it takes seconds, and the built-in models do without.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configs.utils.errors import UserError

# Where the smallest size is looked for when image_size fails: every size up to 96, then every 16th.
CANDIDATE_SIZES = (*range(1, 97), *range(112, 513, 16))


def build_timm_model(name: str, num_classes: int, **settings: Any) -> nn.Module:
    """timm.create_model(name): images float [B, 3, H, W] -> logits [B, num_classes]; settings of `timm_arguments`."""
    import timm

    network: nn.Module = timm.create_model(name, **timm_arguments(name, num_classes, **settings))
    return network


def timm_arguments(
    name: str,
    num_classes: int,
    *,
    image_size: int | None = None,
    drop_rate: float | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What timm.create_model(name) is to be given, found out by trying; `UserError` as in `models.build_model`.

    Where timm's constructor has an img_size (ViT, Swin and others, which are built for one size), it gets `image_size`.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"close names: {', '.join('timm/' + match for match in close)}" if close else "see timm.list_models()"
        raise UserError(f"model 'timm/{name}' is unknown to timm {timm.__version__}; {hint}")
    arguments: dict[str, Any] = {"num_classes": num_classes, **kwargs}
    if drop_rate is not None:
        arguments["drop_rate"] = drop_rate
    problem = caught_error(build_shapes_only, name, arguments)
    if problem:
        raise UserError(
            f"model 'timm/{name}' cannot be built with {arguments}: {problem}; change or leave out that option"
        )
    if activation is not None:
        arguments["act_layer"] = find_act_layer(name, arguments, activation)
    if image_size is not None:
        if takes_img_size(name, arguments, image_size):
            arguments.setdefault("img_size", image_size)
        check_size(name, arguments, image_size, kwargs)
    return arguments


def find_act_layer(name: str, arguments: dict[str, Any], activation: str) -> str | type[nn.Module]:
    """The act_layer that stands for this activation: its name, or its class where the model does not look names up.

    The name is tried first, since timm writes it into config.json. Raises `UserError` where the model takes neither, or
    takes it and does not use it.
    """
    from timm.layers import get_act_layer

    if "act_layer" in arguments:
        raise UserError(
            f"activation={activation} and the option act_layer={arguments['act_layer']!r} say the same of model "
            f"'timm/{name}'; leave out one"
        )
    layer: type[nn.Module] = get_act_layer(activation)

    def try_out(choice: str | type[nn.Module]) -> None:
        network = build_shapes_only(name, {**arguments, "act_layer": choice})
        if not any(isinstance(part, layer) for part in network.modules()):
            raise ValueError("it does not use the act_layer that it takes")

    problem = caught_error(try_out, activation)
    if problem is None:
        return activation
    if caught_error(try_out, layer) is None:
        return layer
    raise UserError(f"activation={activation} cannot be applied to model 'timm/{name}': {problem}; leave it out")


def takes_img_size(name: str, arguments: dict[str, Any], image_size: int) -> bool:
    """Whether the constructor has an img_size; timm hides its constructors behind **kwargs, so one asks by trying."""
    problem = caught_error(build_shapes_only, name, {**arguments, "img_size": image_size})
    return problem is None or "unexpected keyword argument" not in problem


def check_size(name: str, arguments: dict[str, Any], image_size: int, options: dict[str, Any]) -> None:
    """Raise a `UserError` that names the smallest size that works, unless one image of `image_size` passes.

    options: those of `arguments` that may be what does not work, instead of the size.
    """
    import timm

    problem = caught_error(build_and_run, name, arguments, image_size)
    if problem is None:
        return
    config = timm.get_pretrained_cfg(name)
    made_for = config.input_size[-1] if config else 224
    if at_its_own := caught_error(build_and_run, name, {**arguments, "img_size": None}, made_for):
        plain = {"num_classes": arguments["num_classes"]}
        if options and caught_error(build_and_run, name, plain, made_for) is None:
            raise UserError(f"model 'timm/{name}' does not run with {options}: {at_its_own}; change those options")
        return  # The model does not run on the meta device at all, which says nothing about the size.
    smallest = find_min_size(name, arguments) or made_for
    raise UserError(
        f"image_size {image_size}x{image_size} is not one that timm/{name} takes ({problem}): the smallest is "
        f"{smallest}, and it was made for {made_for}"
    )


def find_min_size(name: str, arguments: dict[str, Any]) -> int | None:
    """The first of SIZES_TRIED that works, trying them all in turn because what divides need not be monotonic."""
    if "img_size" in arguments:
        sized = ((size, {**arguments, "img_size": size}) for size in CANDIDATE_SIZES)
        return next((size for size, these in sized if caught_error(build_and_run, name, these, size) is None), None)
    network, classes = build_shapes_only(name, arguments), arguments["num_classes"]
    return next((size for size in CANDIDATE_SIZES if caught_error(run_one_image, network, size, classes) is None), None)


def build_shapes_only(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model on the meta device, for evaluation; downloads and loads nothing."""
    import timm

    options = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path")}
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, **options)
    return network.eval()


def run_one_image(network: nn.Module, image_size: int, num_classes: int) -> None:
    """One image of image_size x image_size through a network on the meta device; ValueError unless logits come out."""
    with torch.device("meta"), torch.no_grad():
        logits = network(torch.empty(1, 3, image_size, image_size))
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"its result is {shape} and not [1, {num_classes}]")


def build_and_run(name: str, arguments: dict[str, Any], image_size: int) -> None:
    run_one_image(build_shapes_only(name, arguments), image_size, arguments["num_classes"])


def caught_error(attempt: Callable[..., object], *arguments: object) -> str | None:
    """What `attempt` raised, in one line, or None. Catches all: timm and torch fail in every way on a bad size."""
    try:
        attempt(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return None
