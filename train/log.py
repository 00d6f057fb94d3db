"""Console, log.txt, metrics.jsonl, curves.png and W&B, all on the first rank; other ranks get a log that is silent."""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from configs.schema import WandbConfig
from train import figures

CURVES_EVERY_S = 30.0


class RunLog:
    """The records of one run in its folder; `folder` is None on all ranks but the first."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._wandb: Any = None
        self._drawn_at = -CURVES_EVERY_S
        self._logger = logging.getLogger("zhu")
        self._logger.setLevel(logging.INFO)
        self._logger.handlers.clear()
        self._logger.propagate = False
        if folder is not None:
            for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "log.txt")):
                handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
                self._logger.addHandler(handler)

    @property
    def is_silent(self) -> bool:
        return self._folder is None

    def say(self, message: str) -> None:
        self._logger.info(message)

    def start_wandb(self, config: WandbConfig, run: dict[str, Any]) -> None:
        """Log to W&B as well; a run that was resumed goes on under its id. Never a reason for training to fail."""
        if self._folder is None or config.project is None:
            return
        mode: Any = config.mode
        if mode == "auto":  # what the environment says goes first
            mode = None if os.environ.get("WANDB_MODE") else ("online" if _has_wandb_login() else "offline")
        id_file = self._folder / "wandb_id.txt"
        try:
            import wandb

            run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
            id_file.write_text(run_id + "\n")
            self._wandb = wandb.init(
                project=config.project, entity=config.entity, group=config.group, tags=config.tags, mode=mode,
                name=self._folder.name, id=run_id, resume="allow", dir=str(self._folder), config=run,
            )  # fmt: skip
            self._wandb.define_metric("epoch")
            self._wandb.define_metric("*", step_metric="epoch")
        except Exception as error:
            self.say(f"W&B is off for this run: {type(error).__name__}: {error}")
            self._wandb = None

    def keep_epochs(self, before: int) -> None:
        """Drop the lines of epochs from `before` on, which a resumed run writes again."""
        if self._folder is None:
            return
        kept = [line for line in read_metrics(self._folder) if line["epoch"] < before]
        temporary = self._folder / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(self._folder / "metrics.jsonl")

    def epoch(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one on the console, one point in W&B."""
        if self._folder is None:
            return
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({key: _finite(value) for key, value in metrics.items()}, allow_nan=False) + "\n")
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
        self.say(f"epoch {metrics['epoch']}: " + ", ".join(shown))
        if self._wandb is not None:
            try:
                self._wandb.log(metrics)
            except Exception as error:
                self.say(f"W&B logging failed and is off from here: {type(error).__name__}: {error}")
                self._wandb = None
        if time.monotonic() - self._drawn_at >= CURVES_EVERY_S:
            self.draw()

    def draw(self) -> None:
        """curves.png from metrics.jsonl."""
        if self._folder is None or not (metrics := read_metrics(self._folder)):
            return
        figures.save(figures.curves(metrics, self._folder.name), self._folder / "curves.png")
        self._drawn_at = time.monotonic()

    def finish(self) -> None:
        self.draw()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self.say(f"W&B could not finish: {type(error).__name__}: {error}")
        for handler in self._logger.handlers:
            handler.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
