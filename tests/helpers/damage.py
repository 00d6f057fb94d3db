"""Damage JPEGs of a converted data set in place, and compute the expected training batches."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from pipelines.loader.train_loader import TrainLoader
from pipelines.storage.open import open_split
from pipelines.storage.split import Split


def segments(file: bytes) -> list[tuple[int, int]]:
    """Return (marker, start) of the segments of a JPEG up to the first scan."""
    found, place = [], 2
    while True:
        found.append((file[place + 1], place))
        if file[place + 1] == 0xDA:
            return found
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")


def without_scan(file: bytes) -> bytes:
    """Replace the compressed data by zeros; keep the header."""
    scan = segments(file)[-1][1]
    begin = scan + 2 + int.from_bytes(file[scan + 2 : scan + 4], "big")
    return file[:begin].ljust(len(file), b"\0")


def claiming(height: int, width: int) -> Callable[[bytes], bytes]:
    """Return a function that changes the size in a header."""

    def change(file: bytes) -> bytes:
        frame = next(place for marker, place in segments(file) if marker in (0xC0, 0xC1, 0xC2))
        return file[: frame + 5] + struct.pack(">HH", height, width) + file[frame + 9 :]

    return change


def broken_in_the_middle(file: bytes) -> bytes:
    """Return a file that Pillow refuses and that DALI and lenient decoders decode to grey blocks."""
    middle = len(file) // 2
    return file[:middle] + b"\xff" * 30 + file[middle + 30 :]


def stray_bytes(file: bytes) -> bytes:
    """Shorten the first segment, so that four stray bytes follow it: libjpeg skips them, DALI refuses the file."""
    _, place = segments(file)[0]
    length = int.from_bytes(file[place + 2 : place + 4], "big")
    return file[: place + 2] + struct.pack(">H", length - 4) + file[place + 4 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zeroed scan": without_scan,
    "garbage": lambda file: np.random.default_rng(len(file)).bytes(len(file)),
    "emptied": lambda file: bytes(len(file)),
    "claims 65,000 x 65,000": claiming(65_000, 65_000),
}


def damage(folder: Path, sample: int, change: Callable[[bytes], bytes], split: str = "train") -> str:
    """Change a stored JPEG, keeping its size, and update the hashes; return the sample's description in errors."""
    opened = open_split(folder, split, verify="off")
    begin, size = int(opened.address[sample]), int(opened.size[sample])
    content = change(opened.content[begin : begin + size].tobytes())
    assert len(content) == size
    with opened.files[opened.shard[sample]].open("r+b") as file:
        file.seek(begin - int(opened.shard[sample]) * opened.slot_bytes)
        file.write(content)
    adopt(folder)
    return opened.describe(sample)


def adopt(folder: Path) -> None:
    """Make dataset.json agree with the current shards."""
    path = folder / "dataset.json"
    dataset = json.loads(path.read_text())
    for split in dataset["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(dataset))


def damage_in_turn(folder: Path, samples: Collection[int]) -> list[str]:
    """Damage the samples with each kind of DAMAGE in turn; return their descriptions."""
    ways = list(DAMAGE.values())
    return [damage(folder, sample, ways[number % len(ways)]) for number, sample in enumerate(samples)]


def substitutes(samples: int, bad: Collection[int]) -> np.ndarray:
    """Return the substitute of each sample, int64 [samples]; a simple reference."""
    places = []
    for sample in range(samples):
        while sample in bad:
            sample = (sample + 1) % samples
        places.append(sample)
    return np.array(places)


def substituted(loader: TrainLoader, split: Split, bad: Collection[int]) -> TrainLoader:
    """Return a loader of intact data whose indices are the substitutes."""
    places, indices = substitutes(len(split), bad), loader.plan.indices
    loader.plan.indices = lambda epoch, step: places[indices(epoch, step)]  # type: ignore[method-assign]
    return loader
