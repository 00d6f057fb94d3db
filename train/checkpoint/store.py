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

from configs.utils import files
from configs.utils.errors import UserError
from configs.utils.files import open_plain
from configs.utils.warnings import warn
from train.checkpoint import format
from train.checkpoint.state import collect_state, invalid_entry, to_host
from train.engine.epoch import TrainState

DEVICE_FIELDS = ("lr", "capturable")  # fields of the optimizer's groups that depend on the device, not on the run
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # of a run; previous: the one before the last


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of `to_host`: at every instant the file of this name is the old one or the new one, whole.

    Raises UserError where the disk does not take it; then the files there are as they were.
    """
    with _one_sentence(path):
        files.atomic_write(path, lambda file: format.fill(file, content))


def write_last(folder: Path, content: dict[str, Any]) -> None:
    """`write` to last.pt; the last.pt of before is previous.pt from then on, unless it is damaged."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() or (previous.exists() and not is_intact(last)):
        write(last, content)
        return
    with _one_sentence(last):
        files.replace_and_keep(last, previous, lambda file: format.fill(file, content))


def recover_interrupted_save(folder: Path) -> None:
    """Of a save in which a run was killed nothing stays in its folder, where the file system lets it be removed."""
    with suppress(OSError):  # which the next save names
        files.finish_replace(folder / LAST, folder / PREVIOUS, is_intact)
        files.remove_temporary(folder / BEST)


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
