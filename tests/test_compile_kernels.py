"""Compiled code is kept as long as nothing that it is made of changes, and not longer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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


def run(package: Path) -> str:
    """What a new process finds: the outer kernel's result, and whether its code was kept from an earlier one."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-m", "pipelines.outer_kernels"]
    result = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_change_of_a_called_file_reaches_its_caller_and_unchanged_code_is_kept(package: Path) -> None:
    assert run(package) == "20 0"
    assert run(package) == "20 1"
    (package / "inner_kernels.py").write_text(INNER.replace("+ 1", "+ 2"))
    assert run(package) == "30 0"
    assert run(package) == "30 1"


def test_every_file_that_kernels_are_made_of_is_looked_at() -> None:
    for file in covered():
        for module in imported_by(file.relative_to(ROOT)):
            package, name, *_ = f"{module}.".split(".")
            if package == "pipelines" and file.name != "device_kernels.py":  # which Triton compiles
                assert FOLDER / f"{name}.py" in covered(), f"{file.name} imports {module}"
    assert {FOLDER / f"{name}.py" for name in ("color_kernels", "geometry_kernels", "vector_floats", "ops")} < covered()
