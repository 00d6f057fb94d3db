"""What a whole run prints, on terminals of several widths and redirected."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from helpers.terminal import Terminal
from helpers.training import CLEAN, DIGITS, ROOT, Run, command_line, run_script
from tools import compare, predict, show
from train.report import next_commands

FACTS = ("lenet (83,126 parameters) on digits", "next:", "zhu show ", "zhu predict ", "zhu compare ")


def arguments(digits: Path, output: Path, epochs: int) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", digits, "--output", output, "--opts", f"train.epochs={epochs}"]


def test_next_commands_have_arguments_of_their_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "prefix", str(ROOT / "none"))
    assert next_commands(Path("run"))[0].startswith("zhu show ")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.chdir(ROOT)
    assert next_commands(Path("run"))[0] == "source none/bin/activate"
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/zhu")
    commands = [shlex.split(command) for command in next_commands(Path("output/my run"))]
    parsed = [
        tool.parse_arguments(command[2:]) for tool, command in zip((show, predict, compare), commands, strict=True)
    ]
    assert [command[:2] for command in commands] == [["zhu", "show"], ["zhu", "predict"], ["zhu", "compare"]]
    assert parsed[0].checkpoint == Path("output/my run")
    assert parsed[1].checkpoint == [Path("output/my run")]
    assert parsed[2].runs[0] == Path("output/my run")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_thirty_epochs_take_under_forty_lines_without_wraps(columns: int, digits_run: Run, tmp_path: Path) -> None:
    terminal = Terminal(columns)
    assert terminal.run(command_line(*arguments(digits_run.data, Path("output"), 30)), CLEAN, tmp_path) == 0
    lines = terminal.lines()
    print("\n".join(lines))  # shown when the test fails
    assert len(lines) < 40
    assert not terminal.wraps()
    assert [line.split()[0] for line in lines if re.match(r" *\d+/30 ", line)] == [f"{n}/30" for n in range(1, 31)]
    assert all(any(fact in line for line in lines) for fact in FACTS)
    live = [[line for line in screen if " left, run " in line] for screen in terminal.screens()]
    assert max(map(len, live)) == 1  # it was shown, and there was never a second one
    assert not live[-1]


@pytest.mark.slow
def test_redirected_run_prints_one_line_per_epoch(digits_run: Run, tmp_path: Path) -> None:
    done = run_script(*arguments(digits_run.data, tmp_path, 3), "log.every_steps=5", processes=2)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert len([line for line in lines if re.match(r" *[123]/3 ", line)]) == 3
    assert len(lines) < 12
    assert all(line.isprintable() for line in lines)
    assert all(any(fact in line for line in lines) for fact in FACTS)
    assert done.stdout.count(" %, done in ") == 1
    log = (tmp_path / "digits_lenet" / "log.txt").read_text()
    assert "step 5: loss" in log
    assert "step 5: loss" not in done.stdout
