"""Save and load the checkpoint files of a run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, cast

import torch

from configs.utils import files
from configs.utils.errors import UserError
from configs.utils.files import open_plain
from configs.utils.warnings import warn
from train.checkpoint import format
from train.checkpoint.state import Checkpoint, PositionEntry, collect_state, invalid_entry, to_host
from train.distributed import collectives
from train.engine.state import TrainState

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # in a run folder; previous.pt was saved before last.pt
EPOCH_FILE = re.compile("epoch-([1-9][0-9]*).pt")  # see train.keep_checkpoints


# Saving


def kept_files(keep: str | None, epochs: int) -> tuple[str, ...]:
    """Return the name of the checkpoint to keep after `epochs` epochs, if any. `keep` is train.keep_checkpoints."""
    return (f"epoch-{epochs}.pt",) if keep is not None and epochs % int(keep.removeprefix("every:")) == 0 else ()


def epoch_files(folder: Path) -> list[Path]:
    """Return the checkpoints that train.keep_checkpoints has kept in a run folder, the latest epoch first."""
    found = {path: EPOCH_FILE.fullmatch(path.name) for path in folder.glob("epoch-*.pt")}
    epochs = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(epochs, key=lambda path: -epochs[path])


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. `checkpoint` is from `to_host`.

    Raises:
        UserError: The file cannot be written. An existing file is then unchanged.
    """
    with _write_errors(path):
        files.atomic_write(path, lambda file: format.write(file, checkpoint))


def write_last(folder: Path, checkpoint: Checkpoint) -> None:
    """Write last.pt, without ever leaving an incomplete file under that name.

    The existing last.pt becomes previous.pt, unless it is damaged and previous.pt already exists.

    Raises:
        UserError: The file cannot be written.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() or (previous.exists() and not is_intact(last)):
        write(last, checkpoint)
        return
    with _write_errors(last):
        files.replace_and_keep(last, previous, lambda file: format.write(file, checkpoint))


def recover_interrupted_save(folder: Path) -> None:
    """Complete an interrupted save and remove its temporary files. File system errors are ignored."""
    with suppress(OSError):  # the next save reports it
        files.finish_replace(folder / LAST, folder / PREVIOUS, is_intact)
        for path in (folder / BEST, *(path.with_suffix("") for path in folder.glob("epoch-*.pt.tmp"))):
            files.remove_temporary(path)


def save(path: Path, state: TrainState, sums: torch.Tensor, /, **entries: object) -> None:
    """Write the state of a run to a checkpoint, and return when the file is on disk.

    See `collect_state` for `state`, `sums` and `entries`.

    Raises:
        UserError: The file cannot be written. An existing file is then unchanged.
    """
    write(path, to_host(collect_state(state, sums, **entries)))


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError into a UserError that says how to fix the problem."""
    try:
        yield
    except OSError as error:
        there = [name for name in (LAST, PREVIOUS, BEST) if (path.parent / name).is_file()]
        unchanged = "is unchanged" if len(there) == 1 else "are unchanged"
        earlier = f"the earlier {' and '.join(there)} there {unchanged}" if there else "there is no earlier one"
        raise UserError(
            f"cannot write checkpoint {path} ({error.strerror or error}); {earlier}: free space, or move the run "
            "folder and give its new location as --output, then resume with --resume auto"
        ) from None


# Loading


def load(path: Path) -> Checkpoint:
    """Verify and load a checkpoint into host memory, without running code from the file.

    Raises:
        UserError: The file cannot be read, is damaged, contains objects other than tensors and plain Python values, or
            was written by another program.
    """
    try:
        return _read(path)
    except ValueError as error:
        advice = "give a run folder or a .pt file" if not path.exists() else "give another one"
        raise UserError(f"checkpoint {path} {error}; {advice}") from None


class Loaded(NamedTuple):
    """A checkpoint in host memory, and the file from which it was loaded."""

    path: Path
    checkpoint: Checkpoint


def load_newest(candidates: Sequence[Path]) -> Loaded:
    """Load the first intact checkpoint, and warn about the missing or damaged candidates before it.

    Args:
        candidates: At least one path, all in the same folder, in order of preference.

    Raises:
        UserError: No candidate is intact, or another program wrote a candidate that comes before the first intact one.
            If none is intact, the message lists all candidates, and names another intact checkpoint in the folder if
            there is one.
    """
    reasons: dict[Path, str] = {}
    for path in candidates:
        try:
            checkpoint = _read(path)
        except ValueError as error:
            reasons[path] = str(error)
            continue
        for damaged, reason in reasons.items():
            warn(f"checkpoint {damaged} {reason}; {path} is used instead")
        return Loaded(path, checkpoint)
    folder = candidates[0].parent
    others = [*(folder / name for name in (LAST, PREVIOUS, BEST)), *epoch_files(folder)]
    intact = next((other for other in others if other not in candidates and is_intact(other)), None)
    if intact is not None:
        advice = f"{intact} is intact"
    elif any(path.exists() for path in candidates):
        advice = "give another one" if len(candidates) == 1 else "start a new run without --resume"
    else:
        advice = "give a run folder or a .pt file"
    raise UserError(f"checkpoint {', and '.join(f'{path} {reason}' for path, reason in reasons.items())}; {advice}")


def is_foreign(path: Path) -> bool:
    """Return True if another program wrote the file with torch.save, or False if the file cannot be read."""
    try:
        with open_plain(path) as file:
            return format.is_foreign(file)
    except OSError:
        return False


def is_intact(path: Path) -> bool:
    """Return True if the file is a checkpoint with a correct checksum."""
    try:
        with open_plain(path) as file:
            format.verify(file)
    except (OSError, ValueError):
        return False
    return True


def _read(path: Path) -> Checkpoint:
    """Verify and load a checkpoint.

    Raises:
        ValueError: The file cannot be loaded. The message continues a sentence that starts with the path.
        UserError: The file was written by another program. `load_newest` then does not try other candidates.
    """
    if is_foreign(path):
        raise UserError(
            f"checkpoint {path} was written by another program, so only its weights can be used: start a run from "
            f"them with --opts model.pretrained={path} and without --resume, or evaluate them with --eval "
            f"--resume {path}"
        )
    try:
        with open_plain(path) as file:
            checkpoint = format.read(file)
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except pickle.UnpicklingError:
        raise ValueError("is refused, since it holds more than tensors, numbers and strings") from None
    except Exception as error:  # torch's unpickler can raise any exception for the file of another program
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ValueError(f"cannot be read ({reason})") from None
    if (invalid := invalid_entry(checkpoint)) is not None:
        raise ValueError(f"cannot be read (its {invalid!r} is not what train/ddp.py writes)")
    return cast(Checkpoint, checkpoint)


def load_newest_on_all_ranks(candidates: Sequence[Path]) -> Loaded:
    """On every rank, load the checkpoint that `load_newest` chooses on rank 0. All ranks must call this function.

    Raises:
        UserError: `load_newest` failed on rank 0, or the file at the chosen path cannot be loaded or has a different
            training position on another rank.
    """
    loaded: list[Loaded] = []  # on rank 0

    def choose() -> tuple[Path, PositionEntry | None]:
        loaded.append(load_newest(candidates))
        return loaded[0].path, loaded[0].checkpoint.get("position")

    path, position = collectives.from_first_rank(choose)
    checkpoint = loaded[0].checkpoint if loaded else load(path)
    if checkpoint.get("position") != position:
        raise UserError(
            f"checkpoint {path} is at {checkpoint.get('position')} on one rank and at {position} on rank 0; give "
            "--output a folder that all machines share"
        )
    return Loaded(path, checkpoint)
