"""Data sets for tests of damaged shards."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.dataset import load_dataset
from tools import convert


def shards_of(folder: Path) -> list[Path]:
    """Return the shards of the train split."""
    return [folder / shard.file for shard in load_dataset(folder).splits["train"].shards]


def converted_digits(folder: Path, encoding: str) -> Path:
    """Convert scikit-learn's digits with one shard per split."""
    convert.main(["digits", "--encoding", encoding, "--out", str(folder / "digits")])
    return folder / "digits"
