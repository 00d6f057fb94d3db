"""Tests of tools.runs.sweep_plots."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.sweeps import points_of
from tools.runs.sweep_plots import plot_values
from train.reporting import figures

VARIANTS = (
    "plain: aug.crop=none aug.flip=0",
    "TrivialAugment, erasing: aug.auto=trivialaugment aug.erase.probability=0.5",
    "_$x$: aug.flip=0.5",
)
NAMES = ["plain", "TrivialAugment, erasing", "_$x$"]


def figure_of(*axes: str, variants: tuple[str, ...] = ()) -> Any:
    found = points_of(*axes, variants=variants)
    table = [{"best_val_top1": 0.1 * n, "training_time_s": 10.0 + n} for n in range(len(found))]
    return plot_values(found, table, "test")


def test_plot_kind_depends_on_number_of_numeric_settings() -> None:
    axis, times = figure_of("train.lr=1e-2,1e-4,1e-3").axes
    assert list(axis.lines[0].get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.0])
    assert list(times.lines[0].get_ydata()) == [11.0, 12.0, 10.0]
    assert (axis.get_xscale(), axis.get_xlabel()) == ("log", "train.lr")
    assert figure_of("aug.flip=0,0.25,0.5").axes[0].get_xscale() == "linear"
    both = figure_of("train.lr=1e-3,1e-2", "aug.crop=none,pad")
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["aug.crop=none", "aug.crop=pad"]
    shown = figure_of("train.lr=1e-3,1e-2", "seed=1,2,3").axes[0].get_images()[0].get_array()
    assert shown.ravel().tolist() == pytest.approx([0.0, 0.3, 0.1, 0.4, 0.2, 0.5])  # one row per seed
    assert figure_of("aug.crop=none,pad") is None


def test_each_variant_has_a_bar_with_its_given_name() -> None:
    figure = figure_of(variants=VARIANTS)
    for axis, expected in zip(figure.axes, ([0, 0.1, 0.2], [10, 11, 12]), strict=True):
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(expected)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == NAMES
    assert [point.name for point in points_of(variants=VARIANTS)] == ["plain", "TrivialAugment,_erasing", "__x_"]
    figures.render(figure)


def test_variants_share_bars_over_seeds_and_draw_lines_over_numbers() -> None:
    figure = figure_of("seed=1,2,3", variants=VARIANTS)  # of variant n the runs n, n + 3, n + 6
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == NAMES
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.3, 0.4, 0.5])
    figure = figure_of("train.lr=1e-3,1e-2", variants=VARIANTS)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [
        pytest.approx([0.0, 0.3]), pytest.approx([0.1, 0.4]), pytest.approx([0.2, 0.5]),
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    figure = figure_of("train.channels_last=true,false", variants=VARIANTS)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[1] == "TrivialAugment, erasing, channels_last=true"
    assert len(set(labels)) == 6


def test_unknown_results_leave_gaps() -> None:
    for axes, variants in ((["train.lr=1e-3,1e-2"], ()), (["train.lr=1e-3,1e-2", "seed=1,2"], ()), ([], VARIANTS)):
        found = points_of(*axes, variants=tuple(variants))
        table: list[dict[str, Any]] = [{"best_val_top1": 0.5, "training_time_s": None} for _ in found]
        table[-1] = {"best_val_top1": None, "training_time_s": 3.0}
        for results in (table, [dict.fromkeys(one) for one in table]):
            figure = plot_values(found, results, "test")
            assert figure is not None
            figures.render(figure)
