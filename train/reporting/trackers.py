"""Interface for experiment trackers, i.e. services that show curves and images of a run.

A tracker may raise any exception. `RunLog` reports it once and continues without the tracker. Calls that may block
forever go through `call_with_timeout`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Protocol, TypeVar

import numpy as np

Result = TypeVar("Result")


class Tracker(Protocol):
    """Receives values and images at increasing optimizer steps. A resumed run continues the curves."""

    title: str
    advice: str  # what a user can do after a failure

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at an optimizer step. Per-epoch metrics also contain the key `epoch`."""

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        """Log an image, uint8 [H, W, 3]."""

    def update_summary(self, values: Mapping[str, float]) -> None:
        """Set results of the whole run. A new value replaces an earlier one of the same name."""

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        """Write or send the remaining data, and give up after a limited time. If `fast`, the limit is a few seconds.

        Returns:
            A message for the user, or None.
        """


def call_with_timeout(timeout_s: float, function: Callable[[], Result]) -> Result:
    """Call a function in a separate thread, and return its result or raise its exception.

    Raises:
        TimeoutError: The function does not return within `timeout_s`. Its thread continues.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()  # a daemon thread does not keep the process alive
    if not wait([future], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")
    return future.result()


def single_line(error: object) -> str:
    """Return the message of an error as one line of at most 200 characters, for use in a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
