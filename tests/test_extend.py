"""The examples in docs/extend.md are short and run as they are, in a folder that holds nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.training import CLEAN, ROOT, run_here
from tools import convert

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^`(\w+\.py)`[^`]*?\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^    zhu train (.*(?:\\\n.*)*)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the examples, and the digits where the config expects them."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_has_an_example_of_at_most_20_lines_for_each_topic() -> None:
    assert list(EXAMPLES) == ["mymodel.py", "myloss.py", "myaug.py", "mydata.py"]
    assert {name: text.count("\n") for name, text in EXAMPLES.items() if text.count("\n") > 20} == {}
    assert len(re.findall("```python", PAGE)) == len(EXAMPLES)


@pytest.mark.parametrize("name", ["mymodel.py", "myloss.py", "myaug.py"])
def test_examples_of_code_train(name: str, folder: Path) -> None:
    convert.main(["digits", "--out", "data/digits"])
    [command] = [shlex.split(command) for command in COMMANDS if name in command]
    run_here(*command, "train.epochs=1", "train.warmup_epochs=0")
    config = (folder / "output" / "digits_lenet" / "config.yaml").read_text()
    assert f" {name}:" in config
    assert "done in" in (folder / "output" / "digits_lenet" / "log.txt").read_text()


def test_example_of_a_data_set_converts_and_trains(folder: Path) -> None:
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "mydata.py"], check=True, env=environment, capture_output=True)
    [command] = [shlex.split(command) for command in COMMANDS if "data/mine" in command]
    run_here(*command, "train.epochs=1", "train.warmup_epochs=0")
    assert "on mine (1,500 train samples)" in (folder / "output" / "digits_lenet" / "log.txt").read_text()
