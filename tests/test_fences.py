"""A folder is a fence: imports go one way, heavy libraries stay in their folder, and folders stay small."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

from helpers.imports import ROOT, imported_by

MAX_MODULES = 12  # per folder, without __init__.py
MAY_IMPORT = {
    "configs": {"configs"},
    "pipelines": {"pipelines", "configs"},
    "models": {"models", "configs"},
    "train": {"train", "models", "pipelines", "configs"},
    "tools": {"tools", "train", "models", "pipelines", "configs"},
}
# Lowest floor first. A folder, or a module, imports from its own folder and from lower floors, not from its own floor.
FLOORS = [
    ("configs.utils",),
    ("configs.schema",),
    ("configs",),
    (
        "pipelines.rng",
        "pipelines.jpeg_format",
        "pipelines.memory_limit",
        "pipelines.interfaces",
        "pipelines.cluster",
    ),
    ("pipelines.augment",),
    ("pipelines.cpu",),
    ("pipelines.order",),
    ("pipelines.storage",),
    ("pipelines.hdf5", "pipelines.remote"),
    ("pipelines.open",),
    ("pipelines.convert", "pipelines.loader"),
    ("pipelines.gpu",),
    ("pipelines",),
    ("models",),
    ("train.distributed",),
    ("train.optim",),
    ("train.engine",),
    ("train.checkpoint", "train.reporting"),
    ("train",),
    ("tools.common",),
    ("tools.sources",),
    ("tools.inference", "tools.benchmarks.engine"),
    ("tools.runs", "tools.visualize", "tools.benchmarks.peers"),
    ("tools.perf",),
    ("tools.benchmarks.suites",),
    ("tools",),
]
ONLY_IN = {
    "nvidia": ("pipelines/gpu/*", "tools/benchmarks/suites/dali_checks.py", "tools/benchmarks/peers/dali_loader.py"),
    "triton": ("pipelines/gpu/*",),
    "numba": ("pipelines/cpu/*",),
    "llvmlite": ("pipelines/cpu/*",),
    "torch.distributed": ("train/distributed/*",),
    "h5py": ("pipelines/hdf5/*", "tools/benchmarks/peers/torch_loader.py"),
    "fsspec": ("pipelines/remote/*",),
    "aiohttp": ("pipelines/remote/*",),
    "wandb": ("train/reporting/*",),
    "ray": ("pipelines/cluster/*",),
}
SOURCES = sorted(file.relative_to(ROOT) for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))
MODULES = {".".join(source.with_suffix("").parts).removesuffix(".__init__"): source for source in SOURCES}


def floor(module: str) -> tuple[int, str]:
    """Return the number of a module's floor, and the folder or module by which FLOORS names it."""
    places = [(number, place) for number, places in enumerate(FLOORS) for place in places]
    return max((entry for entry in places if f"{module}.".startswith(f"{entry[1]}.")), key=lambda entry: len(entry[1]))


def project_imports(source: Path) -> set[str]:
    """Return the project's modules that a file imports, deferred and type-checking imports included."""
    found = set()
    for name in imported_by(source):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


GRAPH = {module: project_imports(source) - {module} for module, source in MODULES.items()}


def forbidden_imports(module: str, imports: set[str]) -> list[str]:
    """Return the imports of a module that the tables above forbid."""
    found = []
    for imported in sorted(imports):
        if imported in MODULES:
            (ours, place), (theirs, other) = floor(module), floor(imported)
            is_lower = place == other or theirs < ours
            if not is_lower or imported.split(".")[0] not in MAY_IMPORT[module.split(".")[0]]:
                found.append(imported)
        for library, folders in ONLY_IN.items():
            if f"{imported}.".startswith(f"{library}."):
                file = str(MODULES[module])
                found += [] if any(fnmatch(file, folder) for folder in folders) else [imported]
    return found


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one cycle of imports, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        done.add(module)
        cycles = (visit(imported, (*path, module)) for imported in sorted(graph[module]))
        return next((cycle for cycle in cycles if cycle), [])

    return next((cycle for cycle in (visit(module, ()) for module in graph) if cycle), [])


@pytest.mark.parametrize("module", GRAPH)
def test_modules_import_only_what_their_folder_may(module: str) -> None:
    assert forbidden_imports(module, GRAPH[module] | imported_by(MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("pipelines.storage.index", "pipelines.convert.encode"),
        ("pipelines.augment.ops", "numba"),
        ("train.trainer", "torch.distributed.all_reduce"),
        ("pipelines.loader.stage", "nvidia.dali.fn"),
        ("train.optim.muon", "train.engine.state"),
        ("models.lenet", "pipelines.rng"),
        ("configs.utils.errors", "configs.load"),
    ],
)
def test_forbidden_imports_are_found(module: str, imported: str) -> None:
    assert forbidden_imports(module, {imported}) == [imported]


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert import_cycle(GRAPH) == []


def test_cycles_are_found_in_any_order() -> None:
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set[str]()}
    assert import_cycle(chain) == []
    assert import_cycle(chain | {"d": {"b"}}) == ["b", "c", "d", "b"]


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    counts = Counter(source.parent for source in SOURCES if source.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_fences_cover_every_package() -> None:
    assert {source.parts[0] for source in SOURCES} == MAY_IMPORT.keys()
    assert "nvidia.dali.fn" in imported_by(Path("pipelines/gpu/dali_graph.py"))
    assert "pipelines.rng" in GRAPH["pipelines.order"]
    places = {place for places in FLOORS for place in places}
    assert {place for place in places if place not in MODULES} == set()


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_text_files_are_opened_with_an_encoding(source: Path) -> None:
    """The default is the locale's encoding, which may be ASCII."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not uses_locale_encoding(node), f"{source}:{node.lineno}: {ast.unparse(node)}"


def uses_locale_encoding(call: ast.Call) -> bool:
    """Return True if a call opens, reads or writes a file as text without an encoding."""
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
def test_converting_drawing_and_configuring_import_neither_torch_nor_dali(module: str) -> None:
    script = f"import sys, {module}; print([name for name in ('torch', 'nvidia.dali') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"


def test_names_in_all_exist() -> None:
    with_all = [module for module, source in MODULES.items() if "__all__" in (ROOT / source).read_text("utf-8")]
    assert len(with_all) >= 4
    for name in with_all:
        module = importlib.import_module(name)
        assert [entry for entry in module.__all__ if not hasattr(module, entry)] == [], name
