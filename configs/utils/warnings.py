"""Remarks to the user that are no errors: one line each on stderr, said once and, but for some, by one of all ranks."""

from __future__ import annotations

import functools
import os
import sys

from configs.utils.errors import printable


@functools.cache  # the same words a second time say nothing new: a sweep loads its file for every point
def warn(text: str, *, on_any_rank: bool = False) -> None:
    """on_any_rank: of something that the other ranks may not have met."""
    if on_any_rank or os.environ.get("RANK", "0") == "0":
        print(f"warning: {printable(text)}", file=sys.stderr)
