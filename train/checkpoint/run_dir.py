"""Create run folders (OUTPUT/NAME), find the one to resume, and lock it for one process at a time.

Lists of checkpoints are in order of preference, since the first one may be damaged. In training, run folders are found,
created and locked on rank 0 only, see `collectives.from_first_rank`.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from configs import yaml
from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from configs.utils.process import acquire_lock
from configs.utils.warnings import warn
from train.checkpoint import store
from train.checkpoint.store import BEST, LAST, PREVIOUS
from train.distributed import collectives

LOCK_FILE = "lock"  # in a run folder; names the process that trains there
WRITTEN_IN_PLACE = (LOCK_FILE, "log.txt", "metrics.jsonl", "wandb_id.txt", "wandb", "tensorboard")
# The lock may still be held by a run that is writing its last checkpoint, by ranks whose torchrun was killed, or, on a
# network file system, by a failed machine, whose locks expire after 90 s.
LOCK_TIMEOUT_S = 100.0


def run_dirs(config: Config) -> list[Path]:
    """Return the existing paths named like folders of this run, highest number first, e.g. OUTPUT/NAME-2, OUTPUT/NAME.

    There may be gaps in the numbers. Some paths may belong to other runs, e.g. OUTPUT/NAME-64 to a run called NAME-64.
    """
    return [_numbered(config, number) for number in sorted(_used_numbers(config), reverse=True)]


def _latest_number(config: Config) -> int:
    """Return the number of the latest run of this name, or 0 if there is none."""
    used = _used_numbers(config)
    contiguous = next(number for number in range(1, len(used) + 2) if number not in used) - 1
    for number in sorted(used, reverse=True):
        folder = _numbered(config, number)
        name = _run_name(folder)
        if name is None:
            if folder.is_dir() and (number <= contiguous or (folder / LOCK_FILE).exists()):  # killed early
                return number
        elif name == config.name or not _is_dir_name_of(folder.name, name):  # the latter: renamed or copied
            return number
    return 0


def _is_dir_name_of(folder: str, name: str) -> bool:
    """Return True if a run called `name` could have created a folder called `folder`."""
    return re.fullmatch(re.escape(name) + "(-[1-9][0-9]*)?", folder) is not None


def _run_name(folder: Path) -> str | None:
    """Return the run name in a folder's config.yaml, even of an older version, or None if it cannot be read."""
    file = folder / "config.yaml"
    try:
        values = yaml.parse(read_small_text(file), str(file)).value
    except (OSError, ValueError, UserError):
        return None
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _numbered(config: Config, number: int) -> Path:
    return Path(config.output) / (str(config.name) if number == 1 else f"{config.name}-{number}")


def _used_numbers(config: Config) -> set[int]:
    """Return the numbers of all existing files and folders that are named like a folder of this run."""
    pattern = re.compile(re.escape(str(config.name)) + "(?:-([1-9][0-9]{0,8}))?")
    try:
        found = [pattern.fullmatch(name) for name in os.listdir(config.output)]
    except OSError:  # it does not exist yet; writing to it reports any other error
        return set()
    return {int(match[1] or 1) for match in found if match and match[1] != "1"}


def resolve_resume(config: Config, resume: str | None) -> tuple[Path | None, tuple[Path, ...]]:
    """Find the run folder and the checkpoints for a value of --resume.

    Args:
        config: Config of the run.
        resume: None for a new run, "auto" for the latest run of this name, otherwise a checkpoint or run folder.

    Returns:
        A tuple (folder, checkpoints). `folder` is the run folder to continue in, or None if a new one is needed.
        `checkpoints` are the candidates to start from, in order of preference. There are none if training starts from
        scratch. If `resume` is a path, the candidates may not exist.
    """
    if resume is None:
        return None, ()
    if resume == "auto":
        if (number := _latest_number(config)) == 0:
            return None, ()
        folder = _numbered(config, number)
        return folder, latest_checkpoints(folder) if any(path.exists() for path in latest_checkpoints(folder)) else ()
    path = Path(resume)
    if path.is_dir():
        return path, latest_checkpoints(path)
    if _run_name(path.parent) != config.name or not (path.parent / "log.txt").exists():
        return None, (path,)  # a copied checkpoint: the run gets a new folder and leaves this one unchanged
    latest = latest_checkpoints(path.parent)
    return path.parent, latest if path == latest[0] else (path,)


def is_explicit_checkpoint(resume: str | None) -> bool:
    """Return True if --resume names a single checkpoint.

    The path of a last.pt does not count, since it means the latest checkpoint of a run.
    """
    return resume not in (None, "auto") and not Path(resume).is_dir() and Path(resume).name != LAST


