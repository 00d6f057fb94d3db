"""What W&B and TensorBoard have in common: where a run's curves and pictures are shown beside its own files.

A tracker may raise any exception: `train/reporting/run_log.py` reports it once and continues without the tracker.
Calls that may block forever go through `call_with_timeout`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

Result = TypeVar("Result")


class Tracker(Protocol):
    """Points and pictures at optimizer steps, which do not go back; a resumed run goes on where it stood."""

    title: str
    advice: str  # what the user can do when it has failed

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values of one moment; with a key `epoch` those of a whole epoch."""

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        """pixels: uint8 [H, W, 3]."""

    def update_summary(self, values: Mapping[str, float]) -> None:
        """What to know of the whole run; later values replace earlier ones."""

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        """Write or send what is left, in bounded time, in_a_hurry a few seconds; returns what the user should know."""


def call_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """What `function` returns or raises; TimeoutError when it has not ended by then, and it is left behind."""
    box: list[Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            box.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # a daemon does not keep the process from ending
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not box:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return box[0]


def single_line(error: Any) -> str:
    """An error's message, which may have many lines, for the middle of a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
