"""Models of timm, tried on the meta device (shapes only, no memory) before the real one is built.

timm is imported inside the functions: it takes seconds, and the built-in models do without.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError

# Where the smallest size is looked for when image_size fails: every size up to 96, then every 16th.
SIZES_TRIED = (*range(1, 97), *range(112, 513, 16))


def build_timm_model(
    name: str, num_classes: int, *, image_size: int | None = None, drop_rate: float | None = None, **kwargs: Any
) -> nn.Module:
    """timm.create_model(name): images float [B, 3, H, W] -> logits [B, num_classes]; `UserError` as in `build_model`.

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
    problem = problem_of(build_shapes_only, name, arguments)
    if problem:
        raise UserError(
            f"model 'timm/{name}' cannot be built with {arguments}: {problem}; change or leave out that option"
        )
    if image_size is not None:
        if takes_img_size(name, arguments, image_size):
            arguments.setdefault("img_size", image_size)
        check_size(name, arguments, image_size)
    network: nn.Module = timm.create_model(name, **arguments)
    return network


def takes_img_size(name: str, arguments: dict[str, Any], image_size: int) -> bool:
    """Whether the constructor has an img_size; timm hides its constructors behind **kwargs, so one asks by trying."""
    problem = problem_of(build_shapes_only, name, {**arguments, "img_size": image_size})
    return problem is None or "unexpected keyword argument" not in problem


def check_size(name: str, arguments: dict[str, Any], image_size: int) -> None:
    """Raise a `UserError` that names the smallest size that works, unless one image of `image_size` passes."""
    import timm

    problem = problem_of(build_and_run, name, arguments, image_size)
    if problem is None:
        return
    config = timm.get_pretrained_cfg(name)
    made_for = config.input_size[-1] if config else 224
    if problem_of(build_and_run, name, {**arguments, "img_size": None}, made_for):
        return  # The model does not run on the meta device at all, which says nothing about the size.
    smallest = smallest_size(name, arguments) or made_for
    raise UserError(
        f"image_size {image_size}x{image_size} is not one that timm/{name} takes ({problem}): the smallest is "
        f"{smallest}, and it was made for {made_for}"
    )


def smallest_size(name: str, arguments: dict[str, Any]) -> int | None:
    """The first of SIZES_TRIED that works, trying them all in turn because what divides need not be monotonic."""
    if "img_size" in arguments:
        sized = ((size, {**arguments, "img_size": size}) for size in SIZES_TRIED)
        return next((size for size, these in sized if problem_of(build_and_run, name, these, size) is None), None)
    network = build_shapes_only(name, arguments)
    return next((size for size in SIZES_TRIED if problem_of(run_one_image, network, size) is None), None)


def build_shapes_only(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model on the meta device, for evaluation; downloads and loads nothing."""
    import timm

    options = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path")}
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, **options)
    return network.eval()


def run_one_image(network: nn.Module, image_size: int) -> Tensor:
    """One image of image_size x image_size through a network on the meta device."""
    with torch.device("meta"), torch.no_grad():
        logits: Tensor = network(torch.empty(1, 3, image_size, image_size))
    return logits


def build_and_run(name: str, arguments: dict[str, Any], image_size: int) -> Tensor:
    return run_one_image(build_shapes_only(name, arguments), image_size)


def problem_of(attempt: Callable[..., object], *arguments: object) -> str | None:
    """What `attempt` raised, in one line, or None. Catches all: timm and torch fail in every way on a bad size."""
    try:
        attempt(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return None
