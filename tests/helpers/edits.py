"""Edit the files of a converted data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def edit_dataset(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    dataset = json.loads((folder / "dataset.json").read_text())
    change(dataset)
    (folder / "dataset.json").write_text(json.dumps(dataset))


def rewrite_index(folder: Path, split: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change an index and make dataset.json agree with the changed file."""
    file = folder / f"{split}.index.npz"
    with np.load(file) as arrays:
        index = dict(arrays)
    change(index)
    np.savez(file, **index)  # type: ignore[arg-type]

    def adopt(dataset: dict[str, Any]) -> None:
        entry = dataset["splits"][split]
        content = file.read_bytes()
        entry["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        counts = [int((index["shard"] == number).sum()) for number in range(len(entry["shards"]))]
        if sum(counts) == len(index["shard"]):
            entry["samples"] = entry["source_rows"] = len(index["shard"])
            for shard, count in zip(entry["shards"], counts, strict=True):
                shard["samples"] = count

    edit_dataset(folder, adopt)


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)
