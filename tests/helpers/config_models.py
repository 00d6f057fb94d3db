"""What the tests of configs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Write = Callable[..., Path]


def writer(folder: Path, minimal: str) -> Write:
    """A function that writes a config file of `minimal`, the required fields, and some more text into `folder`."""

    def write_file(text: str = "", name: str = "run.yaml", head: str = minimal) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
        return path

    return write_file
