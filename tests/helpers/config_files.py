"""Write config files and load invalid ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from configs.utils.errors import UserError

Write = Callable[..., Path]


def writer(folder: Path, minimal: str) -> Write:
    """Return a function that writes a config file to `folder`: `minimal` (the required settings), then a text."""

    def write_file(text: str = "", name: str = "run.yaml", head: str = minimal) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
        return path

    return write_file


def load_error(path: Path, *overrides: str, **replacements: Any) -> str:
    """Return the one-line message of the error that loading this config raises."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **replacements)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message
