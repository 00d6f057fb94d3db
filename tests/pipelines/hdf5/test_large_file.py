"""A file of 1.5 million rows is opened without reading or holding its pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROWS, SIDE = 1_500_000, 67  # 20 GB

OPEN = """
import sys
from pipelines.open import open_split

def memory():  # MiB
    lines = [line.split() for line in open("/proc/self/status") if line.startswith("Vm")]
    return {line[0]: int(line[1]) / 1024 for line in lines}

open_split(sys.argv[1], "val")  # imports and kernels
before = memory()
split = open_split(sys.argv[1], "train")
print(len(split), memory()["VmHWM:"] - before["VmRSS:"])
"""


def write_sparse(path: Path) -> Path:
    """Write a file with train of ROWS rows, whose space is allocated but not written, and a small val."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as file:
        for split, rows in (("train", ROWS), ("val", 100)):
            space = h5py.h5s.create_simple((rows, 3, SIDE, SIDE))
            h5py.h5d.create(file.id, f"images-{split}".encode(), h5py.h5t.STD_U8LE, space, plan)
            file[f"labels-{split}"] = np.arange(rows) % 100
    return path


@pytest.mark.slow
def test_opening_20_gb_takes_less_than_200_mib(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "x.hdf5")
    assert path.stat().st_blocks * 512 < 100 * 2**20 < 20e9 < path.stat().st_size
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    rows, grown_mib = done.stdout.split()
    assert int(rows) == ROWS
    assert float(grown_mib) < 200
