"""Saving and loading: one file of tensors, numbers and strings, loaded with weights_only=True.

Written to a temporary name, flushed, renamed: whatever instant a run is killed at, last.pt is whole. The sha256 of what
torch.save wrote follows it as text, since torch.load takes flipped bits for weights; torch.load itself skips the text.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from configs.errors import UserError
from train.loop import Training, train_step

FORMAT = 1
DIGEST_BYTES = 64  # sha256 in hexadecimal
ON_DEVICE = ("lr", "capturable")  # fields of the optimizer's groups that depend on the device, not on the run


def content_of(training: Training, sums: torch.Tensor, **state: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **_state_of(training),
        "sums": sums,
        "lookahead": training.lookahead.slow if training.lookahead is not None else {},
        "ema": training.ema.state() if training.ema is not None else {},
        "proxy": _state_of(training.proxy.training) if training.proxy is not None else {},
        **state,
    }


def to_host(content: Any) -> Any:
    return copy.deepcopy(content)


def save(path: Path, training: Training, sums: torch.Tensor, **state: Any) -> None:
    write(path, to_host(content_of(training, sums, **state)))


def write_last(folder: Path, content: dict[str, Any]) -> None:
    last = folder / "last.pt"
    if last.exists():
        (folder / "previous.tmp").unlink(missing_ok=True)
        os.link(last, folder / "previous.tmp")
        write(last, content)
        (folder / "previous.tmp").rename(folder / "previous.pt")
    else:
        write(last, content)


def write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w+b") as file:
        torch.save(content, file)
        size = file.tell()
        file.seek(0)
        file.write(_sha256(file, size))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def load_newest(candidates: Any) -> tuple[Path, dict[str, Any]]:
    return candidates[0], load(candidates[0])


def _state_of(training: Training) -> dict[str, Any]:
    """What the training holds, or its proxy's training does: `_restore_one` puts it back."""
    return {
        "model": training.network.state_dict(),
        "optimizer": _portable(training.optimizer.state_dict()),
        "scaler": training.scaler.state_dict(),
    }


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, in host memory; no code in it is ever run."""
    try:
        with path.open("rb") as file:
            if _sha256(file, path.stat().st_size - DIGEST_BYTES) != file.read():
                raise ValueError("its checksum is wrong: it is damaged or of another program")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; give a run folder or a .pt file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} is refused, since it holds more than tensors, numbers and strings; take another one"
        ) from None
    except Exception as error:  # bytes of another program make torch's unpickler fail in every way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason}); take another one") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this program (format {FORMAT}); give one that train/ddp.py wrote")
    return content


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state as a run without CUDA graphs has it, so that one made on a GPU goes on on a CPU."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    for group in groups:
        if "capturable" in group:
            group["capturable"] = False
    return state | {"param_groups": groups}


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Of the next `size` bytes, as text."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def restore_weights(training: Training, content: dict[str, Any], path: Path, weights: str = "raw") -> bool:
    """Load the model's weights alone; weights: which, as eval.weights says. Returns whether it is the average."""
    average: dict[str, Any] = content.get("ema") or {}  # missing in checkpoints of older versions
    if weights == "ema" and not average:
        raise UserError(f"checkpoint {path} holds no moving average of the weights; use eval.weights=auto or raw")
    is_average = bool(average) and weights != "raw"
    try:
        training.network.load_state_dict(average if is_average else content["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"checkpoint {path} does not fit the model of this config: {first}") from None
    return is_average


def restore(training: Training, content: dict[str, Any], path: Path) -> None:
    """Load all that a step changes."""
    _restore_one(training, content, path)
    training.sums.copy_(content["sums"])
    if training.lookahead is not None:
        for name, slow in training.lookahead.slow.items():
            slow.copy_(content["lookahead"][name])
    if training.ema is not None:
        training.ema.restore(content["ema"])
    if training.proxy is not None:
        _restore_one(training.proxy.training, content["proxy"], path)


def _restore_one(training: Training, content: dict[str, Any], path: Path) -> None:
    restore_weights(training, content, path)
    optimizer = training.optimizer
    here = [{key: group[key] for key in ON_DEVICE if key in group} for group in optimizer.param_groups]
    saved = content["optimizer"]
    # before as well, since it decides on which device torch puts the count of steps
    groups = [group | one for group, one in zip(saved["param_groups"], here, strict=False)]
    try:
        optimizer.load_state_dict(saved | {"param_groups": groups + saved["param_groups"][len(groups) :]})
    except ValueError as error:  # as of a version that grouped parameters in another way
        raise UserError(
            f"checkpoint {path} does not fit the optimizer of this config ({error}); start a new run without --resume"
        ) from None
    for group, settings in zip(optimizer.param_groups, here, strict=True):
        group.update(settings)
    training.step = train_step  # a graph captured before would still read the tensors that the optimizer had then
    if content["scaler"]:  # empty where the run did without, as on a CPU
        training.scaler.load_state_dict(content["scaler"])
