"""Warnings to the user: one line each on stderr."""

from __future__ import annotations

import functools
import os
import sys

from configs.utils.errors import printable


@functools.cache  # each text is printed once: a sweep, for example, loads its file for every point
def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Print a warning once, on rank 0.

    Args:
        text: The warning.
        on_any_rank: Print it on this rank too, since other ranks may not have met the cause.
    """
    if on_any_rank or os.environ.get("RANK", "0") == "0":
        print(f"warning: {printable(text)}", file=sys.stderr)
