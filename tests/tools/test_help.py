"""--help and wrong arguments of every command are answered before anything large is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.imports import ROOT
from tools import benchmark, export, zhu
from tools.benchmarks.suites import cpu, gpu
from tools.inference.export_formats import FORMATS

COMMANDS = ["train/ddp.py", *sorted(f"tools/{file.name}" for file in (ROOT / "tools").glob("[!_]*.py"))]
LARGE = ["torch", "numpy", "matplotlib", "nvidia", "numba", "PIL", "timm", "pydantic", "tqdm"]
SCRIPT = f"""
import runpy, sys
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
print("exit", code, *[name for name in {LARGE} if name in sys.modules], file=sys.stderr)
"""


def ends(command: str, *arguments: str) -> tuple[str, str]:
    """Return what a command prints, and its exit code with the names of the large packages that it imported."""
    script = f"import sys; sys.argv = {[command, *arguments]}\n{SCRIPT}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    *printed, last = result.stderr.splitlines()
    return result.stdout + "\n".join(printed), last


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_wrong_arguments_import_nothing_large(command: str) -> None:
    printed, last = ends(command, "--help")
    assert last == "exit 0"
    assert printed.startswith("usage: ")
    printed, last = ends(command, "--no-such-option")
    assert last == "exit 2"
    assert "error: " in printed


@pytest.mark.parametrize("command", zhu.COMMANDS)
def test_help_of_zhu_imports_nothing_large(command: str) -> None:
    printed, last = ends("tools/zhu.py", command, "--help")
    assert last == "exit 0"
    assert printed.startswith(f"usage: zhu {command} ")


@pytest.mark.parametrize(("command", "part"), [("convert", "hdf5"), ("benchmark", "all"), ("benchmark", "ramp")])
def test_help_of_parts_imports_nothing_large(command: str, part: str) -> None:
    printed, last = ends(f"tools/{command}.py", part, "--help")
    assert last == "exit 0"
    assert printed.startswith(f"usage: {command}.py {part} ")


def test_large_imports_are_found() -> None:
    assert ends("configs/schema/__main__.py")[1] == "exit 0 pydantic"


def test_choices_in_parsers_are_those_of_the_work() -> None:
    assert list(export.FORMATS) == list(FORMATS)
    assert benchmark.PARTS.split(", ") == [part.name for part in gpu.PARTS]
    assert sorted({stage for part in (*cpu.PARTS, *gpu.PARTS) for stage in part.stages}) == benchmark.PART_STAGES


def test_misspelled_setting_is_refused_without_torch() -> None:
    printed, last = ends("train/ddp.py", "--cfg", "configs/digits_lenet.yaml", "--opts", "train.epoch=3")
    assert "did you mean train.epochs" in printed
    assert last == "exit 2 pydantic"
