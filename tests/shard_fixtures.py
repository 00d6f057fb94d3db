"""What the tests of faults in shards share."""

from __future__ import annotations

import os
import random
from pathlib import Path

from pipelines.shards import load_dataset
from tools import convert


def new_chance() -> random.Random:
    """Random instants and places, from a seed that a failing test shows; ZHU_FAULT_SEED gives it."""
    seed = int(os.environ.get("ZHU_FAULT_SEED", random.randrange(2**31)))
    print("ZHU_FAULT_SEED", seed)
    return random.Random(seed)


def shards_of(folder: Path) -> list[Path]:
    """Of the train split."""
    return [folder / shard["file"] for shard in load_dataset(folder)["splits"]["train"]["shards"]]


def converted_digits(folder: Path, encoding: str) -> Path:
    """scikit-learn's digits, a shard per split."""
    convert.main(["digits", "--encoding", encoding, "--out", str(folder / "digits")])
    return folder / "digits"
