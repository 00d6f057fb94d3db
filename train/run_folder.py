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
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from configs.errors import UserError
from configs.load import load_config
from configs.notes import warn
from configs.schema import Config
from train import checkpoint, dist
from train.checkpoint import BEST, LAST, PREVIOUS

LOCK = "lock"  # in a run folder: who trains there
# What ends or has ended may still hold it: a run that writes its last checkpoint, ranks whose torchrun was killed, or,
# on a network file system, a machine that is gone, whose locks end after 90 s.
HELD_S = 100.0


def run_folders(config: Config) -> list[Path]:
    """Those that may be of this name, the latest first: OUTPUT/NAME-3, OUTPUT/NAME-2, OUTPUT/NAME.

    Numbers may be missing, as where an old run was removed, and others be of runs that are named so, as NAME-64.
    """
    return [_numbered(config, number) for number in sorted(_numbers_taken(config), reverse=True)]


def _latest_number(config: Config) -> int:
    """Of the runs of this very name; 0: there is none."""
    taken = _numbers_taken(config)
    unbroken = next(number for number in range(1, len(taken) + 2) if number not in taken) - 1
    for number in sorted(taken, reverse=True):
        name = _name_of_run(_numbered(config, number))
        if name == config.name or (name is None and number <= unbroken):  # killed as it began, or of an older version
            return number
    return 0


def _name_of_run(folder: Path) -> str | None:
    """As its config.yaml has it; None where there is none that can be read."""
    try:
        return load_config(folder / "config.yaml").name
    except UserError:
        return None


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


def find_run(config: Config, resume: str | None) -> tuple[Path | None, tuple[Path, ...]]:
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
        return folder, latest_of(folder) if any(path.exists() for path in latest_of(folder)) else ()
    path = Path(resume)
    if path.is_dir():
        return path, latest_of(path)
    if _name_of_run(path.parent) != config.name or not (path.parent / "log.txt").exists():
        return None, (path,)  # it was copied there: the run goes on in a folder of its own, nothing there is touched
    latest = latest_of(path.parent)
    return path.parent, latest if path == latest[0] else (path,)


def latest_of(folder: Path) -> tuple[Path, ...]:
    """Where a run goes on from: last.pt, else the one before it; best.pt where it has neither yet."""
    last, previous, best = (folder / name for name in (LAST, PREVIOUS, BEST))
    if best.exists() and not last.exists() and not previous.exists():
        return (best,)
    return last, *(path for path in [previous] if path.exists())


def make_folder(config: Config) -> Path:
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
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in the folder: two would write over each other's checkpoints and metrics. What a
    killed one left half done there is finished, so checkpoints are to be looked for inside: `as_held`.

    On all ranks together. Raises UserError where another process has not let go of it after HELD_S.
    """
    locks: list[BinaryIO] = []

    def hold() -> None:
        _refuse_links(folder)
        locks.extend(_lock(folder))
        if locks:  # else another process may be saving there
            checkpoint.settle(folder)

    dist.from_first_rank(hold)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()


def as_held(folder: Path, candidates: tuple[Path, ...]) -> tuple[Path, ...]:
    """Candidates of `find_run` as they are now that the folder is held."""
    return latest_of(folder) if candidates and candidates[0] == folder / LAST else candidates


def _refuse_links(folder: Path) -> None:
    """A run folder may be a stranger's, and a run would write through them. Checkpoints are read or replaced alone."""
    links: list[Path] = []
    with suppress(OSError):  # a folder that cannot be read, which others say
        links = [file for file in sorted(folder.iterdir()) if file.is_symlink() and file.suffix != ".pt"]
    if links:
        raise UserError(
            f"{links[0]} is a link, through which a run would write elsewhere; put the file or folder itself there, or "
            "remove it"
        )


def _lock(folder: Path) -> list[BinaryIO]:
    """None where the file system knows no locks, or the folder cannot be written, which others say.

    A lock of POSIX: the system ends it with the process, however that ends, and children do not inherit it. Nothing
    else in this process may open the file, since closing it would end the lock.
    """
    try:
        lock = (folder / LOCK).open("a+b")
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
        if time.monotonic() - begin >= HELD_S:
            lock.close()
            raise UserError(
                f"{holder} trains in {folder} still; end it or wait for it, or give this run a name of its own "
                "(--opts name=NAME) without --resume"
            )
        warn(f"{holder} trains in {folder}, which is waited for up to {HELD_S:.0f} s")
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
