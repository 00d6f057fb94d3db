"""Collect the contents of a checkpoint, copy them to host memory, and check the entries of loaded checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast, get_origin, get_type_hints, is_typeddict

import torch

from configs.utils.errors import UserError
from train.checkpoint.format import FORMAT
from train.engine.state import TrainState

# Entries of a checkpoint. Files of older versions may lack some; `require_keys` reports those that are needed.
_Stream = TypedDict("_Stream", {"data set": str, "global batch": int, "data set in detail": dict[str, object]})


class StreamInfo(_Stream, total=False):
    """Facts about the data that a resumed run must share, see `compatibility.stream_info`."""

    order: str


Weights = dict[str, torch.Tensor]


class PositionEntry(TypedDict):
    """Epoch, and the number of optimizer steps done in it."""

    epoch: int
    step: int


class DatasetEntry(TypedDict):
    """The data set on which a model was trained. With it, the model can be used without its data set."""

    name: str
    classes: list[str]
    mean: list[float]
    std: list[float]
    image_shape: list[int] | None
    conversion: dict[str, Any] | None  # fields of pipelines.convert.Encoding, to store other images in the same way
    image_size: int


class CodeEntry(TypedDict):
    """A file of the user's own code."""

    file: str  # absolute path
    sha256: str


class ModelEntries(TypedDict, total=False):
    """The state of the model, optimizer and scaler of a run or of its proxy model."""

    model: Weights
    optimizer: dict[str, Any]
    scaler: dict[str, float]


class Checkpoint(ModelEntries, total=False):
    """The contents of a checkpoint file."""

    format: int
    lookahead: Weights  # slow weights; empty without Lookahead
    ema: Weights  # moving average; empty without one
    proxy: ModelEntries  # empty without a proxy
    sums: torch.Tensor
    threads: int
    compiled: bool  # whether the step was compiled on a CPU; missing in older checkpoints
    position: PositionEntry
    progress: dict[str, Any]  # see `progress.Progress`
    times: dict[str, float]  # see `train.engine.metrics.RunTimer`
    stream: StreamInfo
    config: str  # YAML
    dataset: DatasetEntry
    code: dict[str, CodeEntry]  # by the key of the setting that names it; missing without own code


ENTRY_TYPES = {
    name: dict if is_typeddict(kind) else get_origin(kind) or kind for name, kind in get_type_hints(Checkpoint).items()
}
TENSOR_ENTRIES = ("model", "lookahead", "ema")


def collect_state(state: TrainState, sums: torch.Tensor, /, **entries: object) -> Checkpoint:
    """Return the contents of a checkpoint.

    Tensors are shared with the live model and optimizer. Call `to_host` for a copy.

    Args:
        state: The training state.
        sums: The metric sums of the epoch so far, over all ranks.
        entries: Further entries. Their values must be tensors, numbers, strings, or containers of these.
    """
    checkpoint: Checkpoint = {
        "format": FORMAT,
        **_model_state(state),
        "sums": sums,
        "threads": torch.get_num_threads(),
        "compiled": state.device.type == "cpu" and state.plan.compile_mode != "off",
        "lookahead": state.lookahead.slow if state.lookahead is not None else {},
        "ema": state.ema.state() if state.ema is not None else {},
        "proxy": _model_state(state.proxy.state) if state.proxy is not None else {},
    }
    checkpoint.update(entries)  # type: ignore[typeddict-item]
    return checkpoint


def to_host(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint to host memory. Each GPU that holds some of its tensors is synchronized once.

    Raises:
        TypeError: The checkpoint contains a value of an unsupported type.
    """
    devices: set[torch.device] = set()
    copy = cast(Checkpoint, _copy(checkpoint, devices))
    for device in devices:
        torch.cuda.synchronize(device)
    return copy


def _copy(tree: object, devices: set[torch.device]) -> object:
    """Copy nested containers of tensors to host memory, without synchronizing.

    The GPUs that hold the tensors are added to `devices`. Synchronize them before reading the copies.

    Raises:
        TypeError: A container holds a value of an unsupported type.
    """
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach()
        if tensor.device.type == "cpu":
            return tensor.clone()  # keeps the strides
        devices.add(tensor.device)
        # Pinning memory is expensive, but torch caches pinned memory.
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    if isinstance(tree, OrderedDict):  # keep the `_metadata` of a state_dict: the submodule versions
        copy = OrderedDict((key, _copy(value, devices)) for key, value in tree.items())
        copy.__dict__.update({key: _copy(value, devices) for key, value in vars(tree).items()})
        return copy
    if isinstance(tree, dict):
        return {_copy(key, devices): _copy(value, devices) for key, value in tree.items()}
    if type(tree) is list or type(tree) is tuple:
        values = [_copy(value, devices) for value in tree]
        return values if type(tree) is list else tuple(values)
    if tree is not None and type(tree) not in (bool, int, float, str, torch.dtype):
        raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__}")
    return tree


def _model_state(state: TrainState) -> ModelEntries:
    return {
        "model": state.network.state_dict(),
        "optimizer": _portable(state.optimizer.state_dict()),
        "scaler": state.scaler.state_dict(),
    }


def _portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict without the settings for CUDA graphs, so that a run on a CPU can load it."""
    groups = [group | {"lr": float(group["lr"])} for group in state_dict["param_groups"]]
    for group in groups:
        if "capturable" in group:
            group["capturable"] = False
    return state_dict | {"param_groups": groups}


def invalid_entry(checkpoint: dict[str, Any]) -> str | None:
    """Return the name of the first entry that has a wrong type or an invalid value, or None if all are valid.

    Missing entries are valid.
    """
    for name, kind in ENTRY_TYPES.items():
        entry = checkpoint.get(name, kind())
        if not isinstance(entry, kind):
            return name
        if name in TENSOR_ENTRIES and not _are_tensors(entry):
            return name
    position = checkpoint.get("position", {"epoch": 0, "step": 0})
    if not all(type(position.get(key)) is int and position[key] >= 0 for key in ("epoch", "step")):
        return "position"
    if not all(type(time) in (int, float) for time in checkpoint.get("times", {}).values()):
        return "times"
    for entry in checkpoint.get("code", {}).values():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file", "sha256")):
            return "code"
    return None


def _are_tensors(entry: dict[object, object]) -> bool:
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in entry.items())


def require_keys(checkpoint: Mapping[str, object], names: Sequence[str], path: Path) -> None:
    """Raise UserError if any entry in `names` is missing, e.g. because another program or version wrote the file."""
    if missing := [name for name in names if name not in checkpoint]:
        raise UserError(
            f"checkpoint {path} has no {' and no '.join(missing)}, unlike those of train/ddp.py; give another one"
        )
