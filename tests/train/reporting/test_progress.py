"""The live line and the table of epochs, without training. Whole runs are in tests/train/test_terminal.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from configs.utils import console
from helpers.terminal import Terminal
from train.reporting.metrics_file import MetricsLine
from train.reporting.progress import EpochTable, LiveLine
from train.reporting.run_log import RunLog


def metrics(epoch: int, **changes: float | None) -> MetricsLine:
    values = {"epoch": epoch, "step": 5 * epoch + 5, "train_loss": 1.25, "train_top1": 0.5, "val_loss": 1.5,
              "val_top1": 0.87654, "lr": 0.00123, "images_per_s": 12345.6, "epoch_time_s": 8.12}  # fmt: skip
    return MetricsLine(values | changes)


def test_row_shows_epoch_from_one_and_accuracies_in_per_cent() -> None:
    table = EpochTable(30, "auto", 80)
    assert table.row(metrics(2), is_best=True).split() == (
        ["3/30", "1.2500", "50.00", "%", "1.5000", "87.65", "%", "*", "0.00123", "12,346", "8.1", "s"]
    )
    missing = dict.fromkeys(("val_loss", "val_top1", "images_per_s", "epoch_time_s"))
    row = table.row(metrics(29, train_loss=float("nan"), **missing), is_best=False)
    assert row.split() == ["30/30", "-", "50.00", "%", "-", "-", "0.00123", "-", "-"]


@pytest.mark.parametrize(
    ("epochs", "columns", "missing"),
    [(30, 100, ""), (30, 80, ""), (300, 80, ""), (30, 70, "lr"), (30, 50, "lr images/s train acc")],
)
def test_table_fits_the_terminal(epochs: int, columns: int, missing: str) -> None:
    table = EpochTable(epochs, "auto", columns)
    extreme = {"train_loss": -123.4567, "val_loss": 1e12, "lr": 1.23e-5, "images_per_s": 1234567, "train_top1": 1.0}
    lines = [table.header(), *(table.row(metrics(epoch, **extreme), is_best=True) for epoch in range(epochs))]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= columns
    titles = ["epoch", "train loss", "train acc", "val loss", "val acc", "lr", "images/s", "time"]
    assert [title for title in titles if title not in lines[0]] == [
        title for title in titles if missing and title in missing
    ]


@pytest.mark.parametrize(("weights", "shown"), [("auto", "99.00 %"), ("ema", "99.00 %"), ("raw", "87.65 %")])
def test_table_shows_the_weights_that_count(weights: str, shown: str) -> None:
    line = metrics(0, ema_val_top1=0.99, ema_val_loss=0.01)
    row = EpochTable(3, weights, 100).row(line, is_best=False)
    assert shown in row
    assert ("0.0100" in row) == (shown == "99.00 %")


def run_epochs(folder: Path, epochs: int, steps: int) -> None:
    with RunLog(folder, epochs=epochs) as log:
        log.info("a message before the epochs " * 6)
        for epoch in range(epochs):
            log.live.start_epoch(epoch, 0, steps, first=epoch * steps, total=epochs * steps)
            for step in range(steps):
                log.live.step()
                if step == 1:
                    log.log_step({"step_loss": 1.5, "lr": 1e-3, "images_per_s": 1000.0}, epoch * steps + step)
                    print(f"from a library, epoch {epoch + 1}", file=sys.stderr)
            log.live.evaluating()
            log.log_epoch(metrics(epoch), is_best=epoch == 0)


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_live_line_is_one_line_below_everything_else(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "REFRESH_S", 0)
    terminal = Terminal(columns)
    with terminal.opened():
        run_epochs(tmp_path, 3, 5)
    assert not terminal.wraps()
    lines = terminal.lines()
    assert [line.strip() for line in lines].count("from a library, epoch 2") == 1
    assert sum("87.65 %" in line for line in lines) == 3
    assert sum("val acc" in line for line in lines) == 1
    screens = terminal.screens()
    live = [[line for line in screen if re.match(r"(epoch|eval) \d", line)] for screen in screens]
    assert max(map(len, live)) == 1
    shown = {line[0] for line in live if line}
    assert any("epoch 2/3" in line and "3/5" in line and "loss 1.5000" in line for line in shown)
    assert any("1,000 images/s" in line for line in shown) == (columns >= 100)
    assert any(line.startswith("eval 3/3") for line in shown)
    assert all(not line or screen[-1] == line[0] for screen, line in zip(screens, live, strict=True))
    assert not live[-1]


@pytest.mark.parametrize("columns", [80, 100])
def test_live_line_leaves_room_for_the_echo_of_ctrl_c_and_removes_it(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "REFRESH_S", 0)
    terminal = Terminal(columns)
    with terminal.opened():
        live = LiveLine(3, is_shown=True)
        live.start_epoch(0, 0, 5, first=0, total=15)
        live.show(1.5, 0.01, 1000.0)
        live.step()
        os.write(sys.stderr.fileno(), b"^C")
        live.close()
    assert not terminal.wraps()
    assert not "".join(terminal.lines()).strip()


def test_redirected_progress_has_no_control_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_epochs(tmp_path, 3, 5)
    out, err = capsys.readouterr()
    assert err == "".join(f"from a library, epoch {epoch}\n" for epoch in (1, 2, 3))
    assert len(out.splitlines()) == 5  # a message, the header and three rows
    assert out.replace("\n", "").isprintable()
    log = (tmp_path / "log.txt").read_text()
    assert log.count(": loss 1.5, lr 0.001, 1,000 images/s") == 3
    assert [f" epoch {epoch}: train_loss 1.25" in log for epoch in range(5)] == [False, True, True, True, False]
