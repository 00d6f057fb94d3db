"""Saving, loading and restoring: which file a checkpoint goes to, which one is trusted, and what training takes of it.

`content` knows what it holds, `checkpoint_file` the bytes and how they are verified, `durable` how a file stays whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from configs.utils import durable
from configs.utils.errors import UserError
from configs.utils.files import open_plain
from configs.utils.warnings import warn
from train.checkpoint import format
from train.checkpoint.state import collect_state, invalid_entry, require_keys, to_host
from train.engine import cpu_threads
from train.engine.epoch import TrainState, train_step

DEVICE_FIELDS = ("lr", "capturable")  # fields of the optimizer's groups that depend on the device, not on the run
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # of a run; previous: the one before the last


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of `to_host`: at every instant the file of this name is the old one or the new one, whole.

    Raises UserError where the disk does not take it; then the files there are as they were.
    """
    with _one_sentence(path):
        durable.atomic_write(path, lambda file: format.fill(file, content))


def write_last(folder: Path, content: dict[str, Any]) -> None:
    """`write` to last.pt; the last.pt of before is previous.pt from then on, unless it is damaged."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() or (previous.exists() and not is_intact(last)):
        write(last, content)
        return
    with _one_sentence(last):
        durable.replace_and_keep(last, previous, lambda file: format.fill(file, content))


def recover_interrupted_save(folder: Path) -> None:
    """Of a save in which a run was killed nothing stays in its folder, where the file system lets it be removed."""
    with suppress(OSError):  # which the next save names
        durable.finish_replace(folder / LAST, folder / PREVIOUS, is_intact)
        durable.remove_temporary(folder / BEST)


def save(path: Path, training: TrainState, sums: torch.Tensor, **state: Any) -> None:
    """Write a checkpoint here and now."""
    write(path, to_host(collect_state(training, sums, **state)))


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """An OSError inside is a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        there = [name for name in (LAST, PREVIOUS, BEST) if (path.parent / name).is_file()]
        stay = "stays as it was" if len(there) == 1 else "stay as they were"
        earlier = f"the earlier {' and '.join(there)} there {stay}" if there else "there is no earlier one"
        raise UserError(
            f"cannot write checkpoint {path} ({error.strerror or error}); {earlier}: free space, or move the run's "
            "folder and name its new place by --output, then --resume auto goes on"
        ) from None


# Loading


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, in host memory, verified before anything else; no code in it is ever run."""
    try:
        return _read(path)
    except ValueError as error:
        advice = "give a run folder or a .pt file" if not path.exists() else "take another one"
        raise UserError(f"checkpoint {path} {error}; {advice}") from None


def load_newest(candidates: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """(path, content) of the first that is intact; those before it are named in warnings.

    Raises UserError that names all of them where none is intact, and another of their folder that is.
    """
    reasons: dict[Path, str] = {}
    for path in candidates:
        try:
            content = _read(path)
        except ValueError as error:
            reasons[path] = str(error)
            continue
        for damaged, reason in reasons.items():
            warn(f"checkpoint {damaged} {reason}; {path} is taken instead")
        return path, content
    folder = candidates[0].parent
    others = [folder / name for name in (LAST, PREVIOUS, BEST) if folder / name not in candidates]
    intact = next((other for other in others if is_intact(other)), None)
    if intact is not None:
        advice = f"{intact} is intact"
    elif any(path.exists() for path in candidates):
        advice = "take another one" if len(candidates) == 1 else "start a new run without --resume"
    else:
        advice = "give a run folder or a .pt file"
    raise UserError(f"checkpoint {', and '.join(f'{path} {reason}' for path, reason in reasons.items())}; {advice}")


def is_foreign(path: Path) -> bool:
    """Return whether another program wrote the file with torch.save."""
    try:
        with open_plain(path) as file:
            return format.is_foreign(file)
    except OSError:
        return False


def is_intact(path: Path) -> bool:
    """Whether it is a checkpoint whose bytes are as they were written."""
    try:
        with open_plain(path) as file:
            format.verify(file)
    except (OSError, ValueError):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """Raises ValueError with the reason, as the rest of a sentence that begins with the path.

    Raises UserError for a file of another program, which no other candidate can stand for.
    """
    if is_foreign(path):
        raise UserError(
            f"checkpoint {path} was written by another program, so that only its weights can be used: start a run from "
            f"them with --opts model.pretrained={path} and without --resume, or evaluate them with --eval "
            f"--resume {path}"
        )
    try:
        with open_plain(path) as file:
            content = format.read(file)
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except pickle.UnpicklingError:
        raise ValueError("is refused, since it holds more than tensors, numbers and strings") from None
    except Exception as error:  # bytes of another program make torch's unpickler fail in every way
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ValueError(f"cannot be read ({reason})") from None
    if (wrong := invalid_entry(content)) is not None:
        raise ValueError(f"cannot be read (its {wrong!r} is not what train/ddp.py writes)")
    return content


# Restoring


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


def restore(training: TrainState, content: dict[str, Any], path: Path) -> None:
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
