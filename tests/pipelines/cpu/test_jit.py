"""Compiled code is cached until one of its sources changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numba import int64
from numba.core.caching import IndexDataCacheFile

from helpers.imports import ROOT, imported_by
from pipelines.cpu import jit

FOLDER = ROOT / "pipelines"
INNER = """
from numba import int64
from pipelines.cpu.jit import kernel

@kernel
def inner(value):
    return int64(value) + 1
"""
OUTER = """
from pipelines.cpu.jit import kernel
from pipelines.cpu.inner_kernels import inner

@kernel
def outer(value):
    return 10 * inner(value)

if __name__ == "__main__":
    print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def covered() -> set[Path]:
    """Return the files whose change recompiles all kernels."""
    return {file for pattern in jit.SOURCES for file in FOLDER.glob(pattern)}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Write a kernel that calls a kernel of another file."""
    folder = tmp_path / "pipelines" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "cpu" / "jit.py", folder)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "inner_kernels.py").write_text(INNER)
    (folder / "outer_kernels.py").write_text(OUTER)
    return folder


# Simulates a user who may not read another user's compiled code; tests often run as root, who may read everything.
DENY = """
import builtins, os, runpy, sys
from pathlib import Path

folder, patterns = Path(sys.argv[1]), sys.argv[2].split(",")
def is_denied(path):
    path = Path(os.fspath(path)) if isinstance(path, str | os.PathLike) else Path("/")
    return path.parent == folder and any(path.match(pattern) for pattern in patterns)
def refuse(function, answer=None):
    def refusing(path, *arguments, **options):
        if is_denied(path) or (function is listdir and "folder" in patterns and Path(path) == folder):
            if answer is not None:
                return answer
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *arguments, **options)
    return refusing
listdir = os.listdir
if "early" in sys.argv:
    os.access, os.listdir = refuse(os.access, answer=False), refuse(os.listdir)
builtins.open = refuse(builtins.open)
runpy.run_module("pipelines.cpu.outer_kernels", run_name="__main__")
"""


def run(package: Path, *denied: str) -> str:
    """Return the outer kernel's result in a new process, and whether its code came from the cache.

    denied: comma-separated patterns of unreadable cache files, then `early` to deny them from the start.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parents[1]),
        "XDG_CACHE_HOME": str(package.parents[1] / "cache"),
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-m", "pipelines.cpu.outer_kernels"]
    if denied:
        command = [sys.executable, "-c", DENY, str(package / "__pycache__"), *denied]
    result = subprocess.run(
        command, cwd=package.parents[1], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.mark.slow
def test_change_of_a_called_file_recompiles_its_callers(package: Path) -> None:
    assert run(package) == "20 0"
    assert run(package) == "20 1"
    (package / "inner_kernels.py").write_text(INNER.replace("+ 1", "+ 2"))
    assert run(package) == "30 0"
    assert run(package) == "30 1"


@pytest.mark.slow
@pytest.mark.parametrize("denied", ["*.nbi", "*.nbc", "*.nbi,*.nbc", "folder"])
def test_unreadable_cache_of_another_user_is_replaced(package: Path, denied: str) -> None:
    assert run(package) == "20 0"
    before = {file: file.stat().st_mtime_ns for file in (package / "__pycache__").glob("*.nb*")}
    assert before
    assert run(package, denied, "early") == "20 0"
    assert run(package, denied, "early") == "20 1"
    assert {file: file.stat().st_mtime_ns for file in (package / "__pycache__").glob("*.nb*")} == before
    assert list((package.parents[1] / "cache" / "numba").rglob("*.nbi"))


@pytest.mark.parametrize("denied", ["*.nbi", "*.nbc", "*.tmp.*"])
def test_cache_file_refused_on_use_only_costs_compilation(package: Path, denied: str) -> None:
    if denied != "*.tmp.*":  # temporary files of the cache
        assert run(package) == "20 0"
    assert run(package, denied) == "20 0"


def test_callback_with_unreadable_cache_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(IndexDataCacheFile, "_load_index", refuse)

    @jit.native_callback(int64(int64))
    def increment(value: int) -> int:
        return value + 1

    assert increment.ctypes(41) == 42


def test_cache_digest_covers_all_kernel_sources() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FOLDER.rglob("*.py")}
    for file in covered():
        for module in imported_by(file.relative_to(ROOT)):
            for found in {module, module.rpartition(".")[0]} & modules.keys():
                assert modules[found] in covered(), f"{file.name} imports {module}"
    names = ("cpu/color.py", "cpu/geometry.py", "cpu/float_intrinsics.py", "augment/ops.py")
    assert {FOLDER / name for name in names} < covered()
