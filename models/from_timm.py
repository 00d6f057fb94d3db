"""Models of timm, checked on the meta device (shapes only, no memory) before the real one is built.

timm is imported inside the functions: it takes seconds, and the built-in models do without.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from configs.errors import UserError

# Every size up to 96, then every 16th: what a too small or indivisible image_size is searched in for the message.
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
        raise UserError(
            f"model 'timm/{name}' is unknown to timm {timm.__version__}; "
            + (f"close names: {', '.join('timm/' + match for match in close)}" if close else "see timm.list_models()")
        )
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop_rate, **kwargs}
    if image_size is not None and "img_size" not in arguments and takes(name, arguments, "img_size", image_size):
        arguments["img_size"] = image_size
    if drop_rate == 0 and not takes(name, arguments, "drop_rate", 0.0):
        del arguments["drop_rate"]
    problem = problem_with(name, arguments)
    if problem:
        raise UserError(f"model 'timm/{name}' cannot be built with {arguments} ({problem}); leave out what it lacks")
    if image_size is not None:
        check_size(name, arguments, image_size)
    network: nn.Module = timm.create_model(name, **arguments)
    return network


def takes(name: str, arguments: dict[str, Any], argument: str, value: Any) -> bool:
    """Whether the constructor knows `argument`. timm's constructors are hidden behind **kwargs, so one asks by trying."""
    problem = problem_with(name, {**arguments, argument: value})
    return problem is None or f"unexpected keyword argument '{argument}'" not in problem


def check_size(name: str, arguments: dict[str, Any], image_size: int) -> None:
    """Raise a `UserError` with the smallest size that works, unless one image of `image_size` passes."""
    import timm

    problem = problem_with(name, arguments, image_size)
    if problem is None:
        return
    config = timm.get_pretrained_cfg(name)
    default_size = config.input_size[-1] if config else 224
    if problem_with(name, {**arguments, "img_size": None}, default_size):
        return  # This model cannot run on the meta device at all, which says nothing about the size.
    for smallest in SIZES_TRIED:
        sized = {**arguments, "img_size": smallest} if "img_size" in arguments else arguments
        if problem_with(name, sized, smallest) is None:
            break
    else:
        smallest = default_size
    raise UserError(
        f"image_size {image_size}x{image_size} is not one that timm/{name} takes ({problem}): the smallest is "
        f"{smallest}, and it was made for {default_size}"
    )


def problem_with(name: str, arguments: dict[str, Any], image_size: int | None = None) -> str | None:
    """What goes wrong when the model is built and, where a size is given, runs one such image; None if nothing does."""
    import timm

    shapes_only = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path")}
    try:
        with torch.device("meta"), torch.no_grad():
            network = timm.create_model(name, **shapes_only).eval()
            if image_size is not None:
                network(torch.empty(1, 3, image_size, image_size))
    # timm and torch raise AssertionError, TypeError, RuntimeError, ZeroDivisionError and others for a bad size.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
