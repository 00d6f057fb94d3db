"""Where a run lies: OUTPUT/NAME, found again or newly made, and held by one process at a time. Only the first rank
looks; see `dist.from_first_rank`.

And which checkpoints a folder stands for: several, the one that is wanted first, since it may be damaged.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from configs import yaml
from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from configs.utils.warnings import warn
from train.checkpoint import store
from train.checkpoint.store import BEST, LAST, PREVIOUS
from train.distributed import collectives

LOCK_FILE = "lock"  # in a run folder: who trains there
WRITTEN_IN_PLACE = (LOCK_FILE, "log.txt", "metrics.jsonl", "wandb_id.txt", ".curves.png", "wandb", "tensorboard")
# What ends or has ended may still hold it: a run that writes its last checkpoint, ranks whose torchrun was killed, or,
# on a network file system, a machine that is gone, whose locks end after 90 s.
LOCK_TIMEOUT_S = 100.0


def run_dirs(config: Config) -> list[Path]:
    """Those that may be of this name, the latest first: OUTPUT/NAME-3, OUTPUT/NAME-2, OUTPUT/NAME.

    Numbers may be missing, as where an old run was removed, and others be of runs that are named so, as NAME-64.
    """
    return [_numbered(config, number) for number in sorted(_numbers_taken(config), reverse=True)]


def _latest_number(config: Config) -> int:
    """Of the runs of this name; 0: there is none."""
    taken = _numbers_taken(config)
    unbroken = next(number for number in range(1, len(taken) + 2) if number not in taken) - 1
    for number in sorted(taken, reverse=True):
        folder = _numbered(config, number)
        name = _run_name(folder)
        if name is None:
            if folder.is_dir() and (number <= unbroken or (folder / LOCK_FILE).exists()):  # killed as it began
                return number
        elif name == config.name or not _is_dir_name_of(folder.name, name):  # or it was renamed, or copied
            return number
    return 0


def _is_dir_name_of(folder: str, name: str) -> bool:
    """Whether a run of this name makes folders that are called so."""
    return re.fullmatch(re.escape(name) + "(-[1-9][0-9]*)?", folder) is not None


def _run_name(folder: Path) -> str | None:
    """As its config.yaml has it, of whatever version; None where there is none that can be read."""
    file = folder / "config.yaml"
    try:
        values = yaml.parse(read_small_text(file), str(file)).value
    except (OSError, ValueError, UserError):
        return None
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _numbered(config: Config, number: int) -> Path:
    return Path(config.output) / (str(config.name) if number == 1 else f"{config.name}-{number}")


def _numbers_taken(config: Config) -> set[int]:
    """By anything."""
    pattern = re.compile(re.escape(str(config.name)) + "(?:-([1-9][0-9]{0,8}))?")
    try:
        found = [pattern.fullmatch(name) for name in os.listdir(config.output)]
    except OSError:  # no such folder yet; what else is wrong with it shows where it is written to
        return set()
    return {int(match[1] or 1) for match in found if match and match[1] != "1"}


def resolve_resume(config: Config, resume: str | None) -> tuple[Path | None, tuple[Path, ...]]:
    """The folder to go on in, None where it is not there yet, and the checkpoints to start from, of which the first
    intact one counts; none for a new run.

    With --resume auto those of the latest run of this name; with a path, that checkpoint and the folder it lies in.
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
        return None, (path,)  # it was copied there: the run goes on in a folder of its own, nothing there is touched
    latest = latest_checkpoints(path.parent)
    return path.parent, latest if path == latest[0] else (path,)


def is_explicit_checkpoint(resume: str | None) -> bool:
    """Whether --resume names one checkpoint; last.pt stands for its run."""
    return resume not in (None, "auto") and not Path(resume).is_dir() and Path(resume).name != LAST


def latest_checkpoints(folder: Path) -> tuple[Path, ...]:
    """Where a run goes on from: last.pt, else the one before it; best.pt where it has neither yet."""
    last, previous, best = (folder / name for name in (LAST, PREVIOUS, BEST))
    if best.exists() and not last.exists() and not previous.exists():
        return (best,)
    return last, *(path for path in [previous] if path.exists())


def create_run_dir(config: Config) -> Path:
    """A folder with a number after those of this name that there are, so that no run writes over another."""
    for number in itertools.count(_latest_number(config) + 1):
        folder = _numbered(config, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run's
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give another --output") from None
    raise AssertionError("the numbers are endless")


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in the folder: two would write over each other's checkpoints and metrics. What a
    killed one left half done there is finished, so checkpoints are to be looked for inside: `refresh_candidates`.

    On all ranks together. Raises UserError where another process has not let go of it after LOCK_TIMEOUT_S.
    """
    locks: list[BinaryIO] = []

    def hold() -> None:
        _refuse_links(folder)
        locks.extend(_lock(folder))
        if locks:  # else another process may be saving there
            store.recover_interrupted_save(folder)

    collectives.from_first_rank(hold)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()


def refresh_candidates(folder: Path, candidates: tuple[Path, ...], *, is_explicit: bool) -> tuple[Path, ...]:
    """Return the candidates of `resolve_resume` again: the run that held the lock may have saved meanwhile.

    is_named: a single checkpoint was asked for, which stays.
    """
    latest = latest_checkpoints(folder)
    return latest if not is_explicit and any(path.exists() for path in latest) else candidates


def _refuse_links(folder: Path) -> None:
    """A run folder may be a stranger's, and a run would write through them, or wait for a pipe."""
    for file in (folder / name for name in WRITTEN_IN_PLACE):
        try:
            mode = file.lstat().st_mode
        except OSError:  # it is not there yet; what else is wrong shows where it is written
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(
                f"{file} is a link or a pipe, through which a run would write elsewhere; put a file or folder of its "
                "own there, or remove it"
            )


def _lock(folder: Path) -> list[BinaryIO]:
    """None where the file system knows no locks, or the folder cannot be written, which others say.

    A lock of POSIX: the system ends it with the process, however that ends, and children do not inherit it. Nothing
    else in this process may open the file, since closing it would end the lock.
    """
    try:
        lock = (folder / LOCK_FILE).open("a+b")
    except OSError:
        return []
    begin = time.monotonic()
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # held
            lock.seek(0)
            holder = lock.read(200).decode(errors="replace").strip() or "another process"
        except OSError:
            lock.close()
            return []
        else:
            break
        if time.monotonic() - begin >= LOCK_TIMEOUT_S:
            lock.close()
            raise UserError(
                f"{holder} trains in {folder} still; end it or wait for it, or give this run a name of its own "
                "(--opts name=NAME) without --resume"
            )
        warn(f"{holder} trains in {folder}, which is waited for up to {LOCK_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    with suppress(OSError):  # a full disk
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        lock.flush()
    return [lock]


def find_checkpoints(path: Path) -> tuple[Path, ...]:
    """The checkpoints that a run folder stands for, of which the first intact one counts: best.pt, else the last.

    A file stands for itself.
    """
    if not path.is_dir():
        return (path,)
    if found := tuple(path / name for name in (BEST, LAST, PREVIOUS) if (path / name).is_file()):
        return found
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST}); give the folder of a run or a .pt file")
