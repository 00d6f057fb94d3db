"""The log of a run: log.txt, metrics.jsonl, curves.png. Trackers are in test_trackers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.schema import LogConfig, WandbConfig
from configs.utils.errors import UserError
from helpers.training import file_size_limit, strict_lines
from train.reporting import figures
from train.reporting.metrics_file import MetricsLine, read_metrics
from train.reporting.run_log import RunLog


def metrics(epoch: int, **changes: float | None) -> MetricsLine:
    line = {"epoch": epoch, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.7, "val_top1": 0.4, **changes}
    return MetricsLine(line)


def run_log(folder: Path, *epochs: MetricsLine) -> RunLog:
    folder.mkdir(exist_ok=True)
    written = RunLog(folder)
    for line in epochs:
        written.log_epoch(line)
    return written


def test_messages_go_to_the_console_and_log_txt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path).info("hello")
    RunLog(tmp_path).info("hello again, after a restart")
    on_disk = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in on_disk] == ["hello", "hello again, after a restart"]
    assert capsys.readouterr().out == "hello\nhello again, after a restart\n"


def test_log_without_a_folder_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    silent = RunLog(None)
    silent.info("hello")
    silent.start_trackers(LogConfig(wandb=WandbConfig(project="zhu", mode="offline"), tensorboard=True), {}, 0)
    silent.drop_epochs_from(3)
    silent.log_epoch(metrics(0))
    silent.draw_curves()
    silent.finish()
    assert silent.is_disabled
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_unwritable_log_lines_are_reported_once_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    log.info("a first line")
    with file_size_limit((tmp_path / "log.txt").stat().st_size):
        for number in range(3):
            log.info(f"line {number}")
        log.finish()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["a first line", "line 0", "line 1", "line 2"]
    assert captured.err == "warning: lines of the log are lost ([Errno 27] File too large)\n"
    assert "a first line" in (tmp_path / "log.txt").read_text()


def test_failed_write_is_one_error_and_keeps_the_file(tmp_path: Path) -> None:
    log = run_log(tmp_path, metrics(0))
    log.write_config("seed: 0\n", {})
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "facts.json", "metrics.jsonl")}
    with file_size_limit(0):
        for name, write in (
            ("config.yaml", lambda: log.write_config("seed: 1\n", {})),
            ("metrics.jsonl", lambda: log.drop_epochs_from(1)),
            ("metrics.jsonl", lambda: log.log_epoch(metrics(1))),
        ):
            with pytest.raises(
                UserError, match=rf"cannot write .*{name} \(File too large\): free space, or move"
            ) as error:
                write()
            assert len(str(error.value).splitlines()) == 1
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert list(tmp_path.glob("*.tmp")) == []


def test_unwritable_log_is_one_user_error(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*log\.txt \(Is a directory\)"):
        RunLog(tmp_path)


# metrics.jsonl


def test_nonfinite_metrics_are_written_as_null(tmp_path: Path) -> None:
    run_log(tmp_path, metrics(0, train_loss=float("nan"), val_loss=float("inf")), metrics(1))
    assert strict_lines(tmp_path / "metrics.jsonl") == [metrics(0, train_loss=None, val_loss=None), metrics(1)]
    assert "train_loss nan" in (tmp_path / "log.txt").read_text()


def test_epochs_that_a_resumed_run_repeats_are_dropped(tmp_path: Path) -> None:
    written = run_log(tmp_path, *(metrics(epoch) for epoch in range(5)))
    written.drop_epochs_from(3)
    assert [line["epoch"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    written.log_epoch(metrics(3))
    assert [line["epoch"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    written = run_log(tmp_path, metrics(0), metrics(1))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert read_metrics(tmp_path) == [metrics(0)]
    written.drop_epochs_from(5)
    written.log_epoch(metrics(1))
    assert strict_lines(path) == [metrics(0), metrics(1)]


# curves.png


def test_unwritable_curves_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "curves.png").mkdir()  # a file cannot be renamed to it
    written = run_log(tmp_path, metrics(0))
    assert f"cannot write {tmp_path / 'curves.png'}" in capsys.readouterr().out
    written.log_epoch(metrics(1))
    assert len(read_metrics(tmp_path)) == 2


def test_metrics_damaged_during_a_run_do_not_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run_log(tmp_path, metrics(0, step=5))
    written.start_trackers(LogConfig(tensorboard=True), {}, 0)
    assert written.has_trackers
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    written.log_epoch(metrics(1, step=10))
    written.finish()
    shown = capsys.readouterr().out
    assert shown.count("metrics.jsonl:1 is not a line of a run's metrics") == 2  # after the epoch and at the end


def test_curves_name_the_loss_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    save = figures.save

    def note(figure: Any, path: Path) -> None:
        labels.extend(line.get_label() for line in figure.axes[0].lines)
        save(figure, path)

    monkeypatch.setattr(figures, "save", note)
    log = RunLog(tmp_path, loss="bce")
    log.log_epoch(metrics(0))
    log.finish()
    assert labels[:2] == ["train, binary cross-entropy", "validation, cross-entropy"]


def test_final_curves_contain_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = figures.curves
    monkeypatch.setattr(figures, "curves", lambda lines, *rest: drawn.append(len(lines)) or draw(lines, *rest))
    written = run_log(tmp_path, *(metrics(epoch) for epoch in range(4)))
    assert drawn == [1]  # immediately, then not at every epoch
    written.finish()
    assert drawn == [1, 4]
