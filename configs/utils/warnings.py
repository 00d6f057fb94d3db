"""Warnings to the user, printed as one line each on stderr."""

from __future__ import annotations

import functools
import os
import sys

from configs.utils.console import above_bars, fold
from configs.utils.errors import printable


@functools.cache  # each text is printed once: a sweep, for example, loads its file for every point
def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Print a warning on rank 0, once per process.

    Args:
        text: The warning.
        on_any_rank: Whether to print the warning on other ranks too, for causes that rank 0 may not encounter.
    """
    if on_any_rank or os.environ.get("RANK", "0") == "0":
        with above_bars():
            print(fold(f"warning: {printable(text)}", sys.stderr), file=sys.stderr)
