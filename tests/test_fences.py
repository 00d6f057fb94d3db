"""Imports go one way: configs <- pipelines, models <- train <- tools; and dear libraries stay in their packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from helpers.imports import ROOT, imported_by

MAY_IMPORT = {
    "configs": {"configs"},
    "pipelines": {"pipelines", "configs"},
    "models": {"models", "configs"},
    "train": {"train", "models", "pipelines", "configs"},
    "tools": {"tools", "train", "models", "pipelines", "configs"},
}
ONLY_IN = {
    "nvidia": ("pipelines/gpu/*", "tools/benchmarks/suites/dali_checks.py", "tools/benchmarks/peers/dali_loader.py"),
    "triton": ("pipelines/gpu/*",),
    "numba": ("pipelines/cpu/*",),
    "llvmlite": ("pipelines/cpu/*",),
    "torch.distributed": ("train/distributed/*",),
    "h5py": ("tools/*",),
}
SOURCES = sorted(file.relative_to(ROOT) for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_go_one_way_and_libraries_stay_where_they_belong(source: Path) -> None:
    package = source.parts[0]
    for module in imported_by(source):
        if (top := module.split(".")[0]) in MAY_IMPORT:
            assert top in MAY_IMPORT[package], f"{source} imports {module}"
        for library, places in ONLY_IN.items():
            if f"{module}.".startswith(f"{library}."):
                assert any(fnmatch(str(source), place) for place in places), f"{source} imports {module}"


def test_the_fences_see_every_package() -> None:
    assert {source.parts[0] for source in SOURCES} == MAY_IMPORT.keys()
    assert "nvidia.dali.fn" in imported_by(Path("pipelines/gpu/dali_graph.py"))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_text_is_read_and_written_in_a_stated_encoding(source: Path) -> None:
    """Else it would be the locale's, which may be ASCII."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not takes_the_locale_s_encoding(node), f"{source}:{node.lineno}: {ast.unparse(node)}"


def takes_the_locale_s_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a file as text without an encoding."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    if function in ("os.open", "Image.open") or "encoding" in [keyword.arg for keyword in call.keywords]:
        return False
    if name in ("open", "fdopen"):
        return not any("b" in mode for mode in modes) and function != "gzip.open"
    return name == "read_text" or (name == "write_text" and "." in function and not function.startswith("tables."))


@pytest.mark.parametrize(
    "module",
    [
        "pipelines.convert.writer",
        "pipelines.storage.verify",
        "pipelines.storage.open",
        "pipelines.augment.policies",
        "pipelines.augment.geometry",
        "configs.load",
    ],
)
def test_converting_drawing_and_configuring_need_neither_torch_nor_dali(module: str) -> None:
    script = f"import sys, {module}; print([name for name in ('torch', 'nvidia.dali') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"
