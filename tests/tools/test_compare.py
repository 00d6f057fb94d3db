"""Tests of tools/compare.py: the table of settings and results, and the plot of all curves."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from configs.utils.errors import UserError
from helpers.run_folders import make_run, metrics_line
from helpers.training import Run
from tools import compare


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    compare.main()


def test_finished_and_unfinished_runs_are_compared(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = Path(shutil.copytree(digits_run.folder, tmp_path / "other"))
    text = (running / "metrics.jsonl").read_text()
    (running / "metrics.jsonl").write_text(text[: len(text) - 40])  # the last line is incomplete
    config = (running / "config.yaml").read_text().replace("name: digits_lenet", "name: other")
    (running / "config.yaml").write_text(config.replace("lr: 0.006", "lr: 0.002"))
    call(monkeypatch, digits_run.folder, running, "--out", tmp_path / "out")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        finished, unfinished = csv.DictReader(file)
    lines = [json.loads(one) for one in text.splitlines()]
    assert (finished["run"], finished["status"]) == ("digits_lenet", "finished")
    assert (unfinished["run"], unfinished["status"]) == ("other", "running or stopped at epoch 1 of 2")
    assert [finished["lr"], unfinished["lr"]] == ["0.006", "0.002"]
    assert float(finished["best_val_top1"]) == max(one["val_top1"] for one in lines)
    assert float(finished["training_time_s"]) == sum(one["epoch_time_s"] for one in lines)
    assert float(finished["time_ratio"]) == 1
    assert unfinished["time_ratio"] == ""
    assert finished["global_batch"] == "64"  # as the run itself has logged it
    with (tmp_path / "out" / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [(one["run"], one["epoch"]) for one in points] == [
        ("digits_lenet", "1"),
        ("digits_lenet", "2"),
        ("other", "1"),
    ]
    assert [float(one["val_loss"]) for one in points[:2]] == [one["val_loss"] for one in lines]
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > 1000
    assert "| other " in capsys.readouterr().out


def test_unknown_epoch_time_gives_no_total_or_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"epoch_time_s": None, "images_per_s": None, "data_wait_fraction": None}
    folders = [
        make_run(tmp_path / "known"),
        make_run(tmp_path / "partly", lines=[metrics_line(0, **unknown), metrics_line(1), metrics_line(2)]),
        make_run(tmp_path / "unknown", lines=[metrics_line(epoch, **unknown) for epoch in range(3)]),
    ]
    for order in (folders, folders[::-1]):
        call(monkeypatch, *order, "--out", tmp_path / "out")
        with (tmp_path / "out" / "comparison.csv").open() as file:
            found = {row["run"]: (row["training_time_s"], row["time_ratio"]) for row in csv.DictReader(file)}
        ratio = "1.0" if order[0].name == "known" else ""
        assert found == {"known": ("6.0", ratio), "partly": ("", ""), "unknown": ("", "")}
    assert "| unknown " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        ("", ["nowhere"], "nowhere is not a folder; give run folders"),
        ("empty", ["empty"], "empty contains no run"),
        ("run", ["run", "--labels", "a", "b"], "--labels gives 2 names for 1 runs"),
        ("broken", ["broken"], "config.yaml: while parsing|broken/config.yaml"),
    ],
)
def test_bad_input_is_a_one_line_error(
    make: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if make == "run":
        make_run(tmp_path / make)
    elif make:
        (tmp_path / make).mkdir()
    if make == "broken":
        (tmp_path / make / "config.yaml").write_text("[")
    with pytest.raises(UserError) as caught:
        call(monkeypatch, *arguments)
    assert re.search(message, str(caught.value))
    assert not (tmp_path / "output").exists()
