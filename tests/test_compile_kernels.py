"""Compiled code is kept as long as nothing that it is made of changes, and not longer."""

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
from test_fences import ROOT, imported_by

from pipelines import compile_kernels

FOLDER = ROOT / "pipelines"
INNER = """
from numba import int64
from pipelines.compile_kernels import kernel

@kernel
def inner(value):
    return int64(value) + 1
"""
OUTER = """
from pipelines.compile_kernels import kernel
from pipelines.inner_kernels import inner

@kernel
def outer(value):
    return 10 * inner(value)

if __name__ == "__main__":
    print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def covered() -> set[Path]:
    """The files whose change compiles everything anew."""
    return {file for pattern in compile_kernels.SOURCES for file in FOLDER.glob(pattern)}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A kernel that calls a kernel of another file."""
    folder = tmp_path / "pipelines"
    folder.mkdir()
    shutil.copy(FOLDER / "compile_kernels.py", folder)
    (folder / "__init__.py").touch()
    (folder / "inner_kernels.py").write_text(INNER)
    (folder / "outer_kernels.py").write_text(OUTER)
    return folder


# As for a user who may not read what another one compiled; root, as whom tests often run, may read everything.
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
runpy.run_module("pipelines.outer_kernels", run_name="__main__")
"""


def run(package: Path, *denied: str) -> str:
    """What a new process finds: the outer kernel's result, and whether its code was kept from an earlier one.

    denied: patterns of cached files, separated by commas, that cannot be read; `early`: from the start on.
    """
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "XDG_CACHE_HOME": str(package.parent / "cache")}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-m", "pipelines.outer_kernels"]
    if denied:
        command = [sys.executable, "-c", DENY, str(package / "__pycache__"), *denied]
    result = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_change_of_a_called_file_reaches_its_caller_and_unchanged_code_is_kept(package: Path) -> None:
    assert run(package) == "20 0"
    assert run(package) == "20 1"
    (package / "inner_kernels.py").write_text(INNER.replace("+ 1", "+ 2"))
    assert run(package) == "30 0"
    assert run(package) == "30 1"


@pytest.mark.parametrize("denied", ["*.nbi", "*.nbc", "*.nbi,*.nbc", "folder"])
def test_code_that_another_user_compiled_and_this_one_cannot_read_is_compiled_into_this_users_cache(
    package: Path, denied: str
) -> None:
    assert run(package) == "20 0"
    before = {file: file.stat().st_mtime_ns for file in (package / "__pycache__").glob("*.nb*")}
    assert before
    assert run(package, denied, "early") == "20 0"
    assert run(package, denied, "early") == "20 1"
    assert {file: file.stat().st_mtime_ns for file in (package / "__pycache__").glob("*.nb*")} == before
    assert list((package.parent / "cache" / "numba").rglob("*.nbi"))


@pytest.mark.parametrize("denied", ["*.nbi", "*.nbc", "*.tmp.*"])
def test_a_file_that_is_refused_only_when_it_is_used_costs_no_more_than_compiling(package: Path, denied: str) -> None:
    if denied != "*.tmp.*":  # which is written
        assert run(package) == "20 0"
    assert run(package, denied) == "20 0"


def test_a_callback_whose_kept_code_cannot_be_read_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(IndexDataCacheFile, "_load_index", refuse)

    @compile_kernels.native_callback(int64(int64))
    def increment(value: int) -> int:
        return value + 1

    assert increment.ctypes(41) == 42


def test_every_file_that_kernels_are_made_of_is_looked_at() -> None:
    for file in covered():
        for module in imported_by(file.relative_to(ROOT)):
            package, name, *_ = f"{module}.".split(".")
            if package == "pipelines" and file.name != "device_kernels.py":  # which Triton compiles
                assert FOLDER / f"{name}.py" in covered(), f"{file.name} imports {module}"
    assert {FOLDER / f"{name}.py" for name in ("color_kernels", "geometry_kernels", "vector_floats", "ops")} < covered()
