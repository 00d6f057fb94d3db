"""Build networks from a class or function in the user's own code, named as path/to/file.py:NAME or module:NAME."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from configs.utils.code import describe_error, load_object
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from models.timm_models import CANDIDATE_SIZES, Options, caught_error, run_one_image


def build_custom_model(
    reference: str, num_classes: int, options: Options, settings: Mapping[str, object], image_size: int | None
) -> nn.Module:
    """Call the user's class or function, and run the network once if the image size is known.

    The run, on black images in evaluation mode, also initializes torch's lazy layers.

    Args:
        reference: What to call, see `configs.utils.code`.
        num_classes: Number of logits, passed as the argument num_classes.
        options: Further arguments.
        settings: Arguments from other settings (drop_rate, activation), of which those that are not None are passed.
        image_size: Height and width in pixels that the network must support, or None if unknown.

    Raises:
        UserError: The code cannot be imported, the call fails or does not accept the arguments, or the network does
            not compute logits [B, num_classes] from images of this size.
    """
    constructor = load_object(reference, "model.name")
    given = {name: value for name, value in settings.items() if value is not None}
    arguments: Options = {"num_classes": num_classes, **given, **options}
    _check_arguments(reference, constructor, arguments, given)
    try:
        network = constructor(**arguments)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"model {reference!r} cannot be built with {arguments}: {describe_error(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model {reference!r} is a {type(network).__name__}, but must be a torch.nn.Module")
    if image_size is not None:
        _check_run(reference, network, num_classes, image_size)
    return network


def _check_arguments(
    reference: str, constructor: Callable[..., object], arguments: Options, given: Mapping[str, object]
) -> None:
    """Raise UserError if the constructor does not have one of the arguments."""
    try:
        known = inspect.signature(constructor).parameters
    except ValueError:  # a function of a C extension
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in arguments.keys() - known.keys():
        key = f"model.{name}" if name in given else f"model.options {name!r}"
        advice = f"leave out {key} or add the argument"
        if name == "num_classes":
            advice = "it is called with num_classes=N and model.options, so add that argument"
        raise UserError(f"model {reference!r} has no argument {name!r}, only {', '.join(known) or 'none'}; {advice}")


def _check_run(reference: str, network: nn.Module, num_classes: int, image_size: int) -> None:
    """Run the network on two black images, and check its output. See `build_custom_model` for the errors."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    was_training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            logits = network(torch.zeros(2, 3, image_size, image_size, device=device))
    except Exception as error:
        sizes = _supported_sizes(network, num_classes)
        if sizes and image_size not in sizes:
            nearest = min(sizes, key=lambda size: abs(size - image_size))
            repair, works = "", f"at least {sizes[0]}"
            if sizes[-1] < CANDIDATE_SIZES[-1]:  # as with a linear layer of a fixed size after a flatten
                repair = "fix the layer in that line, or "
                works = f"only {sizes[0]}" if len(sizes) == 1 else f"from {sizes[0]} to {sizes[-1]}"
            raise UserError(
                f"image_size {image_size}x{image_size} is not supported by model {reference!r} "
                f"({describe_error(error)}); {repair}set data.image_size={nearest} (sizes that work: {works})"
            ) from error
        raise UserError(
            f"model {reference!r} fails on images [2, 3, {image_size}, {image_size}]: {describe_error(error)}"
        ) from error
    for module in was_training:
        module.training = True
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes) or not logits.is_floating_point():
        found = f"{list(logits.shape)} of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"model {reference!r} returns {found} for 2 images, but must return logits, float [2, {num_classes}]: one "
            "number per class, with as many classes as its argument num_classes says, and without a softmax"
        )
    if num_classes > 1 and not logits.is_meta and _are_probabilities(logits):
        warn(
            f"model {reference!r} returns probabilities; return logits without softmax, since the loss applies it, and "
            "training learns slowly otherwise"
        )


def _are_probabilities(logits: Tensor) -> bool:
    sums = logits.float().sum(1)
    return bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _supported_sizes(network: nn.Module, num_classes: int) -> list[int]:
    """Return the CANDIDATE_SIZES at which a copy of the network runs on the meta device."""
    try:
        shapes = copy.deepcopy(network).to("meta")
    except Exception:  # such as lazy layers
        return []
    return [size for size in CANDIDATE_SIZES if caught_error(run_one_image, shapes, size, num_classes) is None]
