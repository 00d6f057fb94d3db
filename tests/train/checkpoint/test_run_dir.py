"""Run folders: which one a run resumes in, its checkpoints, and its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from configs.schema import Config
from configs.utils.errors import UserError
from helpers.training import DIGITS, alone
from train.checkpoint import run_dir, store
from train.checkpoint.run_dir import (
    create_run_dir,
    is_explicit_checkpoint,
    lock_run_dir,
    refresh_candidates,
    resolve_resume,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(DIGITS, ["name=net"], output=str(tmp_path))


def make(folder: Path, *names: str, config: Config | None = None) -> Path:
    """Create a folder with these empty files, and the config and log of a run if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "log.txt").write_text("")
    return folder


def test_auto_resolves_to_latest_run_and_newest_checkpoint(config: Config, tmp_path: Path) -> None:
    assert resolve_resume(config, None) == (None, ())
    assert resolve_resume(config, "auto") == (None, ())
    first = make(tmp_path / "net", "last.pt", "best.pt")
    assert resolve_resume(config, "auto") == (first, (first / "last.pt",))
    second = make(tmp_path / "net-2", "last.pt", "previous.pt", "best.pt", "last.pt.tmp")
    assert resolve_resume(config, "auto") == (second, (second / "last.pt", second / "previous.pt"))
    third = make(tmp_path / "net-3", "last.pt.tmp")  # killed before its first checkpoint
    assert resolve_resume(config, "auto") == (third, ())


def test_latest_run_is_the_one_with_highest_number(config: Config, tmp_path: Path) -> None:
    """An old run was removed."""
    third = make(tmp_path / "net-3", "last.pt", config=config)
    assert resolve_resume(config, "auto") == (third, (third / "last.pt",))
    assert create_run_dir(config) == tmp_path / "net-4"


def test_run_named_like_a_number_is_not_confused(config: Config, tmp_path: Path) -> None:
    def named(name: str) -> Config:
        return load_config(DIGITS, [f"name={name}"], output=str(tmp_path))

    for name in ("net-2", "net-64", "net-64-2", "net-1", "nets", "net-2-3"):
        make(tmp_path / name, "last.pt", config=named(name))
    make(tmp_path / "net-99")  # not a run
    (tmp_path / "net").touch()  # not a folder
    assert resolve_resume(config, "auto") == (None, ())
    (tmp_path / "net").unlink()
    assert create_run_dir(config) == tmp_path / "net"
    first = make(tmp_path / "net", "last.pt", config=config)
    assert resolve_resume(config, "auto") == (first, (first / "last.pt",))
    assert create_run_dir(config) == tmp_path / "net-3"
    assert resolve_resume(named("net-64"), "auto")[0] == tmp_path / "net-64"


def test_renamed_run_folder_is_found_by_its_new_name(config: Config, tmp_path: Path) -> None:
    copied = make(tmp_path / "net-tuned", "last.pt", config=config)
    renamed = load_config(DIGITS, ["name=net-tuned"], output=str(tmp_path))
    assert resolve_resume(renamed, "auto") == (copied, (copied / "last.pt",))


@pytest.mark.parametrize(
    "text", ["name: net\nremoved_setting: 3\n", "name: [", "name: 3", "- 3", "\xff", "link", "pipe"]
)
def test_only_the_name_of_a_config_is_read(text: str, config: Config, tmp_path: Path) -> None:
    """The config may be from an older version with other settings, or from someone else."""
    make(tmp_path / "net", "last.pt", config=config)
    folder = make(tmp_path / "net-3", "last.pt")
    if text == "link":
        (folder / "config.yaml").symlink_to(folder / "config.yaml")
    elif text == "pipe":
        os.mkfifo(folder / "config.yaml")
    else:
        (folder / "config.yaml").write_bytes(text.encode("latin1"))
    is_ours = text.startswith("name: net\n")
    assert resolve_resume(config, "auto")[0] == (folder if is_ours else tmp_path / "net")
    (folder / "lock").touch()  # like that of `lock_run_dir`
    assert resolve_resume(config, "auto")[0] == folder


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


def test_run_with_only_best_checkpoint_resumes_from_it(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "best.pt", config=config)
    for resume in ("auto", str(folder), str(folder / "best.pt")):
        assert resolve_resume(config, resume) == (folder, (folder / "best.pt",))
    assert resolve_resume(config, str(folder / "last.pt")) == (folder, (folder / "last.pt",))  # explicit, but missing


def test_auto_uses_previous_checkpoint_if_last_is_missing(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "previous.pt")
    assert resolve_resume(config, "auto") == (folder, (folder / "last.pt", folder / "previous.pt"))


@pytest.mark.parametrize("what", ["", "last.pt"])
def test_run_and_last_checkpoint_fall_back_to_previous(what: str, config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", config=config)
    assert resolve_resume(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))
    (folder / "last.pt").unlink()
    assert resolve_resume(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))


def test_other_checkpoint_files_have_no_fallback(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", "best.pt", config=config)
    assert resolve_resume(config, str(folder / "best.pt")) == (folder, (folder / "best.pt",))
    copies = make(tmp_path / "copies", "last.pt", "previous.pt")
    assert resolve_resume(config, str(copies / "last.pt")) == (None, (copies / "last.pt",))


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
    found, candidates = resolve_resume(config, "auto")
    assert candidates == (folder / "last.pt",)
    assert found is not None
    with alone(), lock_run_dir(found):
        assert refresh_candidates(folder, candidates, is_explicit=False) == (folder / "last.pt", folder / "previous.pt")
        assert refresh_candidates(folder, (folder / "best.pt",), is_explicit=True) == (folder / "best.pt",)
    assert list(folder.glob("*.tmp")) == []


@pytest.mark.parametrize("before", [(), ("best.pt",)])
def test_checkpoint_saved_while_waiting_for_lock_is_used(
    before: tuple[str, ...], config: Config, tmp_path: Path
) -> None:
    folder = make(tmp_path / "net", *before, config=config)
    _, candidates = resolve_resume(config, "auto")
    assert candidates == tuple(folder / name for name in before)
    with another_run(folder) as other:

        def save_and_end() -> None:
            (folder / "last.pt").touch()
            other.kill()

        threading.Timer(0.3, save_and_end).start()
        with alone(), lock_run_dir(folder):
            assert refresh_candidates(folder, candidates, is_explicit=False) == (folder / "last.pt",)
    fresh = make(tmp_path / "fresh")
    assert refresh_candidates(fresh, (), is_explicit=False) == ()


@pytest.mark.parametrize(
    ("resume", "is_one"), [(None, False), ("auto", False), ("best.pt", True), ("last.pt", False), (".", False)]
)
def test_explicit_checkpoint_is_distinguished_from_a_run(resume: str | None, is_one: bool, tmp_path: Path) -> None:
    assert is_explicit_checkpoint(resume if resume in (None, "auto") else str(tmp_path / resume)) == is_one


def test_without_lock_the_save_of_others_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "net", "last.pt", "last.pt.tmp")
    monkeypatch.setattr(run_dir, "_lock", lambda *_: [])
    with alone(), lock_run_dir(folder):
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
