"""README and docs: what they link to is there, and what they tell to type is what the commands take."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from helpers.training import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = (ROOT / "README.md", ROOT / "docs" / "homework.md")  # what users type is told there
COMMAND = re.compile(r"(?:^    |`)((?:python|torchrun [^`]*?)\s(?:tools|train)/\w+\.py[^`\n]*)", re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Indented lines and code spans that start one of our programs, without comments."""
    text = page.read_text().replace("\\\n", " ")
    return [shlex.join(shlex.split(found, comments=True)) for found in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("command", list(dict.fromkeys(command for page in SHOWN for command in commands(page))))
def test_commands_are_understood(command: str) -> None:
    words = shlex.split(command)
    place = next(number for number, word in enumerate(words) if re.match(r"(tools|train)/\w+\.py", word))
    module = importlib.import_module(words[place].removesuffix(".py").replace("/", "."))
    arguments = [word for word in words[place + 1 :] if word != "…"]
    parse = module.parse_arguments if hasattr(module, "parse_arguments") else module.build_parser().parse_args
    parse(arguments)  # else it ends the program
    configs = [Path(word) for word in arguments if word.startswith("configs/")]
    assert all((ROOT / config).is_file() for config in configs), configs


def test_the_commands_are_found() -> None:
    readme, homework = map(commands, SHOWN)
    assert len(readme) >= 25
    assert len(homework) >= 20
    assert "python tools/convert.py verify data/medium-imagenet-96" in readme  # without its comment
