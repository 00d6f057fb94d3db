"""Tests of tools/compare.py: the table of settings and results, and the plot of all curves."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from helpers.training import DIGITS, Run
from tools import compare
from tools.runs import curve_plot
from tools.runs.records import comparison_rows, curve_rows, find_runs, read_run, run_labels
from train.reporting import figures


def line(epoch: int, **changes: Any) -> dict[str, Any]:
    values = {
        "train_loss": 2 / (epoch + 1),
        "train_top1": 0.3,
        "val_loss": 2.1 / (epoch + 1),
        "val_top1": 0.2 + epoch / 10,
    }
    speeds = {"lr": 1e-3, "images_per_s": 100.0 * (epoch + 1), "epoch_time_s": 2.0, "memory_gib": 1.0 + epoch}
    return {"epoch": epoch, **values, "val_top5": 0.9, **speeds, **changes}


def make_run(folder: Path, *settings: str, lines: list[dict[str, Any]] | None = None, batch: int | None = 64) -> Path:
    """Write a run folder with three epochs."""
    folder.mkdir(parents=True)
    config = load_config(DIGITS, ["train.epochs=3", *settings], name=folder.name, output=str(folder.parent))
    (folder / "config.yaml").write_text(to_yaml(config))
    metrics = [line(0), line(1), line(2)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    if batch is not None:
        (folder / "facts.json").write_text(json.dumps({"global_batch": batch}))
    return folder


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


def test_table_has_differing_settings_and_results(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", "aug.flip=0", "train.optimizer.betas=[0.9,0.95]", batch=256),
        make_run(tmp_path / "b", "aug.flip=0.5", "data.threads=1", lines=[line(0), line(1, epoch_time_s=6.0)]),
    ]
    first, second = comparison_rows([read_run(folder) for folder in folders], ["a", "b"])
    assert list(first) == [
        "run", "status", "model", "lr", "optimizer", "weight_decay", "epochs", "global_batch", "aug.flip",
        "train.optimizer.betas", "best_val_top1", "best_epoch", "train_top1", "train_loss", "training_time_s",
        "images_per_s", "memory_gib", "time_ratio",
    ]  # fmt: skip
    assert (first["aug.flip"], first["train.optimizer.betas"], first["global_batch"]) == (0.0, "[0.9,0.95]", 256)
    assert (first["best_val_top1"], first["best_epoch"]) == (0.4, 3)
    assert (second["training_time_s"], second["images_per_s"], second["memory_gib"]) == (8.0, 150.0, 2.0)


def test_unrecorded_global_batch_falls_back_to_batch_per_rank(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", batch=None), make_run(tmp_path / "b", "train.accumulation_steps=2")]
    rows = comparison_rows([read_run(folder) for folder in folders], ["a", "b"])
    assert [row["batch_per_rank"] for row in rows] == [64, 128]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"lenet": ["train.lr=1e-3"], "alexnet": ["train.lr=1e-2"]}, ["lenet", "alexnet"]),
        ({"x" * 40: ["train.lr=1e-3"], "y" * 40: ["train.lr=1e-2"]}, ["train.lr=0.001", "train.lr=0.01"]),
        ({"run": ["name=run", "seed=1"], "run-2": ["name=run", "seed=2"]}, ["seed=1", "seed=2"]),
        ({"run": ["name=run"], "run-2": ["name=run"]}, ["run", "run-2"]),
        ({"a/run": ["aug.flip=0"], "b/run": ["aug.flip=0.5"]}, ["aug.flip=0", "aug.flip=0.5"]),
    ],
    ids=["short names", "long names", "numbered names", "nothing differs", "same names"],
)
def test_labels_show_differing_settings(runs: dict[str, list[str]], expected: list[str], tmp_path: Path) -> None:
    records = []
    for name, settings in runs.items():
        folder = make_run(tmp_path / name)
        named = {"name": Path(name).name} if not any(text.startswith("name=") for text in settings) else {}
        config = load_config(DIGITS, settings, output=str(folder.parent), **named)
        (folder / "config.yaml").write_text(to_yaml(config))
        records.append(read_run(folder))
    assert run_labels(records) == expected


def test_folder_of_runs_is_expanded_in_natural_order_without_duplicates(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("run-10", "run-2", "lr=0.001", "lr=1e-05")]
    (tmp_path / "no run").mkdir()
    assert find_runs([tmp_path]) == folders[::-1]
    assert find_runs([folders[0], tmp_path]) == [folders[0], folders[3], folders[2], folders[1]]


def test_diverged_run_does_not_flatten_other_curves(tmp_path: Path) -> None:
    bad = [
        line(0, train_loss=9e6, val_loss=8e9),
        line(1, train_loss=None, val_loss=None, val_top1=0.1),
        line(2, train_loss=3.0),
    ]
    folders = [
        make_run(tmp_path / "good"),
        make_run(tmp_path / "bad", lines=bad),
        make_run(tmp_path / "none", lines=[]),
    ]
    records = [read_run(folder) for folder in folders]
    figure = curve_plot.plot_curves(records, ["good", "bad", "none"], "test")
    train_loss, val_loss, _, val_top1 = figure.axes
    assert train_loss.get_ylim()[1] < 4
    assert train_loss.get_title() == "not shown: nan or infinite: bad; above 3: bad"
    drawn = train_loss.lines[1].get_ydata()
    assert math.isnan(drawn[1])
    assert drawn[2] == 3.0
    assert val_loss.get_ylim()[0] < 0.7
    assert list(val_top1.lines[1].get_ydata()) == [0.2, 0.1, 0.4]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["good", "bad", "none (0 of 3 epochs)"]
    assert [row["train_loss"] for row in curve_rows(records, ["good", "bad", "none"])[3:]] == [9e6, None, 3.0]


def test_unevaluated_epochs_leave_no_gap(tmp_path: Path) -> None:
    unevaluated = line(1, val_loss=None, val_top1=None, val_top5=None)
    record = read_run(make_run(tmp_path / "run", lines=[line(0), unevaluated, line(2)]))
    figure = curve_plot.plot_curves([record], ["run"], "test")
    assert list(figure.axes[1].lines[0].get_xdata()) == [1, 3]
    assert figure.axes[1].get_title() == ""


def test_dollar_signs_in_names_are_drawn_literally(tmp_path: Path) -> None:
    names = ["a$\\b$", "_$x$"]
    records = [read_run(make_run(tmp_path / run, lines=[line(0), line(1, train_loss=None)])) for run in ("a", "b")]
    figure = curve_plot.plot_curves(records, names, names[0])
    figures.render(figure)
    assert [text.get_text().removesuffix(" (2 of 3 epochs)") for text in figure.legends[0].get_texts()] == names
    figures.render(figures.curves(records[0].metrics, names[0]))


def test_train_loss_label_follows_runs_and_validation_is_cross_entropy(tmp_path: Path) -> None:
    plain = read_run(make_run(tmp_path / "plain"))
    binary = read_run(make_run(tmp_path / "binary", "train.loss=bce"))
    for records, expected in (
        ([plain], "train loss (cross-entropy)"),
        ([binary], "train loss (binary cross-entropy)"),
        ([plain, binary], "train loss (cross-entropy or binary cross-entropy)"),
    ):
        train, val, *_ = curve_plot.plot_curves(records, ["a", "b"][: len(records)], "test").axes
        assert (train.get_ylabel(), val.get_ylabel()) == (expected, "validation loss (cross-entropy)")


def test_unknown_epoch_time_gives_no_total_or_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"epoch_time_s": None, "images_per_s": None, "data_wait_fraction": None}
    folders = [
        make_run(tmp_path / "known"),
        make_run(tmp_path / "partly", lines=[line(0, **unknown), line(1), line(2)]),
        make_run(tmp_path / "unknown", lines=[line(epoch, **unknown) for epoch in range(3)]),
    ]
    for order in (folders, folders[::-1]):
        call(monkeypatch, *order, "--out", tmp_path / "out")
        with (tmp_path / "out" / "comparison.csv").open() as file:
            found = {row["run"]: (row["training_time_s"], row["time_ratio"]) for row in csv.DictReader(file)}
        ratio = "1.0" if order[0].name == "known" else ""
        assert found == {"known": ("6.0", ratio), "partly": ("", ""), "unknown": ("", "")}
    assert "| unknown " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([[2.3, 1.2], [2.2, 1.0]], (1.0, 2.3)),
        ([[2.3, 1.2], [1e5, 2.0]], (1.2, 2.3)),
        ([[2.3, 1.2], [1e5, 1e6], [1e7]], (1.2, 2.3)),  # most have diverged
        ([[2.3, 0.1], [0.02, 0.01]], (0.01, 2.3)),  # one started from trained weights
        ([[2.3, 0.1], [1.0, 6.0]], (0.1, 6.0)),  # overfitting is not divergence
        ([[1e5], []], (1e5, 1e5)),
        ([], (0.0, 1.0)),
    ],
)
def test_loss_range_covers_the_runs_that_learn(losses: list[list[float]], expected: tuple[float, float]) -> None:
    assert curve_plot.loss_range(losses) == expected


def test_many_runs_color_only_the_best(tmp_path: Path) -> None:
    count = curve_plot.MAX_COLORED + 3
    folders = [make_run(tmp_path / f"run{n}", lines=[line(0, val_top1=n / 100)]) for n in range(count)]
    names = [f"run{n}" for n in range(count)]
    figure = curve_plot.plot_curves([read_run(folder) for folder in folders], names, "test")
    legend = [text.get_text().split(" ")[0] for text in figure.legends[0].get_texts()]
    assert legend == [*names[3:], "others"]


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


def test_moving_average_is_dotted_in_the_runs_color(tmp_path: Path) -> None:
    both = [line(epoch, ema_val_loss=1.5 - epoch / 2, ema_val_top1=0.25 + epoch / 8) for epoch in range(3)]
    averaged = make_run(tmp_path / "averaged", "train.ema.decay=0.9", lines=both)
    plain = make_run(tmp_path / "plain")
    figure = curve_plot.plot_curves([read_run(averaged), read_run(plain)], ["averaged", "plain"], "test")
    dotted = [[drawn for drawn in axis.lines if drawn.get_linestyle() == ":"] for axis in figure.axes]
    assert [len(drawn) for drawn in dotted] == [0, 1, 0, 1]
    assert list(dotted[1][0].get_ydata()) == [1.5, 1.0, 0.5]
    assert list(dotted[3][0].get_ydata()) == [0.25, 0.375, 0.5]
    whole = [drawn for drawn in figure.axes[1].lines if drawn.get_linestyle() != ":"]
    assert dotted[1][0].get_color() == whole[0].get_color() != whole[1].get_color()
    assert figure.axes[1].get_ylim()[0] < 0.5
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["averaged", "plain", "validation of a moving average"]
    alone = figures.curves(both, "test")
    assert [drawn.get_label() for drawn in alone.axes[1].lines] == ["train", "validation", "validation, moving average"]
    figures.save(figure, tmp_path / "comparison.png")
    figures.save(alone, tmp_path / "curves.png")
