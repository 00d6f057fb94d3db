"""Run folders with given files."""

from __future__ import annotations

from pathlib import Path

from configs.load import to_yaml
from configs.schema import Config


def make(folder: Path, *names: str, config: Config | None = None) -> Path:
    """Create a folder with these empty files, and the config and log of a run if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "log.txt").write_text("")
    return folder