def latest_checkpoints(folder: Path) -> tuple[Path, ...]:
    """Return the checkpoints of a run folder to resume from, in order of preference.

    These are last.pt, even if it does not exist, and previous.pt if it exists. If best.pt is the only existing
    checkpoint, only best.pt is returned.
    """
    last, previous, best = (folder / name for name in (LAST, PREVIOUS, BEST))
    if best.exists() and not last.exists() and not previous.exists():
        return (best,)
    return last, *(path for path in [previous] if path.exists())


def create_run_dir(config: Config) -> Path:
    """Create and return a run folder with the next free number, so that no run overwrites another.

    Raises:
        UserError: The folder cannot be created.
    """
    for number in itertools.count(_latest_number(config) + 1):
        folder = _numbered(config, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # it belongs to another run
            continue
        except OSError as error:
            raise UserError(f"cannot create the run folder {folder}: {error.strerror}; give another --output") from None
    raise AssertionError("the numbers are endless")


@contextmanager
def lock_run_dir(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Lock the run folder, so that no other process overwrites its checkpoints and metrics.

    All ranks must enter the context together. Entering it waits for the process that holds the lock, and completes an
    interrupted save. Checkpoints found before may then be outdated, so call `refresh_candidates` inside the context.
    If the lock file cannot be opened or locked, the folder is used without a lock.

    Raises:
        UserError: Another process still holds the lock after `timeout_s`, or a file that the run writes in place is a
            link or a pipe.
    """
    locks: list[BinaryIO] = []

    def lock() -> None:
        _refuse_links(folder)
        locks.extend(_lock(folder, timeout_s))
        if locks:  # without a lock, another process may be saving
            store.recover_interrupted_save(folder)

    collectives.from_first_rank(lock)
    try:
        yield
    finally:
        for file in locks:
            file.close()


def refresh_candidates(folder: Path, candidates: tuple[Path, ...], *, is_explicit: bool) -> tuple[Path, ...]:
    """Look for checkpoints again after locking, since the previous holder of the lock may have saved new ones.

    Args:
        folder: The locked run folder.
        candidates: The checkpoints found before locking, from `resolve_resume`. They are returned unchanged if the
            folder does not contain a checkpoint.
        is_explicit: Whether the user named a single checkpoint. If so, `candidates` are returned unchanged as well.
    """
    latest = latest_checkpoints(folder)
    return latest if not is_explicit and any(path.exists() for path in latest) else candidates


def _refuse_links(folder: Path) -> None:
    """Raise UserError if a file that a run writes in place is a link or a pipe.

    The folder may come from someone else, and writing to the file would then change the target of the link.
    """
    for file in (folder / name for name in WRITTEN_IN_PLACE):
        try:
            mode = file.lstat().st_mode
        except OSError:  # it does not exist yet; writing it reports any other error
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(
                f"{file} is a link or a pipe, through which a run would write elsewhere; replace it by a file or "
                "directory, or remove it"
            )


def _lock(folder: Path, timeout_s: float) -> list[BinaryIO]:
    """Lock the run folder and return the open lock file in a list.

    Returns an empty list if the file cannot be opened for writing, or if locking fails, e.g. because the file system
    does not support locks. Child processes do not inherit the lock. Other code in this process must not open the lock
    file, since closing it would release the lock.

    Raises:
        UserError: Another process still holds the lock after `timeout_s`.
    """
    try:
        lock = (folder / LOCK_FILE).open("a+b")
    except OSError:
        return []

    def holder() -> str:
        lock.seek(0)
        return lock.read(200).decode(errors="replace").strip() or "another process"

    def warn_waiting() -> None:
        warn(f"{holder()} is training in {folder}; waiting for it, up to {timeout_s:.0f} s")

    try:
        is_locked = acquire_lock(lock, timeout_s, is_inherited=False, on_wait=warn_waiting)
    except OSError:
        lock.close()
        return []
    if not is_locked:
        with lock:
            raise UserError(
                f"{holder()} is still training in {folder}; end it or wait for it, or give this run another name "
                "(--opts name=NAME) without --resume"
            )
    with suppress(OSError):  # the disk is full
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        lock.flush()
    return [lock]


def find_checkpoints(path: Path) -> tuple[Path, ...]:
    """Return the existing checkpoints of a run folder in the order best.pt, last.pt, previous.pt.

    If `path` is not a folder, it is the only element of the result.

    Raises:
        UserError: The folder does not contain a checkpoint.
    """
    if not path.is_dir():
        return (path,)
    if found := tuple(path / name for name in (BEST, LAST, PREVIOUS) if (path / name).is_file()):
        return found
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST}); give a run folder or a .pt file")
