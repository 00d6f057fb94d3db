"""Malformed indexes with valid hashes: no address is outside of its shard, no claimed size is allocated."""

from __future__ import annotations

import hashlib
import io
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.utils.errors import UserError
from helpers.edits import edit_dataset, rewrite_index
from pipelines.storage.index import INDEX_COLUMNS
from pipelines.storage.open import open_split


def set_one(column: str, value: int) -> Callable[[dict[str, np.ndarray]], object]:
    def change(index: dict[str, np.ndarray]) -> None:
        index[column][7] = value

    return change


@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 2**63 - 1),  # overflows when the size is added
        ("offset", -(2**63)),
        ("size", 2**31 - 1),
        ("shard", 2**31 - 1),  # counting shards up to this number would take 16 GiB
        ("height", 0),
        ("width", 2**31 - 1),
        ("label", -1),
    ],
)
def test_extreme_values_are_refused(column: str, value: int, encoding: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{encoding}_copy")
    rewrite_index(folder, "train", set_one(column, value))
    with pytest.raises(UserError, match=r"train\.index\.npz"):
        open_split(folder, "train")


def put(folder: Path, content: bytes) -> None:
    """Write another index and make dataset.json agree with it."""
    (folder / "train.index.npz").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_dataset(folder, lambda dataset: dataset["splits"]["train"]["index"].update(entry))


def npz(compression: int = zipfile.ZIP_STORED, claim: int = 700, samples: int = 700, kind: str = "<i8") -> bytes:
    """Write columns of zeros whose headers claim `claim` rows."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in INDEX_COLUMNS:
            column = io.BytesIO()
            header = {"descr": kind, "fortran_order": False, "shape": (claim,)}
            np.lib.format.write_array_header_1_0(column, header)
            archive.writestr(f"{name}.npy", column.getvalue() + bytes(8 * samples))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npz(claim=2**50), "is truncated"),
        (npz(zipfile.ZIP_DEFLATED, claim=2**24, samples=2**20), "is compressed"),
        (npz(kind="|O"), "has type object"),
        (npz(kind="<f8"), "has type float64"),
        (npz()[:-30], "not a zip file"),
    ],
    ids=["claims", "bomb", "objects", "floats", "cut"],
)
def test_claimed_sizes_allocate_no_memory(content: bytes, says: str, npy_copy: Path) -> None:
    put(npy_copy, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"train\.index\.npz cannot be read \(.*{says}"):
        open_split(npy_copy, "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_oversized_index_is_not_read(npy_copy: Path) -> None:
    put(npy_copy, npz() + bytes(200_000))
    with pytest.raises(UserError, match=r"train.index.npz has [\d,]+ bytes, too many for 700 samples"):
        open_split(npy_copy, "train")


def test_unused_index_columns_are_accepted(npy_copy: Path) -> None:
    rewrite_index(npy_copy, "val", lambda index: index.update(weight=np.zeros(107)))
    assert len(open_split(npy_copy, "val")) == 107
