"""Weights from files into networks: what fits is taken, a head may start anew, and anything else is an error.

Knows neither configs nor this project's checkpoints, beyond telling that a file is one.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.utils.errors import UserError

# Where files of other programs hold the weights, in this order.
NESTED_UNDER = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put in front of names
MAX_NAMES_SHOWN = 3  # of what does not fit, of each kind
_MARK = object()


class SkippedObject:
    """Stand for a class or function of NumPy that is not loaded."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class SkippedDict:
    """Stand for any other class or function that is not loaded: calling it gives a dictionary marked by `_MARK`.

    Of exactly this type, since torch lets a pickle put items into no subclass of it.
    """

    def __new__(cls, *_: Any) -> OrderedDict[object, Any]:  # type: ignore[misc]
        return OrderedDict({_MARK: None})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors by name in a file of safetensors, or in one that torch.save wrote; no code in it is run.

    Other objects in a file of torch.save, such as the settings of a run, are passed over.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"weights {path} are no plain file; give the path of a .safetensors, .pth or .bin file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content: Any = _load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist; give the path of a .safetensors, .pth or .bin file") from None
    except pickle.UnpicklingError:
        raise _refused(path, "holds more than tensors, numbers and strings, or is none of torch's") from None
    except Exception as error:  # bytes of another program make both readers fail in every way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"weights {path} cannot be read ({reason}); give a .safetensors, .pth or .bin file") from None
    if isinstance(content, dict) and {"format", "stream"} <= content.keys():
        raise UserError(f"weights {path} are a checkpoint of this program; name it in model.finetune instead")
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED_UNDER if isinstance(content.get(key), Mapping)), content)
    if _is_skipped(content) or (isinstance(content, dict) and any(map(_is_skipped, content.values()))):
        raise _refused(path, "holds objects of classes in the place of a state dict, or beside it")
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"weights {path} are no tensors by name; give the file of a state dict, or a dictionary that holds one as "
            f"{', '.join(NESTED_UNDER)}"
        )
    return {_plain(str(name)): value for name, value in content.items()}


def _load_tensors(path: Path) -> Any:
    """Read a file of torch.save, with an empty object in the place of each that is more than data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(SkippedObject if name.startswith("numpy.") else SkippedDict, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


def _is_skipped(value: Any) -> bool:
    return isinstance(value, SkippedObject) or (isinstance(value, OrderedDict) and _MARK in value)


def _refused(path: Path, reason: str) -> UserError:
    return UserError(
        f"weights {path} are refused, since the file {reason}; save the state dict alone where the file was made "
        "(torch.save(model.state_dict(), FILE)), or convert it to .safetensors where you trust it"
    )


def _plain(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def head_layers(network: nn.Module) -> tuple[str, ...]:
    """The names of the last classifier layers: one, but for a few models of timm that have two."""
    of_timm: Any = next((module for module in network.modules() if hasattr(module, "get_classifier")), None)
    if of_timm is None:
        return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear))[-1:]
    heads = of_timm.get_classifier()
    heads = list(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


@dataclass(frozen=True)
class LoadResult:
    """What became of a network's tensors."""

    num_loaded: int
    reinitialized: tuple[str, ...]  # names of those that stay as they were drawn

    def summary(self, source: object) -> str:
        new = f"; new: {', '.join(self.reinitialized)}" if self.reinitialized else ""
        return f"took {self.num_loaded} tensors of {source}{new}"


def copy_weights(
    network: nn.Module, weights: Mapping[str, Tensor], head: tuple[str, ...], source: str, *, new_head: bool = False
) -> LoadResult:
    """Copy `weights` into the network, whose layers `head` may differ and then stay as they are.

    source: what they are, for the error. new_head: leave the head as it is even where the shapes agree. Raises
    UserError that names the keys that are missing, unexpected, or of another shape; the network is unchanged then.
    """
    here = network.state_dict()

    def in_head(name: str) -> bool:
        return any(name.startswith(f"{layer}.") for layer in head)

    fitting: dict[str, Tensor] = {}
    anew: list[str] = []
    missing: list[str] = []
    shapes: list[str] = []
    for name, tensor in here.items():
        theirs = weights.get(name)
        if theirs is not None and theirs.shape == tensor.shape and not (new_head and in_head(name)):
            fitting[name] = theirs
        elif in_head(name):
            anew.append(name)
        elif theirs is None:
            missing.append(name)
        else:
            shapes.append(f"{name} is {list(theirs.shape)} there and {list(tensor.shape)} here")
    unexpected = [name for name in weights if name not in here and not in_head(name)]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if problems := [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]:
        advice = ""
        if missing and [one.shape for one in weights.values()] == [one.shape for one in here.values()]:
            advice = " (all shapes agree in their order: perhaps only names differ, and docs/recipes.md renames them)"
        head_may = ", of which only the head may differ" if head else ""
        raise UserError(
            f"{source} do not fit the model{head_may}: {'; '.join(problems)}; take weights of the same architecture "
            f"and options{advice}"
        )
    network.load_state_dict(fitting, strict=False)
    return LoadResult(len(fitting), tuple(anew))


def _some(names: list[str]) -> str:
    """Return the first ones, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"
