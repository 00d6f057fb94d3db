"""What a checkpoint holds: a tree of tensors, numbers and strings; its copy in host memory; whether it is all there.

Knows no file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import UserError
from train.checkpoint.format import FORMAT
from train.engine.epoch import TrainState

ENTRY_TYPES: dict[str, type] = {
    "model": dict, "optimizer": dict, "scaler": dict, "lookahead": dict, "ema": dict, "proxy": dict,
    "sums": torch.Tensor, "position": dict, "progress": dict, "times": dict, "stream": dict, "config": str,
    "dataset": dict, "threads": int,
}  # fmt: skip
TENSOR_ENTRIES = ("model", "lookahead", "ema")


def collect_state(training: TrainState, sums: torch.Tensor, **state: Any) -> dict[str, Any]:
    """Weights, optimizer, `sums` over all ranks and `state`: tensors, numbers, strings and containers of them.

    The tensors are those that training goes on with.
    """
    return {
        "format": FORMAT,
        **_state_of(training),
        "sums": sums,
        "threads": torch.get_num_threads(),
        "lookahead": training.lookahead.slow if training.lookahead is not None else {},
        "ema": training.ema.state() if training.ema is not None else {},
        "proxy": _state_of(training.proxy.state) if training.proxy is not None else {},
        **state,
    }


def to_host(content: dict[str, Any]) -> dict[str, Any]:
    """Copy a tree of tensors to host memory, which training does not change; waits once for each device copied from.

    Raises TypeError for what a checkpoint cannot hold.
    """
    devices: set[torch.device] = set()
    copied: dict[str, Any] = _copied(content, devices)
    for device in devices:
        torch.cuda.synchronize(device)
    return copied


def _copied(tree: Any, devices: set[torch.device]) -> Any:
    """Copy without waiting; adds the GPUs that copies were started from to `devices`."""
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach()
        if tensor.device.type == "cpu":
            return tensor.clone()  # strides stay
        devices.add(tensor.device)
        # torch keeps pinned memory for the next time: it is dear to get
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    if isinstance(tree, OrderedDict):  # the state of a module, which holds the versions of its parts as an attribute
        copied = OrderedDict((key, _copied(value, devices)) for key, value in tree.items())
        copied.__dict__.update({key: _copied(value, devices) for key, value in vars(tree).items()})
        return copied
    if isinstance(tree, dict):
        return {_copied(key, devices): _copied(value, devices) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([_copied(value, devices) for value in tree])
    if tree is not None and type(tree) not in (bool, int, float, str, torch.dtype):
        raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__}")
    return tree


def _state_of(training: TrainState) -> dict[str, Any]:
    """What the training holds, or its proxy's training does: `_restore_one` puts it back."""
    return {
        "model": training.network.state_dict(),
        "optimizer": _portable(training.optimizer.state_dict()),
        "scaler": training.scaler.state_dict(),
    }


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state as a run without CUDA graphs has it, so that one made on a GPU goes on on a CPU."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    for group in groups:
        if "capturable" in group:
            group["capturable"] = False
    return state | {"param_groups": groups}


def invalid_entry(content: dict[str, Any]) -> str | None:
    """The first part whose form is another, among those that are there."""
    for name, kind in ENTRY_TYPES.items():
        part = content.get(name, kind())
        if not isinstance(part, kind):
            return name
        if name in TENSOR_ENTRIES and not _are_tensors(part):
            return name
    position = content.get("position", {"epoch": 0, "step": 0})
    if not all(type(position.get(key)) is int and position[key] >= 0 for key in ("epoch", "step")):
        return "position"
    if not all(type(time) in (int, float) for time in content.get("times", {}).values()):
        return "times"
    return None


def _are_tensors(part: Any) -> bool:
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in part.items())


def require_keys(content: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """Refuse a checkpoint without these of its parts, as another program or version may write it."""
    if missing := [name for name in names if name not in content]:
        raise UserError(f"checkpoint {path} holds no {' and no '.join(missing)}, as those of train/ddp.py do; "
                        "take another one")  # fmt: skip
