"""The examples in docs/extend.md are short and run as they are, in a folder that holds nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.utils.code import load_object
from helpers.training import CLEAN, ROOT, run_here, strict_lines
from tools import convert

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^`(\w+\.py)`[^`]*?\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^    zhu train ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the examples, and the digits where the config expects them."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_has_a_short_example_for_each_topic() -> None:
    assert list(EXAMPLES) == ["mymodel.py", "myloss.py", "myaug.py", "simclr.py", "mydata.py"]
    lines = {name: text.count("\n") for name, text in EXAMPLES.items()}
    assert lines.pop("simclr.py") <= 40
    assert max(lines.values()) <= 20
    assert len(re.findall("```python", PAGE)) == len(EXAMPLES)


@pytest.mark.parametrize("name", ["mymodel.py", "myloss.py", "myaug.py"])
def test_examples_of_code_train(name: str, folder: Path) -> None:
    convert.main(["digits", "--out", "data/digits"])
    [command] = [shlex.split(command) for command in COMMANDS if name in command]
    run_here(*command, "train.epochs=1", "train.warmup_epochs=0")
    config = (folder / "output" / "digits_lenet" / "config.yaml").read_text()
    assert f" {name}:" in config
    assert "done in" in (folder / "output" / "digits_lenet" / "log.txt").read_text()


def test_contrastive_example_learns_features_that_a_probe_classifies(folder: Path) -> None:
    convert.main(["digits", "--out", "data/digits"])
    [command] = [shlex.split(command.replace("\\\n", "")) for command in COMMANDS if "simclr.py" in command]
    few = ["data.path=data/digits", "data.batch_size=64", "data.limit=512", "train.warmup_epochs=0"]
    run_here(*command, *few, "train.epochs=4")
    assert "with 2 views of each sample" in (folder / "output" / "cifar10_lenet" / "log.txt").read_text()
    lines = strict_lines(folder / "output" / "cifar10_lenet" / "metrics.jsonl")
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["val_top1"] > 0.2
    network = load_object("simclr.py:Net", "model.name")(10)
    network(torch.rand(4, 3, 32, 32))[:, :10].sum().backward()
    assert not any(parameter.grad.any() for parameter in network.encoder.parameters())


def test_example_of_a_data_set_converts_and_trains(folder: Path) -> None:
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "mydata.py"], check=True, env=environment, capture_output=True)
    [command] = [shlex.split(command) for command in COMMANDS if "data/mine" in command]
    run_here(*command, "train.epochs=1", "train.warmup_epochs=0")
    assert "on mine (1,500 train samples)" in (folder / "output" / "digits_lenet" / "log.txt").read_text()
