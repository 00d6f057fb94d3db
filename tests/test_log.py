"""The records of a run: log.txt, metrics.jsonl, curves.png, and W&B, which must never be a reason to fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from train_fixtures import CLEAN, strict_lines

from configs.schema import WandbConfig
from train import figures
from train.log import RunLog, read_metrics


def metrics(epoch: int, **changes: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.7, "val_top1": 0.4, **changes}


def run_log(folder: Path, *epochs: dict[str, Any]) -> RunLog:
    folder.mkdir(exist_ok=True)
    written = RunLog(folder)
    for line in epochs:
        written.epoch(line)
    return written


def test_what_is_said_goes_to_the_console_and_to_log_txt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path).say("hello")
    RunLog(tmp_path).say("hello again, after a restart")
    on_disk = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in on_disk] == ["hello", "hello again, after a restart"]
    assert capsys.readouterr().out.splitlines() == on_disk


def test_ranks_without_a_folder_write_and_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    silent = RunLog(None)
    silent.say("hello")
    silent.start_wandb(WandbConfig(project="zhu", mode="offline"), {})
    silent.keep_epochs(3)
    silent.epoch(metrics(0))
    silent.draw()
    silent.finish()
    assert silent.is_silent
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# metrics.jsonl


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path: Path) -> None:
    run_log(tmp_path, metrics(0, train_loss=float("nan"), val_loss=float("inf")), metrics(1))
    assert strict_lines(tmp_path / "metrics.jsonl") == [metrics(0, train_loss=None, val_loss=None), metrics(1)]
    assert "train_loss nan" in (tmp_path / "log.txt").read_text()


def test_epochs_that_a_resumed_run_repeats_are_dropped(tmp_path: Path) -> None:
    written = run_log(tmp_path, *(metrics(epoch) for epoch in range(5)))
    written.keep_epochs(3)
    assert [line["epoch"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    written.epoch(metrics(3))
    assert [line["epoch"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    written = run_log(tmp_path, metrics(0), metrics(1))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert read_metrics(tmp_path) == [metrics(0)]
    written.keep_epochs(5)
    written.epoch(metrics(1))
    assert strict_lines(path) == [metrics(0), metrics(1)]


# curves.png


def test_the_curves_contain_the_last_epoch_when_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = figures.curves
    monkeypatch.setattr(figures, "curves", lambda lines, title: drawn.append(len(lines)) or draw(lines, title))
    written = run_log(tmp_path, *(metrics(epoch) for epoch in range(4)))
    assert drawn == [1]  # at once, and then not at every epoch
    written.finish()
    assert drawn == [1, 4]


# W&B


def test_wandb_is_not_imported_without_a_project(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from configs.schema import WandbConfig; from train.log import RunLog\n"
        f"log = RunLog(Path({str(tmp_path)!r})); log.start_wandb(WandbConfig(), {{}}); log.epoch({{'epoch': 0}})\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env=CLEAN, check=False).returncode == 0


class FakeRun:
    def __init__(self, fail_at: str = "") -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self._fail_at = fail_at

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self._fail_at == "log":
            raise ConnectionError("the network is gone")
        self.logged.append(values)

    def finish(self) -> None:
        if self._fail_at == "finish":
            raise ConnectionError("the network is gone")
        self.finished = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The arguments of each wandb.init, which returns a run that only remembers; no login."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return calls


@pytest.mark.parametrize(
    ("mode", "login", "expected"),
    [
        ("auto", None, "offline"),
        ("auto", "key", "online"),
        ("auto", "netrc", "online"),
        ("offline", "key", "offline"),
        ("online", None, "online"),
    ],
)
def test_auto_is_online_with_a_login_and_offline_without(
    mode: Any, login: str | None, expected: str, started: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if login == "netrc":
        (tmp_path / "home").mkdir()
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text("machine api.wandb.ai login user password 0123\n")
        netrc.chmod(0o600)
    run_log(tmp_path / "run").start_wandb(WandbConfig(project="zhu", mode=mode), {})
    assert [arguments["mode"] for arguments in started] == [expected]


def test_wandb_gets_the_section_the_config_and_every_epoch(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, init = FakeRun(), wandb.init
    monkeypatch.setattr(wandb, "init", lambda **arguments: (init(**arguments), fake)[1])
    section = WandbConfig(project="zhu", entity="team", group="sweep", tags=("a", "b"))
    written = run_log(tmp_path / "run")
    written.start_wandb(section, {"seed": 3})
    written.epoch(metrics(0))
    written.finish()
    (arguments,) = started
    assert (arguments["project"], arguments["entity"], arguments["group"]) == ("zhu", "team", "sweep")
    assert (arguments["tags"], arguments["config"], arguments["name"]) == (("a", "b"), {"seed": 3}, "run")
    assert arguments["dir"] == str(tmp_path / "run")
    assert fake.logged == [metrics(0)]
    assert fake.finished


def test_a_resumed_run_goes_on_under_its_wandb_id(started: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("one", "one", "two"):
        run_log(tmp_path / name).start_wandb(WandbConfig(project="zhu"), {})
    first, resumed, other = started
    assert first["id"] == resumed["id"] != other["id"]
    assert resumed["resume"] == "allow"


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_wandb_that_fails_later_is_reported_and_does_not_stop_the_run(
    failing: str, started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(fail_at=failing))
    written = run_log(tmp_path / "run")
    written.start_wandb(WandbConfig(project="zhu"), {})
    written.epoch(metrics(0))
    written.epoch(metrics(1))
    written.finish()
    assert len(strict_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run" / "log.txt").read_text().count("the network is gone") == 1


def test_without_a_login_an_offline_run_lies_in_the_run_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from configs.schema import WandbConfig; from train.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1])); log.start_wandb(WandbConfig(project='zhu'), {'seed': 3})\n"
        "log.epoch({'epoch': 0, 'train_loss': 0.5}); log.finish()"
    )
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, env={**CLEAN, "HOME": str(home)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    assert folder.name.endswith(run_id)
    assert b"train_loss" in (folder / f"run-{run_id}.wandb").read_bytes()
    assert "W&B is off" not in (tmp_path / "run" / "log.txt").read_text()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["epoch"] == 0
