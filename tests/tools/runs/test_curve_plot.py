"""Tests of tools.runs.curve_plot."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.run_folders import make_run, metrics_line
from tools.runs import curve_plot
from tools.runs.records import curve_rows, read_run
from train.reporting import figures


def test_diverged_run_does_not_flatten_other_curves(tmp_path: Path) -> None:
    bad = [
        metrics_line(0, train_loss=9e6, val_loss=8e9),
        metrics_line(1, train_loss=None, val_loss=None, val_top1=0.1),
        metrics_line(2, train_loss=3.0),
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
    unevaluated = metrics_line(1, val_loss=None, val_top1=None, val_top5=None)
    record = read_run(make_run(tmp_path / "run", lines=[metrics_line(0), unevaluated, metrics_line(2)]))
    figure = curve_plot.plot_curves([record], ["run"], "test")
    assert list(figure.axes[1].lines[0].get_xdata()) == [1, 3]
    assert figure.axes[1].get_title() == ""


def test_dollar_signs_in_names_are_drawn_literally(tmp_path: Path) -> None:
    names = ["a$\\b$", "_$x$"]
    records = [
        read_run(make_run(tmp_path / run, lines=[metrics_line(0), metrics_line(1, train_loss=None)]))
        for run in ("a", "b")
    ]
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
        ([plain, binary], "train loss"),
    ):
        train, val, *_ = curve_plot.plot_curves(records, ["a", "b"][: len(records)], "test").axes
        assert (train.get_ylabel(), val.get_ylabel()) == (expected, "validation loss (cross-entropy)")


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
    folders = [make_run(tmp_path / f"run{n}", lines=[metrics_line(0, val_top1=n / 100)]) for n in range(count)]
    names = [f"run{n}" for n in range(count)]
    figure = curve_plot.plot_curves([read_run(folder) for folder in folders], names, "test")
    legend = [text.get_text().split(" ")[0] for text in figure.legends[0].get_texts()]
    assert legend == [*names[3:], "others"]


def test_moving_average_is_dotted_in_the_runs_color(tmp_path: Path) -> None:
    both = [metrics_line(epoch, ema_val_loss=1.5 - epoch / 2, ema_val_top1=0.25 + epoch / 8) for epoch in range(3)]
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
