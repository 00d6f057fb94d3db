"""The interface of experiment trackers: services that show curves and pictures of a run.

A tracker may raise any exception: `RunLog` reports it once and continues without the tracker. Calls that may block
forever go through `call_with_timeout`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

Result = TypeVar("Result")


class Tracker(Protocol):
    """Receives points and pictures at increasing optimizer steps. A resumed run continues the curves."""

    title: str
    advice: str  # what a user can do after a failure

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step, or of a whole epoch if they have the key `epoch`."""

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        """Log an image, uint8 [H, W, 3]."""

    def update_summary(self, values: Mapping[str, float]) -> None:
        """Set results of the whole run. Later values replace earlier ones."""

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        """Write or send the remaining data in bounded time, within seconds if `fast`.

        Returns:
            A message for the user, or None.
        """


def call_with_timeout(timeout_s: float, function: Callable[[], Result]) -> Result:
    """Return or raise the outcome of `function`. Raises TimeoutError after `timeout_s`, leaving its thread behind."""
    box: list[Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            box.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # a daemon thread does not keep the process alive
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not box:
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")
    return box[0]


def single_line(error: Any) -> str:
    """Return an error's message as one short line, for use in a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
