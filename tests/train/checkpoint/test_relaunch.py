"""The run folder of a launch after torchrun has restarted its ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from helpers.training import DIGITS, alone
from train.checkpoint import relaunch

OURS, THEIRS = ["machine 1 boot 7 100", "machine 2 boot 9 200"], ["machine 1 boot 8 101"]


def config_of(output: Path) -> Config:
    return load_config(DIGITS, ["name=run"], output=str(output))


def make_run_dir(output: Path, name: str, launchers: list[str], *checkpoints: str) -> Path:
    (output / name).mkdir(parents=True)
    for checkpoint in checkpoints:
        (output / name / checkpoint).touch()
    return relaunch.record_launch(output / name, launchers)


@pytest.mark.parametrize("resume", [None, "auto", "/elsewhere/best.pt"])
def test_first_start_ignores_other_launches(resume: str | None, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert relaunch.find_active_run_dir(config, resume, OURS) == (None, resume)
    make_run_dir(tmp_path, "run", THEIRS, "last.pt")
    make_run_dir(tmp_path, "run-2", [], "last.pt")
    assert relaunch.find_active_run_dir(config, resume, OURS) == (None, resume)
    assert relaunch.find_active_run_dir(config, resume, []) == (None, resume)


@pytest.mark.parametrize("resume", [None, "auto", "/elsewhere/best.pt"])
@pytest.mark.parametrize("checkpoint", ["last.pt", "previous.pt", "best.pt"])
def test_restart_resumes_in_the_folder_of_its_launch(resume: str | None, checkpoint: str, tmp_path: Path) -> None:
    make_run_dir(tmp_path, "run", THEIRS, "last.pt")
    used = make_run_dir(tmp_path, "run-7", OURS, checkpoint)
    make_run_dir(tmp_path, "run-8", THEIRS, "last.pt")
    assert relaunch.find_active_run_dir(config_of(tmp_path), resume, OURS) == (used, str(used))


@pytest.mark.parametrize(
    ("resume", "then"), [(None, None), ("auto", None), ("/elsewhere/best.pt", "/elsewhere/best.pt")]
)
def test_restart_without_checkpoint_starts_again_in_its_folder(
    resume: str | None, then: str | None, tmp_path: Path
) -> None:
    used = make_run_dir(tmp_path, "run", OURS)
    make_run_dir(tmp_path, "run-2", THEIRS, "last.pt")  # --resume auto would use it
    assert relaunch.find_active_run_dir(config_of(tmp_path), resume, OURS) == (used, then)


def test_launch_is_the_same_while_one_machine_stays(tmp_path: Path) -> None:
    used = make_run_dir(tmp_path, "run", OURS, "last.pt")
    survivors = [OURS[1], "machine 3 boot 4 300"]
    assert relaunch.find_active_run_dir(config_of(tmp_path), None, survivors) == (used, str(used))
    relaunch.record_launch(used, survivors)
    assert relaunch.find_active_run_dir(config_of(tmp_path), None, survivors[1:]) == (used, str(used))
    assert relaunch.find_active_run_dir(config_of(tmp_path), None, OURS[:1]) == (None, None)


def test_run_resumed_from_another_folder_is_found_there(tmp_path: Path) -> None:
    elsewhere = make_run_dir(tmp_path, "moved", OURS, "last.pt")
    config = config_of(tmp_path / "output")
    assert relaunch.find_active_run_dir(config, str(elsewhere), OURS) == (elsewhere, str(elsewhere))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 200_000, '{"agents": 3}', '{"agents": [{}]}', '{"agent": ["machine 1 boot 7 100"]}']
)
def test_unreadable_launch_file_matches_no_launch(text: str, tmp_path: Path) -> None:
    used = make_run_dir(tmp_path, "run", OURS, "last.pt")
    (used / relaunch.LAUNCH_FILE).write_text(text)
    assert relaunch.find_active_run_dir(config_of(tmp_path), None, OURS) == (None, None)


def test_unwritable_launch_file_is_one_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*launch\.json \(No such file or directory\); give"):
        relaunch.record_launch(tmp_path / "gone", OURS)


def test_process_ids_are_unique_and_stable() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        known = {relaunch._process_id(pid) for pid in (os.getpid(), other.pid, os.getppid())}
        assert relaunch._process_id(other.pid) in known
        other.kill()
    assert len(known) == 3
    _, boot, pid, started = relaunch._process_id(os.getpid()).rsplit(" ", 3)
    assert (len(boot), int(pid), int(started) > 0) == (36, os.getpid(), True)


def test_launchers_are_recorded_only_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert relaunch.launcher_ids() == []
    assert relaunch.record_launch(tmp_path, []) == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with alone():
        assert relaunch.launcher_ids() == [relaunch._process_id(os.getppid())]
