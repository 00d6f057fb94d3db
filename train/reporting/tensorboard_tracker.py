"""Log to TensorBoard, in event files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FLUSH_S = 30  # maximum delay until a reader sees a point, in seconds


class TensorBoardTracker:
    """Writes TensorBoard event files.

    Args:
        folder: Folder of the event files.
        config: Plain nested values to show as the config of the run.
        step: Optimizer steps done so far. TensorBoard discards points that the run logged at later steps before it
            was resumed.
    """

    title = "TensorBoard"
    advice = "metrics.jsonl and curves.png contain the run's curves"

    def __init__(self, folder: Path, config: Mapping[str, object], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow import

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0, flush_secs=FLUSH_S)
        self._summary: dict[str, float] = {}
        self._step = step
        self._writer.add_text("config", as_code(config), step)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        self._writer.add_image(key, pixels, step, dataformats="HWC")

    def update_summary(self, values: Mapping[str, float]) -> None:
        self._summary |= values

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        del fast  # only writes a file
        if self._summary:
            self._writer.add_text("summary", as_code({"failed": failed, **self._summary}), self._step)
        self._writer.close()
        return None


def as_code(values: Mapping[str, object]) -> str:
    """Format a nested dict as JSON in a Markdown code block, so that line breaks are preserved."""
    return "\n".join("    " + line for line in json.dumps(values, indent=2).splitlines())
