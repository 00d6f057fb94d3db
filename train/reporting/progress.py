"""Show the progress of a run: a live line at the bottom of the terminal, and a table with one row per epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from math import isnan
from typing import Any

from tqdm import tqdm

from configs.utils.console import bar_options, duration, other_output_above_bars
from train.reporting.metrics_file import MetricsLine, counted_average

# tqdm cuts off what exceeds the terminal's width.
WIDE = "{what} {bar} step {n_fmt}/{total_fmt}  {values}{remaining} left, run {run_left}"
NARROW = "{what} {n_fmt}/{total_fmt} {values}{remaining} left, run {run_left} {bar}"  # the bar is cut off first
WIDE_VALUES, NARROW_VALUES = "loss {}  lr {}  {} images/s  ", "loss {} lr {} {} img/s "
WIDE_COLUMNS = 99  # of a terminal of 100, of which tqdm leaves one free
ECHO_COLUMNS = 2  # left free for the ^C that the terminal shows, so that it does not wrap the line

COLUMN_WIDTHS = {
    "epoch": 5,
    "train loss": 10,
    "train acc": 9,
    "val loss": 8,
    "val acc": 10,
    "lr": 8,
    "images/s": 9,
    "time": 7,
}
OPTIONAL_COLUMNS = ("lr", "images/s", "train acc", "time", "train loss")  # in the order in which a terminal lacks room
BEST_MARK = " *"


class _LiveBar(tqdm):
    """A bar of the steps of an epoch, whose line also shows the run."""

    what = ""
    values: tuple[str, ...] = ()  # loss, learning rate, images/s
    first, total_of_run = 0, 0  # steps of the run before this epoch, and in all
    start_step, start_s = 0, 0.0  # step of the run at which this process started, and when

    @property
    def format_dict(self) -> dict[str, Any]:
        base = dict(super().format_dict)
        is_wide = (base["ncols"] or 0) >= WIDE_COLUMNS
        done = self.first + self.n
        step_s = (time.monotonic() - self.start_s) / max(done - self.start_step, 1)  # with evaluation and saving
        left = tqdm.format_interval((self.total_of_run - done) * step_s) if done > self.start_step else "?"
        return base | {
            "ncols": base["ncols"] and max(base["ncols"] - ECHO_COLUMNS, 1),
            "bar_format": WIDE if is_wide else NARROW,
            "what": self.what,
            "values": (WIDE_VALUES if is_wide else NARROW_VALUES).format(*self.values) if self.values else "",
            "run_left": left,
        }

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that draws the line. Unlike tqdm's, it also removes what the terminal showed after it."""

        def draw(text: str) -> None:
            file.write(f"\r{text}\x1b[K")  # erase to the end of the line
            file.flush()

        return draw


class LiveLine:
    """The last line of the terminal during training. It is shown only on a terminal.

    It is redrawn a few times a second at most, and shows the numbers that training has last read for its log. So it
    never waits for the device. While it is shown, output of other Python code appears above it.

    Args:
        epochs: The value of train.epochs.
        is_shown: Whether this process may show the line.
    """

    def __init__(self, epochs: int, *, is_shown: bool) -> None:
        self._epochs, self._is_shown = epochs, is_shown
        self._bar: _LiveBar | None = None
        self._stack = ExitStack()

    def start_epoch(self, epoch: int, step: int, steps: int, *, first: int, total: int) -> None:
        """Show the start of an epoch.

        Args:
            epoch: The epoch, counted from 0.
            step: Steps already done in the epoch.
            steps: Number of steps in the epoch.
            first: Number of steps in all earlier epochs.
            total: Number of steps in the run.
        """
        bar = self._bar
        if bar is None:
            bar = self._bar = _LiveBar(**bar_options(is_shown=self._is_shown), delay=1e-9)  # not drawn before `reset`
            self._stack.callback(bar.close)
            if not bar.disable:
                self._stack.enter_context(other_output_above_bars())
            bar.start_step, bar.start_s = first + step, time.monotonic()
        bar.what, bar.first, bar.total_of_run = f"epoch {epoch + 1}/{self._epochs}", first, total
        bar.reset(steps)
        bar.initial = bar.n = bar.last_print_n = step

    def step(self) -> None:
        """Count an optimizer step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, loss: float | None, lr: float | None, images_per_s: float | None) -> None:
        """Show these values from the next time that the line is redrawn."""
        if self._bar is not None:
            self._bar.values = _loss(loss), _cell(lr, ".3g"), _cell(images_per_s, ",.0f")

    def evaluating(self) -> None:
        """Show that the epoch is being evaluated, as `eval 3/30`."""
        if self._bar is not None:
            self._bar.what = self._bar.what.replace("epoch", "eval")
            self._bar.refresh()

    def close(self) -> None:
        """Remove the line from the terminal."""
        self._stack.close()
        self._bar = None


class EpochTable:
    """Formats the metrics of each epoch as a row of a table that fits the terminal.

    Args:
        epochs: The value of train.epochs.
        weights: The value of eval.weights, which selects the validation results to show.
        columns: Width of the terminal. 74 columns or fewer show only a part of the table.
    """

    def __init__(self, epochs: int, weights: str, columns: int) -> None:
        self._epochs, self._weights = epochs, weights
        self._widths = COLUMN_WIDTHS | {"epoch": max(len("epoch"), len(f"{epochs}/{epochs}"))}
        self._gap = "  "
        if self._width() > columns:
            self._gap = " "
        for name in OPTIONAL_COLUMNS:
            if self._width() > columns:
                del self._widths[name]

    def _width(self) -> int:
        return sum(self._widths.values()) + len(self._gap) * (len(self._widths) - 1)

    def header(self) -> str:
        """Return the titles of the columns."""
        return self._line({name: name for name in self._widths} | {"val acc": "val acc" + " " * len(BEST_MARK)})

    def row(self, metrics: MetricsLine, *, is_best: bool) -> str:
        """Return the row of an epoch, with accuracies in per cent.

        Args:
            metrics: The metrics of the epoch.
            is_best: Whether to mark the validation accuracy as a new best.
        """
        average = counted_average(metrics, self._weights)
        lr, rate, time_s = (metrics.get(name) for name in ("lr", "images_per_s", "epoch_time_s"))
        mark = BEST_MARK if is_best else " " * len(BEST_MARK)
        return self._line(
            {
                "epoch": f"{metrics.epoch + 1}/{self._epochs}",
                "train loss": _loss(metrics.get("train_loss")),
                "train acc": _per_cent(metrics.get("train_top1")),
                "val loss": _loss(metrics.get(f"{average}val_loss")),
                "val acc": _per_cent(metrics.get(f"{average}val_top1")) + mark,
                "lr": _cell(lr, ".3g"),
                "images/s": _cell(rate, ",.0f"),
                "time": "-" if time_s is None or isnan(time_s) else duration(time_s),
            }
        )

    def _line(self, cells: dict[str, str]) -> str:
        return self._gap.join(cells[name].rjust(width) for name, width in self._widths.items())


def _loss(value: float | None) -> str:
    return _cell(value, ".3g" if value is not None and abs(value) >= 1000 else ".4f")


def _per_cent(value: float | None) -> str:
    return _cell(None if value is None else 100 * value, ".2f", " %")


def _cell(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None or isnan(value) else f"{value:{spec}}{unit}"
