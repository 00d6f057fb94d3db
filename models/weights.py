"""Load weights from files and copy them into networks.

Names and shapes must match, except in the head layers passed to `copy_weights`.
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

# Keys under which other programs store the state dict, in order of precedence.
NESTED_UNDER = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of names added by DDP and torch.compile
MAX_NAMES_SHOWN = 3  # names of tensors in an error message, for each kind of problem
_PARTIAL = ", or load only the {} of {} tensors that fit with model.pretrained_partial=true"
_RENAMED = " (all shapes agree in order, so perhaps only names differ; docs/recipes.md shows how to rename them)"
_MARK = object()


class SkippedObject:
    """Placeholder for a NumPy object in a torch file. The object itself is not loaded."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class SkippedDict:
    """Placeholder for any other object that torch does not load safely: an OrderedDict with the key `_MARK`.

    Calling the class returns a plain OrderedDict, since torch's unpickler does not set items of OrderedDict subclasses.
    """

    def __new__(cls, *_: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict({_MARK: None})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a file written by torch.save, without executing code in it.

    If a torch file contains the state dict under a key in NESTED_UNDER, its other values, such as the settings of a
    run, are skipped. The prefixes that DDP and torch.compile add to names are removed.

    Raises:
        UserError: The file cannot be read, is a checkpoint of this program, or does not contain tensors by name.
    """
    if path.exists() and not path.is_file():  # reading a pipe could block
        raise UserError(f"weights {path} are not a plain file; give the path of a .safetensors, .pth or .bin file")
    try:
        if path.suffix == ".safetensors":
            return {_strip_wrappers(name): value for name, value in load_file(path).items()}
        content = _load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist; give the path of a .safetensors, .pth or .bin file") from None
    except pickle.UnpicklingError:
        raise _refused(path, "contains more than tensors, numbers and strings, or is not torch's") from None
    except Exception as error:  # both readers raise many types of errors on arbitrary bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"weights {path} cannot be read ({reason}); give a .safetensors, .pth or .bin file") from None
    if isinstance(content, dict) and {"format", "stream"} <= content.keys():
        raise UserError(f"weights {path} are a checkpoint of this program; name it in model.finetune instead")
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED_UNDER if isinstance(content.get(key), Mapping)), content)
    if _is_skipped(content) or (isinstance(content, dict) and any(map(_is_skipped, content.values()))):
        raise _refused(path, "contains pickled objects instead of or beside a state dict")
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"weights {path} are not tensors by name; give the file of a state dict, or of a dictionary with a "
            f"state dict as {', '.join(NESTED_UNDER)}"
        )
    return {_strip_wrappers(str(name)): value for name, value in content.items()}


def _load_tensors(path: Path) -> object:
    """Read a torch file, with a placeholder for each object that torch does not load safely."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        placeholders = [(SkippedObject if name.startswith("numpy.") else SkippedDict, name) for name in names]
        with torch.serialization.safe_globals([*placeholders]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _is_skipped(value: object) -> bool:
    return isinstance(value, SkippedObject) or (isinstance(value, OrderedDict) and _MARK in value)


def _refused(path: Path, reason: str) -> UserError:
    return UserError(
        f"weights {path} are refused, since the file {reason}; save only the state dict where the file was made "
        "(torch.save(model.state_dict(), FILE)), or convert it to .safetensors where you trust it"
    )


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def head_layers(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the final classifier layers. Most models have one, and a few timm models have two."""
    of_timm: Any = next((module for module in network.modules() if hasattr(module, "get_classifier")), None)
    if of_timm is None:
        return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear))[-1:]
    heads = of_timm.get_classifier()
    heads = list(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


@dataclass(frozen=True)
class LoadResult:
    """Result of copying weights into a network."""

    num_loaded: int
    reinitialized: tuple[str, ...]  # tensors of the head that keep their initial values
    misfits: dict[str, list[str]]  # tensors outside of the head that do not fit, by the kind of the problem

    def summary(self, source: object) -> str:
        new = f"; new: {', '.join(self.reinitialized)}" if self.reinitialized else ""
        others = "".join(f"; {kind}: {', '.join(names)}" for kind, names in self.misfits.items() if names)
        return f"loaded {self.num_loaded} tensors from {source}{new}{others}"


def copy_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    head: tuple[str, ...],
    source: str,
    *,
    new_head: bool = False,
    partial: bool | None = None,
) -> LoadResult:
    """Copy weights into a network. Head tensors that are missing or have a different shape keep their initial values.

    Args:
        network: The network. It is unchanged if an error is raised.
        weights: Tensors by name.
        head: Names of the head layers.
        source: Description of the weights, for error messages.
        new_head: Whether the head keeps its initial values even if the shapes match.
        partial: The value of model.pretrained_partial: whether other tensors that do not fit keep their initial values
            too, as long as some fit. If None, they must fit, and errors do not mention the setting.

    Raises:
        UserError: Tensors outside the head are missing, unexpected or of the wrong shape. The message names them.
    """
    own, head_prefixes = network.state_dict(), tuple(f"{layer}." for layer in head)
    fitting: dict[str, Tensor] = {}
    misfits: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": []}
    reinitialized: list[str] = []
    for name, tensor in own.items():
        weight, in_head = weights.get(name), name.startswith(head_prefixes)
        if weight is not None and weight.shape == tensor.shape and not (new_head and in_head):
            fitting[name] = weight
        elif in_head:
            reinitialized.append(name)
        elif weight is None:
            misfits["missing"].append(name)
        else:
            misfits["of another shape"].append(f"{name} is {list(weight.shape)} there and {list(tensor.shape)} here")
    misfits["unexpected"] = [name for name in weights if name not in own and not name.startswith(head_prefixes)]
    if any(misfits.values()) and not (partial and fitting):
        advice = "" if partial is None or not fitting else _PARTIAL.format(len(fitting), len(own))
        if misfits["missing"] and [one.shape for one in weights.values()] == [one.shape for one in own.values()]:
            advice = _RENAMED
        head_may = ", of which only the head may differ" if head else ""
        problems = "; ".join(f"{kind}: {_some(names)}" for kind, names in misfits.items() if names)
        raise UserError(
            f"{source} do not fit the model{head_may}: {problems}; take weights of the same architecture and options"
            f"{advice}"
        )
    network.load_state_dict(fitting, strict=False)
    return LoadResult(len(fitting), tuple(reinitialized), misfits)


def _some(names: list[str]) -> str:
    """Join the first MAX_NAMES_SHOWN names, and add how many more there are."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"
