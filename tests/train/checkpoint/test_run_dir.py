"""The folder that a run trains in: found, created and locked."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.schema import Config
from configs.utils.errors import UserError
from helpers.run_dirs import make
from helpers.training import alone
from train.checkpoint import run_dir, store
from train.checkpoint.resume import resolve_resume
from train.checkpoint.run_dir import RunDir, is_locked, lock_run_dir


def test_folder_with_links_is_refused_and_targets_are_unchanged(tmp_path: Path) -> None:
    folder, target = make(tmp_path / "net", "best.pt"), tmp_path / "target"
    target.write_bytes(b"a stranger's")
    for name in ("last.pt", "config.yaml", ".#config.yaml", "notes"):  # replaced, or not used by a run
        (folder / name).symlink_to(target)
    with alone():
        with lock_run_dir(folder):
            pass
        for name in ("lock", "log.txt", "metrics.jsonl", "tensorboard"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
            with (
                pytest.raises(UserError, match=rf"net/{name} is a link or a pipe, through which"),
                lock_run_dir(folder),
            ):
                pass
            (folder / name).unlink()
        os.mkfifo(folder / "log.txt")
        with pytest.raises(UserError, match=r"net/log\.txt is a link or a pipe"), lock_run_dir(folder):
            pass
    assert target.read_bytes() == b"a stranger's"


# One process at a time

HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("process 7 on machine 1", file=lock, flush=True)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder / run_dir.LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def is_free(folder: Path) -> bool:
    """Return whether another process can take the lock."""
    attempt = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", attempt, str(folder / run_dir.LOCK_FILE)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_folder_is_locked_inside_and_always_released(tmp_path: Path) -> None:
    with alone():
        with lock_run_dir(tmp_path):
            assert not is_free(tmp_path)
        assert is_free(tmp_path)
        with pytest.raises(ZeroDivisionError), lock_run_dir(tmp_path):
            1 / 0  # noqa: B018
        assert is_free(tmp_path)
    assert (tmp_path / run_dir.LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_locking_a_folder_completes_a_killed_save(config: Config, tmp_path: Path) -> None:
    """Killed during its second save: the first checkpoint has only its temporary name."""
    folder = make(tmp_path / "net", "best.pt.tmp", config=config)
    for name, step in (("last.pt", 2), ("previous.pt.tmp", 1)):
        store.write(folder / name, {"format": 1, "position": {"epoch": 0, "step": step}})
    assert resolve_resume(config, "auto") == (folder, (folder / "last.pt",))
    with alone(), RunDir(config, "auto") as opened:
        assert opened.candidates == (folder / "last.pt", folder / "previous.pt")
    assert list(folder.glob("*.tmp")) == []
    make(folder, "best.pt")
    with alone(), RunDir(config, str(folder / "best.pt")) as opened:
        assert opened.candidates == (folder / "best.pt",)


@pytest.mark.parametrize("before", [(), ("best.pt",)])
def test_checkpoint_saved_while_waiting_for_lock_is_used(
    before: tuple[str, ...], config: Config, tmp_path: Path
) -> None:
    folder = make(tmp_path / "net", *before, config=config)
    assert resolve_resume(config, "auto")[1] == tuple(folder / name for name in before)
    with another_run(folder) as other:

        def save_and_end() -> None:
            (folder / "last.pt").touch()
            other.kill()

        threading.Timer(0.3, save_and_end).start()
        with alone(), RunDir(config, "auto") as opened:
            assert opened.candidates == (folder / "last.pt",)


def test_new_run_gets_a_folder_only_when_created(config: Config, tmp_path: Path) -> None:
    with alone(), RunDir(config, None) as opened:
        assert (opened.path, opened.load_newest(), [*tmp_path.iterdir()]) == (None, None, [])
        assert opened.create() == opened.path == tmp_path / "net"
        assert not is_free(tmp_path / "net")
    assert is_free(tmp_path / "net")


def test_new_run_takes_over_a_run_that_ended_early(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "lock", "facts.json", "metrics.jsonl", config=config)
    with another_run(folder), alone(), RunDir(config, None) as opened:
        assert is_locked(folder)
        assert opened.create() == tmp_path / "net-2"
    (tmp_path / "net-2" / "lock").unlink()
    (tmp_path / "net-2").rmdir()
    with alone(), RunDir(config, None) as opened:
        assert not is_locked(folder)
        assert opened.create() == folder
        assert not is_free(folder)
    assert is_free(folder)
    assert {file.name for file in folder.iterdir()} == {"lock", "config.yaml", "facts.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", ["last.pt", "last.pt.tmp", "epoch-1.pt", "wandb_id.txt", "notes", "metrics.jsonl"])
def test_run_with_results_is_not_taken_over(name: str, config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "lock", config=config)
    (folder / name).write_text('{"epoch": 0}\n')
    with alone(), RunDir(config, None) as opened:
        assert opened.create() == tmp_path / "net-2"
    assert (folder / "log.txt").exists()


def test_refused_resume_leaves_no_lock_file(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", config=config)
    with alone(), RunDir(config, str(folder / "best.pt")) as opened, pytest.raises(UserError, match="does not exist"):
        opened.load_newest()
    assert not (folder / run_dir.LOCK_FILE).exists()


def test_without_lock_the_save_of_others_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "net", "last.pt", "last.pt.tmp")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with lock_run_dir(folder):
        assert (folder / "last.pt.tmp").exists()


def test_locked_folder_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    with another_run(tmp_path), alone(), pytest.raises(UserError) as error, lock_run_dir(tmp_path, timeout_s=0.0):
        pass
    assert str(error.value).startswith(f"process 7 on machine 1 is still training in {tmp_path}; end it")


def test_lock_of_a_killed_run_is_awaited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_run(tmp_path) as other:
        threading.Timer(0.5, other.kill).start()
        with alone(), lock_run_dir(tmp_path):
            assert not is_free(tmp_path)
    assert f"process 7 on machine 1 is training in {tmp_path}; waiting for it" in capsys.readouterr().err


def test_file_system_without_locks_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with alone(), lock_run_dir(tmp_path), lock_run_dir(tmp_path / "missing"):
        pass


def test_full_disk_leaves_the_error_of_the_run(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # every write fails
    try:
        with pytest.raises(UserError, match="no space"), lock_run_dir(tmp_path):
            raise UserError("no space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_free(tmp_path)
