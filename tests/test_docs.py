"""The documentation: its links, commands, settings, examples, files and tests exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configs.load import load_config
from helpers.training import ROOT
from tools import zhu

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = r"(?:python|torchrun [^`]*?)\s(?:tools|train)/\w+\.py|zhu (?=[a-z])"
COMMAND = re.compile(rf"(?:^    |`)((?:{PROGRAM})[^`\n]*)", re.MULTILINE)
FOLDERS = ("configs", "models", "pipelines", "train", "tools", "tests", "docs", "notebooks")
CITED_FILE = re.compile(rf"(?<![\w/.}}-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?)(?![\w*{{<…])")
CITED_TEST = re.compile(r"`(?:[\w/.]+::)?(test_\w+)`")
CITED_TARGET = re.compile(r"(?:^    |`)make ([a-z][\w-]*)", re.MULTILINE)
CITED_MODULE = re.compile(r"python -m ((?:configs|models|pipelines|train|tools)[\w.]*)")


def commands(page: Path) -> list[str]:
    """Return the indented lines and code spans that run one of our programs, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.join(shlex.split(found, comments=True)) for found in COMMAND.findall(text)]


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def arguments_of(command: str) -> tuple[str, list[str]]:
    """Split a command into the module it runs and the arguments of that module."""
    words = shlex.split(command)
    if words[0] == "zhu":
        return zhu.COMMANDS[words[1]][0], words[2:]
    place = next(number for number, word in enumerate(words) if re.match(r"(tools|train)/\w+\.py", word))
    module = words[place].removesuffix(".py").replace("/", ".")
    return module, [word for word in words[place + 1 :] if word != "…"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_have_a_target(page: Path) -> None:
    missing = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            missing.append(f"{target}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_cited_files_modules_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|https?://\S+", "", text)  # links have their own test
    missing = [path for path in CITED_FILE.findall(text) if not (ROOT / path).exists()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    missing += [name for name in CITED_TARGET.findall(text) if not re.search(rf"^{name}:", makefile, re.MULTILINE)]
    missing += [module for module in CITED_MODULE.findall(text) if importlib.util.find_spec(module) is None]
    assert missing == [], f"{page.relative_to(ROOT)} cites files, modules or targets that do not exist"


def test_architecture_names_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [
        file.parent
        for top in FOLDERS[:5]
        for file in (ROOT / top).rglob("__init__.py")
        if any(file.parent.glob("[!_]*"))
    ]
    missing = [path for folder in packages if f"`{(path := folder.relative_to(ROOT).as_posix())}`" not in text]
    assert missing == []


def test_architecture_states_the_floors_of_the_fences() -> None:
    fences = ast.parse((ROOT / "tests" / "test_fences.py").read_text(encoding="utf-8"))
    tables = {ast.unparse(node.targets[0]): node.value for node in fences.body if isinstance(node, ast.Assign)}
    floors: dict[str, list[str]] = {}
    for names in ast.literal_eval(tables["FLOORS"]):
        inside = [name.partition(".")[2] or "*" for name in names]
        floors.setdefault(names[0].partition(".")[0], []).append(", ".join(inside))
    text = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    missing = [line for package, row in floors.items() if (line := f"{package}: {' < '.join(row)}") not in text]
    assert missing == ["models: *"]  # one floor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_cited_tests_exist(page: Path) -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {file.stem for file in files}
    for file in files:
        known |= set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    missing = [name for name in CITED_TEST.findall(page.read_text(encoding="utf-8")) if name not in known]
    assert missing == [], f"{page.relative_to(ROOT)} cites tests that do not exist"


@pytest.mark.parametrize("target", ["train", "test-isa", "fuzz"])
def test_targets_name_existing_files(target: str) -> None:
    dry = ["make", "--dry-run", "--no-print-directory", target, "PY=python3"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # variables of an outer make
    shown = subprocess.run(dry, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    files = re.findall(rf"(?<=\s)(?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+", shown)
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_imports_of_python_examples_work(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_settings_are_understood(command: str) -> None:
    name, arguments = arguments_of(command)
    module = importlib.import_module(name)
    parse = module.parse_arguments if hasattr(module, "parse_arguments") else module.build_parser().parse_args
    parsed = parse(arguments)  # exits if it refuses them
    configs = [Path(word) for word in arguments if word.startswith("configs/")]
    assert all((ROOT / config).is_file() for config in configs), configs
    if configs and getattr(parsed, "opts", None):
        load_config(ROOT / configs[0], parsed.opts)


def test_commands_are_found() -> None:
    found = {page.relative_to(ROOT).as_posix(): commands(page) for page in PAGES}
    assert len(found["README.md"]) >= 14
    assert len(found["docs/homework.md"]) >= 20
    assert len(COMMANDS) >= 60
    assert "zhu convert verify data/medium-imagenet-96" in found["docs/data-format.md"]  # without its comment
