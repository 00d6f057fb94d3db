"""Reading a truncated mapped file gives zeros and sets a flag; any other SIGBUS still kills the process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import cfunc, types

from pipelines.cpu import batch, sigbus_handler
from pipelines.storage import sigbus
from pipelines.storage.memory_map import HUGE_PAGE_BYTES, MappedShards, map_files

ROOT = Path(__file__).parents[3]
SIZE, SLOT = 300_000, 2**20


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    """Write three files of ones."""
    paths = tuple(tmp_path / f"{number}.tar" for number in range(3))
    for path in paths:
        path.write_bytes(b"\1" * SIZE)
    return paths


def opened(files: tuple[Path, ...]) -> MappedShards:
    return map_files(files, [SIZE] * len(files), SLOT)


def test_truncated_pages_read_as_zeros_and_set_the_flag(files: tuple[Path, ...]) -> None:
    mapped = opened(files)
    assert mapped.content.sum() == 3 * SIZE
    os.truncate(files[1], 5000)
    assert mapped.content.sum() == 2 * SIZE + 5000
    assert mapped.fault_address.nonzero()[0].tolist() == [1]
    assert (
        mapped.fault_address[1] - mapped.content.ctypes.data - SLOT == 8192
    )  # the first page after the end of the file


def test_remaining_pages_are_read_from_the_file(files: tuple[Path, ...]) -> None:
    mapped = opened(files)
    os.truncate(files[0], SIZE // 2)
    for place in range(SIZE - 1, 0, -4096):  # from the end, so that every page is a new fault
        assert mapped.content[place] == (place < SIZE // 2)
    assert mapped.content[: SIZE // 2].all()


@pytest.mark.parametrize("left", [0, 5000, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 5000])
def test_truncated_huge_pages_read_as_zeros_and_set_the_flag(left: int, tmp_path: Path) -> None:
    path, size = tmp_path / "0.tar", 3 * HUGE_PAGE_BYTES
    path.write_bytes(b"\1" * size)
    mapped = map_files((path,), [size], size)
    assert mapped.content.sum() == size
    os.truncate(path, left)
    assert mapped.content[::-1].sum() == left
    assert mapped.fault_address.all()


def test_kernels_torch_and_many_threads_survive(files: tuple[Path, ...]) -> None:
    mapped = opened(files)
    out = np.full((64, 32, 32, 3), 7, np.uint8)
    begins = np.random.default_rng(0).integers(100_000, SIZE - 4000, 64)
    for file in files:
        os.truncate(file, 50_000)

    def read(number: int) -> None:
        if number % 2:
            batch.copy(mapped.content[number % 3 * SLOT :], begins, out)
        else:
            rows = torch.from_numpy(mapped.content)[: 3 * SLOT].view(-1, 4096)
            assert rows.index_select(0, torch.arange(16, 70)).sum() == 0

    threads = [threading.Thread(target=read, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not out.any()
    assert mapped.fault_address.all()


def test_unregistered_addresses_are_ignored_and_their_rows_reused() -> None:
    first, _ = sigbus.register(np.array([[4096, 8192]] * 5))
    place = first.ctypes.data
    sigbus.unregister(first)
    assert not first[:, [sigbus_handler.START, sigbus_handler.END]].any()
    again, lost = sigbus.register(np.array([[4096, 8192]] * 5))
    assert again.ctypes.data == place
    assert not lost.any()
    sigbus.unregister(again)


def test_closed_split_releases_its_rows(files: tuple[Path, ...]) -> None:
    used = []
    for _ in range(3):
        mapped = opened(files)
        used.append(mapped.fault_address.ctypes.data)
        del mapped
    assert len(set(used)) == 1


def test_handler_calls_only_async_signal_safe_functions() -> None:
    pointer = types.CPointer(types.int64)
    compiled = cfunc(types.void(types.int32, pointer, pointer))(sigbus_handler._handle).inspect_llvm()
    called = set(re.findall(r"\bcall [^@\n]*@([\w.]+)\(", compiled))
    assert {"mmap", "sigaction", "raise"} <= called
    own = {name for name in called if "_handle" in name or name.startswith("llvm.")}
    assert called - own == {"mmap", "sigaction", "raise"}


PROGRAM = """
import ctypes, mmap, os, sys
from pathlib import Path
import numpy as np
from pipelines.storage.memory_map import map_files
path, way = Path(sys.argv[1]), sys.argv[2]
mapped = map_files((path,), [300_000], 2**20)
opened = path.open("rb")
other = mmap.mmap(opened.fileno(), 300_000, prot=mmap.PROT_READ)
os.truncate(path, 5000)
assert mapped.content.sum() == 5000
if way == "other map":
    other[200_000]
elif way == "sent":
    os.kill(os.getpid(), 7)
elif way == "fork":
    again = map_files((path,), [5000], 2**20)
    os.truncate(path, 0)
    child = os.fork()
    assert again.content.sum() == 0 and again.fault_address.all()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print("alive")
"""


def run(file: Path, way: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", PROGRAM, str(file), way]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_fork_has_its_own_table(files: tuple[Path, ...]) -> None:
    result = run(files[0], "fork")
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


@pytest.mark.parametrize("way", ["other map", "sent"])
def test_other_sigbus_still_kills_the_process(way: str, files: tuple[Path, ...]) -> None:
    result = run(files[0], way, "-X", "faulthandler")
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "")
    assert "Fatal Python error: Bus error" in result.stderr  # by the previous handler
