"""Write the log of a run: console, log.txt, metrics.jsonl, curves.png and trackers. Only rank 0 writes the log.

The console shows messages, a table of the epochs and, on a terminal, a live line. log.txt contains the messages and, in
addition, lines of steps and epochs with all values. Both count epochs from 1, metrics.jsonl from 0.

A tracker that fails is reported once and then ignored. Lines lost from log.txt or the console only cause a warning.
metrics.jsonl, config.yaml and facts.json are required, so failing to write them ends the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import LogConfig
from configs.utils import files
from configs.utils.console import above_bars, fold, terminal_width
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from train.reporting import figures
from train.reporting.metrics_file import MetricsLine, best_results, read_metrics
from train.reporting.progress import EpochTable, LiveLine
from train.reporting.tensorboard_tracker import TensorBoardTracker
from train.reporting.trackers import Tracker, single_line
from train.reporting.wandb_tracker import start_wandb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_INTERVAL_S = 30.0
FULL_WIDTH = 100  # columns of the table if stdout is not a terminal


class _Handler(logging.StreamHandler):
    """Logging handler that warns if lines cannot be written, instead of printing a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record
        with suppress(OSError):
            warn(f"lines of the log are lost ({single_line(sys.exc_info()[1] or OSError())})")


class _Console(_Handler):
    """Handler that writes lines above the live line, folded to the width of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return fold(super().format(record), self.stream)


class _LogFile(_Handler, logging.FileHandler):
    def close(self) -> None:
        with suppress(OSError):  # a line that could not be written before
            super().close()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path} ({error.strerror or error}): free space, or move the run folder and give its new "
        "location as --output, then resume with --resume auto"
    )


class RunLog:
    """Writes the log of one run. Leaving its context finishes the log, and marks the run as failed after an exception.

    Args:
        folder: The run folder, or None on ranks other than 0. Without a folder, the log does nothing.
        peers_wait: Whether other ranks wait for this rank. If so, the log is finished quickly after an error, since
            the other ranks learn of the error only afterwards.
        loss: The value of train.loss.
        epochs: The value of train.epochs.
        weights: The value of eval.weights.

    Attributes:
        live: The live line on the terminal.

    Raises:
        UserError: log.txt cannot be opened.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        peers_wait: bool = False,
        loss: str = "cross-entropy",
        epochs: int = 1,
        weights: str = "auto",
    ) -> None:
        self._folder, self._peers_wait, self._loss = folder, peers_wait, loss
        self._trackers: list[Tracker] = []
        self.fast_shutdown = False  # whether `finish` skips what can be done later, e.g. after a signal
        self._drawn_at = -CURVES_INTERVAL_S
        self.live = LiveLine(epochs, is_shown=folder is not None)
        self._table = EpochTable(epochs, weights, terminal_width() if sys.stdout.isatty() else FULL_WIDTH)
        self._has_header = False
        self._logger = logging.getLogger("zhu")
        self._logger.setLevel(logging.DEBUG)
        self._logger.handlers.clear()
        self._logger.propagate = False
        if folder is not None:
            try:
                log_file = _LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise _cannot_write(folder / "log.txt", error) from None
            log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            self._console = _Console(sys.stdout)
            self._console.setLevel(logging.INFO)
            self._logger.addHandler(self._console)
            self._logger.addHandler(log_file)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.fast_shutdown |= error is not None and self._peers_wait
        self.finish(failed=error is not None)

    @property
    def is_disabled(self) -> bool:
        return self._folder is None

    @property
    def has_trackers(self) -> bool:
        return bool(self._trackers)

    def info(self, message: str) -> None:
        """Write a line to the console and to log.txt."""
        self._logger.info(message)

    def detail(self, message: str) -> None:
        """Write a line to log.txt."""
        self._logger.debug(message)

    def start_trackers(self, config: LogConfig, run_config: Mapping[str, object], step: int) -> None:
        """Start W&B and TensorBoard if they are configured. Failures are logged, and the run continues.

        Args:
            config: Settings of the trackers.
            run_config: Plain nested values to show as the config of the run.
            step: Optimizer steps done so far.
        """
        if self._folder is None:
            return
        folder = self._folder
        starts: dict[str, Callable[[], Tracker | None]] = {
            "W&B": lambda: start_wandb(config.wandb, folder, run_config, self.info),
            "TensorBoard": lambda: (
                TensorBoardTracker(folder / "tensorboard", run_config, step) if config.tensorboard else None
            ),
        }
        for title, start in starts.items():
            try:
                tracker = start()
            except Exception as error:
                self.info(f"{title} is off for this run: {type(error).__name__}: {single_line(error)}")
            else:
                self._trackers += [tracker] if tracker is not None else []

    def write_config(self, config: str, facts: Mapping[str, object]) -> None:
        """Write config.yaml and facts.json. On resume, this overwrites the existing files.

        Raises:
            UserError: A file cannot be written.
        """
        if self._folder is not None:
            _replace(self._folder / "config.yaml", config)
            _replace(self._folder / "facts.json", json.dumps(facts, indent=2) + "\n")

    def drop_epochs_from(self, first: int) -> None:
        """Remove the metrics of epoch `first` and all later epochs, since a resumed run writes them again.

        Raises:
            UserError: metrics.jsonl cannot be read or written.
        """
        if self._folder is None:
            return
        kept = [line for line in read_metrics(self._folder) if line.epoch < first]
        _replace(self._folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def log_step(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step to log.txt, the live line and the trackers.

        Args:
            values: Numbers by name. They must include step_loss, lr and images_per_s, the only ones that log.txt and
                the live line show.
            step: Optimizer steps done so far.
        """
        loss, lr, rate = (values[name] for name in ("step_loss", "lr", "images_per_s"))
        self.live.show(loss, lr, rate)
        self.detail(f"step {step}: loss {loss:.4g}, lr {lr:.4g}, {rate:,.0f} images/s")
        self._each(lambda tracker: tracker.log_scalars(values, step))

    def log_epoch(self, metrics: MetricsLine, *, is_best: bool = False) -> None:
        """Log the metrics of an epoch to metrics.jsonl, the console, log.txt and the trackers.

        Also redraw curves.png if it was last drawn at least CURVES_INTERVAL_S ago.

        Args:
            metrics: The metrics of the epoch, including the step.
            is_best: Whether the table marks the validation accuracy as a new best.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self._folder is None:
            return
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}, allow_nan=False) + "\n"
        try:
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())  # before this epoch's checkpoint, or a power cut could lose the line
        except OSError as error:  # the epoch has no checkpoint yet, so a resumed run logs it again
            raise _cannot_write(self._folder / "metrics.jsonl", error) from None
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
        self.detail(f"epoch {metrics.epoch + 1}: " + ", ".join(shown))
        self.live.show(*(metrics.get(name) for name in ("train_loss", "lr", "images_per_s")))
        self._print_row(metrics, is_best)
        draws = time.monotonic() - self._drawn_at >= CURVES_INTERVAL_S
        lines = self._metrics() if draws or self.has_trackers else []
        if self.has_trackers:
            values = {key: value for key, value in metrics.items() if value is not None and key != "step"}
            values["epoch"] = metrics.epoch + 1
            done = int(metrics["step"] or 0)
            self._each(lambda tracker: tracker.log_scalars(values, done))
            self.update_summary(best_results(lines))
        if draws:
            self.draw_curves(lines)

    def log_figure(self, key: str, draw: Callable[[], Figure], step: int) -> None:
        """Show a figure in the trackers. `draw` is called only if there is a tracker, and its errors are logged."""
        if not self.has_trackers:
            return
        try:
            pixels = figures.render(draw())
        except Exception as error:
            self.info(f"no picture {key} for the trackers: {type(error).__name__}: {single_line(error)}")
            return
        self._each(lambda tracker: tracker.log_image(key, pixels, step))

    def update_summary(self, values: Mapping[str, float]) -> None:
        """Set results of the whole run, such as the best accuracy, in the trackers."""
        self._each(lambda tracker: tracker.update_summary(values))

    def draw_curves(self, metrics: list[MetricsLine] | None = None) -> None:
        """Draw curves.png from the lines of metrics.jsonl, which are read if `metrics` is None.

        Errors when reading or writing these files are logged, not raised.
        """
        if self._folder is None:
            return
        metrics = self._metrics() if metrics is None else metrics
        self._drawn_at = time.monotonic()
        if not metrics:
            return
        try:
            figures.save(figures.curves(metrics, self._folder.name, self._loss), self._folder / "curves.png")
        except UserError as error:  # must not end the run
            self.info(str(error))

    def _print_row(self, metrics: MetricsLine, is_best: bool) -> None:
        """Print the row of an epoch in the table, which starts with its first row."""
        lines = [*([] if self._has_header else [self._table.header()]), self._table.row(metrics, is_best=is_best)]
        self._has_header = True
        self._console.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))

    def finish(self, *, failed: bool = False) -> None:
        """Finish the trackers and close the log. Before that, draw the final curves unless `fast_shutdown` is set."""
        self.live.close()
        if not self.fast_shutdown:
            self.draw_curves()

        def finish(tracker: Tracker) -> None:
            if (message := tracker.finish(failed=failed, fast=self.fast_shutdown)) is not None:
                self.info(message)

        self._each(finish)
        self._trackers.clear()
        for handler in self._logger.handlers:
            handler.close()

    def _metrics(self) -> list[MetricsLine]:
        """Return the lines of metrics.jsonl. If they cannot be read, log the error and return an empty list."""
        assert self._folder is not None
        try:
            return read_metrics(self._folder)
        except UserError as error:  # must not end the run
            self.info(str(error))
            return []

    def _each(self, use: Callable[[Tracker], None]) -> None:
        """Call `use` for every tracker. Finish and remove trackers that fail."""
        for tracker in list(self._trackers):
            try:
                use(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                reason = f"{type(error).__name__}: {single_line(error)}"
                self.info(f"{tracker.title} stops here, the run continues ({reason}); {tracker.advice}")
                with suppress(Exception):
                    tracker.finish(failed=True, fast=self.fast_shutdown)


def _replace(path: Path, text: str) -> None:
    """Write a text file atomically, replacing an existing one. Raises UserError if this fails."""
    try:
        files.atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _finite(value: float | None) -> float | None:
    """Return None for nan and infinity, since JSON cannot represent them. Return other values unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
