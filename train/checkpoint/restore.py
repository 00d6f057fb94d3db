"""Load a checkpoint's weights and training state into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import UserError
from train.checkpoint.state import require_keys
from train.engine import cpu_threads
from train.engine.epoch import TrainState, train_step

DEVICE_FIELDS = ("lr", "capturable")  # fields of the optimizer's groups that depend on the device, not on the run


def restore_weights(training: TrainState, content: dict[str, Any], path: Path, weights: str = "raw") -> bool:
    """Load the model's weights alone; weights: which, as eval.weights says. Returns whether it is the average."""
    average: dict[str, Any] = content.get("ema") or {}  # missing in checkpoints of older versions
    if weights == "ema" and not average:
        raise UserError(f"checkpoint {path} holds no moving average of the weights; use eval.weights=auto or raw")
    is_average = bool(average) and weights != "raw"
    if training.device.type == "cpu":
        cpu_threads.restore_threads(content.get("threads", 0))  # missing in checkpoints of older versions
    try:
        training.network.load_state_dict(average if is_average else content["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"checkpoint {path} does not fit the model of this config: {first}") from None
    return is_average


def restore_state(training: TrainState, content: dict[str, Any], path: Path) -> None:
    """Load all that a step changes."""
    require_keys(content, ("model", "optimizer", "scaler", "sums"), path)
    _restore_one(training, content, path)
    _check_like("sums", {"": content["sums"]}, {"": training.sums}, path)
    training.sums.copy_(content["sums"])
    if training.lookahead is not None:
        slow = content.get("lookahead", {})
        _check_like("lookahead", slow, training.lookahead.slow, path)
        for name, ours in training.lookahead.slow.items():
            ours.copy_(slow[name])
    if training.ema is not None:
        average = content.get("ema", {})
        _check_like("ema", average, training.ema.state(), path)
        training.ema.restore(average)
    if training.proxy is not None:
        require_keys(content.get("proxy", {}), ("model", "optimizer", "scaler"), path)
        _restore_one(training.proxy.state, content["proxy"], path)


def _check_like(part: str, theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors of other names or shapes."""
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in (ours, theirs)]
    if different := [name for name in {**ours, **theirs} if shapes[0].get(name) != shapes[1].get(name)]:
        raise UserError(f"checkpoint {path} does not fit this config in its {part} {different[0]}".rstrip()
                        + "; start a new run without --resume")  # fmt: skip


def _is_other(value: Any, parameter: torch.Tensor) -> bool:
    """Whether it is a tensor that cannot belong to these weights."""
    return isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != parameter.shape


def _is_of_timm(optimizer: torch.optim.Optimizer) -> bool:
    """Those may hold state of other shapes than the weights'."""
    return type(optimizer).__module__.startswith("timm.")


def _restore_one(training: TrainState, content: dict[str, Any], path: Path) -> None:
    restore_weights(training, content, path)
    optimizer = training.optimizer
    here = [{key: group[key] for key in DEVICE_FIELDS if key in group} for group in optimizer.param_groups]
    saved = content["optimizer"]
    try:
        rates = [float(group["lr"]) for group in saved["param_groups"]]
        # before as well, since it decides on which device torch puts the count of steps
        groups = [group | one for group, one in zip(saved["param_groups"], here, strict=False)]
        optimizer.load_state_dict(saved | {"param_groups": groups + saved["param_groups"][len(groups) :]})
        for parameter, state in optimizer.state.items() if not _is_of_timm(optimizer) else ():
            if wrong := [name for name, value in state.items() if _is_other(value, parameter)]:
                raise ValueError(f"{wrong[0]} of {list(state[wrong[0]].shape)} for {list(parameter.shape)} weights")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        # as of a version that grouped parameters in another way
        raise UserError(
            f"checkpoint {path} does not fit the optimizer of this config ({error}); start a new run without --resume"
        ) from None
    for group, settings, lr in zip(optimizer.param_groups, here, rates, strict=True):
        group.update(settings)
        if isinstance(group["lr"], torch.Tensor):  # which graphs know by its address
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    training.step = train_step  # a graph captured before would still read the tensors that the optimizer had then
    if content["scaler"]:  # empty where the run did without, as on a CPU
        training.scaler.load_state_dict(content["scaler"])
