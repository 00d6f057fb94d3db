"""The folder of the run that this process trains: found or created, and locked for one process at a time."""

from __future__ import annotations

import itertools
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.process import acquire_lock
from configs.utils.warnings import warn
from train.checkpoint import relaunch, store
from train.checkpoint.resume import (
    LOCK_FILE,
    is_explicit_checkpoint,
    latest_checkpoints,
    latest_number,
    resolve_resume,
    run_path,
)
from train.distributed import collectives

WRITTEN_IN_PLACE = (LOCK_FILE, "log.txt", "metrics.jsonl", "wandb_id.txt", "wandb", "tensorboard")
# Files of a run without a checkpoint. A new run replaces them.
WRITTEN_AT_START = {LOCK_FILE, relaunch.LAUNCH_FILE, "config.yaml", "facts.json", "log.txt", "metrics.jsonl"}
# The lock may still be held by a run that is writing its last checkpoint, by ranks whose torchrun was killed, or, on a
# network file system, by a failed machine, whose locks expire after 90 s.
LOCK_TIMEOUT_S = 100.0


class RunDir:
    """The folder of a run, locked until the context is left. All ranks must use it together.

    The folder is the one that this launch already used before torchrun restarted its ranks, or the one that --resume
    refers to. Checkpoints are looked for once the folder is locked and an interrupted save is completed. A new run has
    no folder until `create`, so that a refused run leaves no files.

    Args:
        config: Config of the run.
        resume: The value of --resume.

    Attributes:
        path: The run folder, or None if a new one is needed.
        resume: The value of --resume, as adapted after a restart, see `relaunch.find_active_run_dir`.

    Raises:
        UserError: Another process trains in the folder, or one of its files is a link or a pipe.
    """

    def __init__(self, config: Config, resume: str | None) -> None:
        self._config, self._launchers = config, relaunch.launcher_ids()
        self._lock = ExitStack()  # on rank 0
        self.path, self.resume, self.candidates = collectives.from_first_rank(lambda: self._find(resume))

    def _find(self, resume: str | None) -> tuple[Path | None, str | None, tuple[Path, ...]]:
        """Find and lock the folder, and return it, --resume, and the checkpoints to start from."""
        active, resume = relaunch.find_active_run_dir(self._config, resume, self._launchers)
        folder, candidates = resolve_resume(self._config, resume)
        folder = active or folder
        # If none of the checkpoints exists, the run is refused and must not leave files in the folder.
        if folder is not None and (not candidates or any(path.exists() for path in candidates)):
            self._lock.enter_context(lock_run_dir(folder))
            latest = latest_checkpoints(folder)  # again, since the previous holder of the lock may have saved
            is_explicit = active is None and is_explicit_checkpoint(resume)
            if not is_explicit and any(path.exists() for path in latest):
                candidates = latest
        return folder, resume, candidates

    def load_newest(self) -> store.Loaded | None:
        """Load the checkpoint to start from. Return None for a new run.

        Raises:
            UserError: There are checkpoints, but none is intact.
        """
        return store.load_newest_on_all_ranks(self.candidates) if self.candidates else None

    def create(self) -> Path:
        """Create or take over and lock the folder of a new run, record this launch in it, and return the folder.

        Raises:
            UserError: The folder cannot be created or written.
        """

        def create() -> Path:
            folder = self.path
            if folder is None:
                folder = take_over_run_dir(self._config, self._lock)
            if folder is None:
                folder = create_run_dir(self._config)
                self._lock.enter_context(lock_run_dir(folder))
            return relaunch.record_launch(folder, self._launchers)

        self.path = collectives.from_first_rank(create)
        return self.path

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()


def create_run_dir(config: Config) -> Path:
    """Create and return a run folder with the next free number, so that no run overwrites another.

    Raises:
        UserError: The folder cannot be created.
    """
    for number in itertools.count(latest_number(config) + 1):
        folder = run_path(config, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # it belongs to another run
            continue
        except OSError as error:
            raise UserError(f"cannot create the run folder {folder}: {error.strerror}; give another --output") from None
    raise AssertionError("the numbers are endless")


def take_over_run_dir(config: Config, lock: ExitStack) -> Path | None:
    """Lock and return the folder of the latest run of this name if it failed before its first epoch and checkpoint.

    Its log is removed, and a new run replaces its other files. The lock is added to `lock`. If the folder contains
    anything else or another process trains there, the result is None and the folder is unchanged.
    """
    number = latest_number(config)
    folder = run_path(config, number)
    if number == 0 or not _ended_early(folder):
        return None
    with suppress(UserError, OSError), ExitStack() as stack:
        if stack.enter_context(lock_run_dir(folder, timeout_s=0.0)) and _ended_early(folder):
            for name in ("log.txt", relaunch.LAUNCH_FILE):
                (folder / name).unlink(missing_ok=True)
            lock.push(stack.pop_all())
            return folder
    return None


def _ended_early(folder: Path) -> bool:
    """Return True if a run wrote its config to the folder, and nothing that is worth keeping."""
    try:
        names = set(os.listdir(folder))
        has_metrics = "metrics.jsonl" in names and (folder / "metrics.jsonl").stat().st_size > 0
    except OSError:
        return False
    return {"config.yaml", "log.txt"} <= names <= WRITTEN_AT_START and not has_metrics


@contextmanager
def lock_run_dir(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[bool]:
    """Lock the run folder, so that no other process overwrites its checkpoints and metrics.

    Entering the context waits for the process that holds the lock, and completes an interrupted save. If the lock file
    cannot be opened or locked, e.g. because the file system does not support locks, the folder is used without a lock.
    The context yields whether the folder is locked.
    Child processes do not inherit the lock. Other code in this process must not open the lock file, since closing it
    would release the lock.

    Raises:
        UserError: Another process still holds the lock after `timeout_s`, or a file that the run writes in place is a
            link or a pipe.
    """
    _refuse_links(folder)
    try:
        lock = (folder / LOCK_FILE).open("a+b", buffering=0)  # closing a buffer writes it, and fails on a full disk
    except OSError:
        yield False
        return

    def holder() -> str:
        lock.seek(0)
        return lock.read(200).decode(errors="replace").strip() or "another process"

    def warn_waiting() -> None:
        warn(f"{holder()} is training in {folder}; waiting for it, up to {timeout_s:.0f} s")

    with lock:
        try:
            has_lock = acquire_lock(lock, timeout_s, is_inherited=False, on_wait=warn_waiting)
        except OSError:
            yield False
            return
        if not has_lock:
            raise UserError(
                f"{holder()} is still training in {folder}; end it or wait for it, or give this run another name "
                "(--opts name=NAME) without --resume"
            )
        with suppress(OSError):  # the disk is full
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        store.recover_interrupted_save(folder)  # not without a lock: another process may be saving
        yield True


def is_locked(folder: Path) -> bool:
    """Return True if another process trains in the folder, or if that is unknown, e.g. without locks."""
    try:
        with (folder / LOCK_FILE).open("r+b") as lock:
            return not acquire_lock(lock, is_inherited=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True


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
