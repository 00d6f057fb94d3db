"""Load the weights and the training state of a checkpoint into a run."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.utils.errors import UserError
from train.checkpoint.state import Checkpoint, ModelEntries, Weights, require_keys
from train.engine import cpu_settings
from train.engine.state import TrainState
from train.optim.factory import set_group_rate

DEVICE_FIELDS = ("lr", "capturable")  # of parameter groups; their types or values depend on the device


def restore_weights(state: TrainState, checkpoint: Checkpoint, path: Path, weights: str = "raw") -> bool:
    """Load only the weights of the model. On the CPU, also restore the number of threads.

    Args:
        state: The training state to load into.
        checkpoint: Contents of the checkpoint, from `store.load`.
        path: Path of the checkpoint, for error messages.
        weights: Value of eval.weights that selects the weights to load.

    Returns:
        True if the loaded weights are the moving average.

    Raises:
        UserError: The checkpoint does not contain a moving average although `weights` is "ema", or the weights do not
            match the model.
    """
    average = checkpoint.get("ema") or {}  # older checkpoints have none
    if weights == "ema" and not average:
        raise UserError(f"checkpoint {path} holds no moving average of the weights; use eval.weights=auto or raw")
    is_average = bool(average) and weights != "raw"
    _restore_threads(state, checkpoint)
    _load_weights(state, average if is_average else checkpoint["model"], path)
    return is_average


def _restore_threads(state: TrainState, checkpoint: Checkpoint) -> None:
    if state.device.type == "cpu":
        cpu_settings.restore_threads(checkpoint.get("threads", 0))  # older checkpoints have none


def _load_weights(state: TrainState, weights: Weights, path: Path) -> None:
    try:
        state.network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"checkpoint {path} does not fit the model of this config: {first}") from None


def restore_state(state: TrainState, checkpoint: Checkpoint, path: Path) -> None:
    """Load everything that a training step changes. Raises UserError if the checkpoint does not match the run."""
    require_keys(checkpoint, ("model", "optimizer", "scaler", "sums"), path)
    _restore_threads(state, checkpoint)
    _restore_model(state, checkpoint, path)
    _check_shapes("sums", {"": checkpoint["sums"]}, {"": state.sums}, path)
    state.sums.copy_(checkpoint["sums"])
    if state.lookahead is not None:
        slow = checkpoint.get("lookahead", {})
        _check_shapes("lookahead", slow, state.lookahead.slow, path)
        for name, weight in state.lookahead.slow.items():
            weight.copy_(slow[name])
    if state.ema is not None:
        average = checkpoint.get("ema", {})
        _check_shapes("ema", average, state.ema.state(), path)
        state.ema.restore(average)
    if state.proxy is not None:
        require_keys(checkpoint.get("proxy", {}), ("model", "optimizer", "scaler"), path)
        _restore_model(state.proxy.state, checkpoint["proxy"], path)


def _check_shapes(entry: str, saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError if the names or shapes of saved tensors differ from the expected ones."""
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, saved)]
    if different := [name for name in {**expected, **saved} if shapes[0].get(name) != shapes[1].get(name)]:
        where = f"{entry} {different[0]}".rstrip()
        raise UserError(f"checkpoint {path} does not fit this config in its {where}; start a new run without --resume")


def _has_wrong_shape(value: object, parameter: torch.Tensor) -> bool:
    """Return True if `value` is an optimizer state tensor whose shape differs from that of `parameter`.

    One-element tensors, such as step counts, are ignored.
    """
    return isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != parameter.shape


def _is_from_timm(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if timm implements the optimizer. Its state can then differ in shape from the weights."""
    return type(optimizer).__module__.startswith("timm.")


def _restore_model(state: TrainState, entries: ModelEntries, path: Path) -> None:
    """Load the model, optimizer and scaler of a run or of its proxy model, and discard the captured CUDA graph.

    Raises:
        UserError: The checkpoint does not match the model or the optimizer.
    """
    _load_weights(state, entries["model"], path)
    optimizer = state.optimizer
    device_fields = [{key: group[key] for key in DEVICE_FIELDS if key in group} for group in optimizer.param_groups]
    saved = entries["optimizer"]
    try:
        rates = [float(group["lr"]) for group in saved["param_groups"]]
        # Set them before loading as well: `capturable` determines the device of the step count.
        groups = [group | fields for group, fields in zip(saved["param_groups"], device_fields, strict=False)]
        optimizer.load_state_dict(saved | {"param_groups": groups + saved["param_groups"][len(groups) :]})
        for parameter, values in optimizer.state.items() if not _is_from_timm(optimizer) else ():
            if wrong := [name for name, value in values.items() if _has_wrong_shape(value, parameter)]:
                raise ValueError(f"{wrong[0]} of {list(values[wrong[0]].shape)} for {list(parameter.shape)} weights")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        # e.g. from a version that grouped parameters differently
        raise UserError(
            f"checkpoint {path} does not fit the optimizer of this config ({error}); start a new run without --resume"
        ) from None
    for group, fields, lr in zip(optimizer.param_groups, device_fields, rates, strict=True):
        group.update(fields)
        set_group_rate(group, lr)
    state.invalidate_graphs()  # the graph would read the optimizer's old tensors
    if entries["scaler"]:  # empty without a scaler, e.g. on a CPU
        state.scaler.load_state_dict(entries["scaler"])
