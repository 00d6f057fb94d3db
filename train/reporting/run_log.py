"""Console, log.txt, metrics.jsonl, curves.png, trackers, all on the first rank; other ranks get a log that is silent.

What trackers are is not known here, only that they fail: then that is said once, and the run goes on without. So it
does where log.txt cannot be written; metrics.jsonl and config.yaml it needs.
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
from typing import TYPE_CHECKING, Any

from configs.schema import LogConfig
from configs.utils import files
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from train.reporting import figures
from train.reporting.metrics_file import best_results, read_metrics
from train.reporting.tensorboard_tracker import TensorBoardTracker
from train.reporting.trackers import Tracker, single_line
from train.reporting.wandb_tracker import start_wandb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_INTERVAL_S = 30.0


class _Console(logging.StreamHandler):
    """A line that cannot be written ends no run, and is no traceback for each line: it is said once."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record
        with suppress(OSError):
            warn(f"lines of the log are lost ({single_line(sys.exc_info()[1] or OSError())})")


class _LogFile(_Console, logging.FileHandler):
    def close(self) -> None:
        with suppress(OSError):  # what could not be written before
            super().close()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path} ({error.strerror or error}): free space, or move the run's folder and name its new place "
        "by --output, then --resume auto goes on"
    )


class RunLog:
    """The records of one run in its folder; `folder` is None on all ranks but the first.

    As a context manager it finishes at the end, as failed where an error ends it.
    """

    def __init__(self, folder: Path | None, *, peers_wait: bool = False, loss: str = "cross-entropy") -> None:
        """others_wait: on other ranks, which learn of an error only after it has ended this log; loss: train.loss."""
        self._folder, self._others_wait, self._loss = folder, peers_wait, loss
        self._trackers: list[Tracker] = []
        self.fast_shutdown = False  # as after a signal: the end leaves out what can be had later
        self._drawn_at = -CURVES_INTERVAL_S
        self._logger = logging.getLogger("zhu")
        self._logger.setLevel(logging.INFO)
        self._logger.handlers.clear()
        self._logger.propagate = False
        if folder is not None:
            try:
                handlers = (
                    _Console(sys.stdout),
                    _LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace"),
                )
            except OSError as error:
                raise _cannot_write(folder / "log.txt", error) from None
            for handler in handlers:
                handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
                self._logger.addHandler(handler)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.fast_shutdown |= error is not None and self._others_wait
        self.finish(failed=error is not None)

    @property
    def is_disabled(self) -> bool:
        return self._folder is None

    @property
    def has_trackers(self) -> bool:
        """Whether there is anyone to show pictures to."""
        return bool(self._trackers)

    def info(self, message: str) -> None:
        self._logger.info(message)

    def start_trackers(self, config: LogConfig, run_config: dict[str, Any], step: int) -> None:
        """W&B and TensorBoard as configured; run_config: plain values, nested; step: optimizer steps that are done."""
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

    def write_config(self, config: str, facts: dict[str, Any]) -> None:
        """config.yaml and facts.json, in place of those of an earlier start."""
        if self._folder is not None:
            _replace(self._folder / "config.yaml", config)
            _replace(self._folder / "facts.json", json.dumps(facts, indent=2) + "\n")

    def drop_epochs_from(self, before: int) -> None:
        """Drop the lines of epochs from `before` on, which a resumed run writes again."""
        if self._folder is None:
            return
        kept = [line for line in read_metrics(self._folder) if line["epoch"] < before]
        _replace(self._folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def log_step(self, values: Mapping[str, float], step: int) -> None:
        """One line on the console, one point in the trackers' curves against step; step: optimizer steps done."""
        self.info(f"step {step}: loss {values['step_loss']:.4g}, lr {values['lr']:.4g}, "
                 f"{values['images_per_s']:,.0f} images/s")  # fmt: skip
        self._each(lambda tracker: tracker.log_scalars(values, step))

    def log_epoch(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one on the console, one point in the trackers' curves."""
        if self._folder is None:
            return
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}, allow_nan=False) + "\n"
        try:
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of this epoch is, or a power cut could leave a hole
        except OSError as error:  # the epoch has no checkpoint yet: a resumed run comes here again
            raise _cannot_write(self._folder / "metrics.jsonl", error) from None
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
        self.info(f"epoch {metrics['epoch']}: " + ", ".join(shown))
        if self.has_trackers:
            values = {key: value for key, value in metrics.items() if value is not None and key != "step"}
            self._each(lambda tracker: tracker.log_scalars(values, metrics["step"]))
            self.update_summary(best_results(read_metrics(self._folder)))
        if time.monotonic() - self._drawn_at >= CURVES_INTERVAL_S:
            self.draw_curves()

    def log_figure(self, key: str, draw: Callable[[], Figure], step: int) -> None:
        """Show a figure in the trackers; it is drawn only where there are any."""
        if not self.has_trackers:
            return
        try:
            pixels = figures.render(draw())
        except Exception as error:
            self.info(f"no picture {key} for the trackers: {type(error).__name__}: {single_line(error)}")
            return
        self._each(lambda tracker: tracker.log_image(key, pixels, step))

    def update_summary(self, values: Mapping[str, float]) -> None:
        """What the trackers shall know of the whole run."""
        self._each(lambda tracker: tracker.update_summary(values))

    def draw_curves(self) -> None:
        """curves.png from metrics.jsonl."""
        if self._folder is None or not (metrics := read_metrics(self._folder)):
            return
        self._drawn_at = time.monotonic()
        try:
            figures.save(figures.curves(metrics, self._folder.name, self._loss), self._folder / "curves.png")
        except UserError as error:  # a picture is no reason to end a run
            self.info(str(error))

    def finish(self, *, failed: bool = False) -> None:
        if not self.fast_shutdown:
            self.draw_curves()

        def finish(tracker: Tracker) -> None:
            if (message := tracker.finish(failed=failed, fast=self.fast_shutdown)) is not None:
                self.info(message)

        self._each(finish)
        self._trackers.clear()
        for handler in self._logger.handlers:
            handler.close()

    def _each(self, use: Callable[[Tracker], None]) -> None:
        """Use every tracker; one that fails is left out from here on."""
        for tracker in list(self._trackers):
            try:
                use(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                reason = f"{type(error).__name__}: {single_line(error)}"
                self.info(f"{tracker.title} stops here, the run goes on ({reason}); {tracker.advice}")
                with suppress(Exception):
                    tracker.finish(failed=True, fast=self.fast_shutdown)


def _replace(path: Path, text: str) -> None:
    """So that whoever reads it finds the old text or the new one."""
    try:
        files.atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
