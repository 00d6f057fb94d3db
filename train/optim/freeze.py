"""Freeze parameters, and keep the running statistics of frozen norm layers unchanged.

A parameter is frozen if requires_grad is False. No separate list of frozen parameters is kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from configs.utils.errors import UserError

PREFIX = "network."  # prefix of the names of parameters in `PixelClassifier.network`; optional in patterns


def freeze(model: nn.Module, patterns: Sequence[str]) -> str:
    """Freeze the parameters that match any of the patterns, and return a message for the log with their number.

    Call this function before building the optimizer and before wrapping the model in DDP.

    Raises:
        UserError: A pattern matches no parameter, or no parameter is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in parameters if _matches(name, pattern)}
        if not matching:
            raise UserError(
                f"model.freeze={list(patterns)}: {pattern!r} matches no parameter; {_hint(pattern, parameters)}"
            )
        frozen |= matching
    if patterns and not any(parameter.requires_grad for name, parameter in parameters.items() if name not in frozen):
        raise UserError(f"model.freeze={list(patterns)} leaves no parameter to train; leave out at least the head's")
    for name in frozen:
        parameters[name].requires_grad_(False)
    numbers = sum(parameters[name].numel() for name in frozen), sum(one.numel() for one in parameters.values())
    return f"frozen: {len(frozen)} of {len(parameters)} tensors, {numbers[0]:,} of {numbers[1]:,} parameters"


def _matches(name: str, pattern: str) -> bool:
    """Return True if the pattern matches the name. PREFIX is optional in both.

    PREFIX is removed before matching, so that [!f]* does not match network.fc.weight.
    """
    return fnmatchcase(name.removeprefix(PREFIX), pattern.removeprefix(PREFIX))


def _hint(pattern: str, names: Iterable[str]) -> str:
    """Suggest patterns or names that are close to a pattern without matches."""
    if any(_matches(name, f"{pattern}.*") for name in names):
        return f"did you mean {pattern}.*?"
    plain = [name.removeprefix(PREFIX) for name in names]
    close = difflib.get_close_matches(pattern.removeprefix(PREFIX), plain, n=3, cutoff=0.3)
    return f"close names: {', '.join(close)}" if close else f"there are {', '.join(plain[:3])} and so on"


def set_training_mode(model: nn.Module) -> None:
    """Call model.train(), but then switch each batch norm layer to evaluation mode if all its parameters are frozen.

    These layers use their running statistics and do not update them. Call this function instead of model.train().
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
