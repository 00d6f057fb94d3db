"""tools/zhu.py: every command, a config and settings as plain words, and completion in shells."""

from __future__ import annotations

import os
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from helpers.imports import ROOT
from tools import benchmark, find_lr, show, speedrun, sweep, zhu
from train import ddp

CONFIG = "configs/digits_lenet.yaml"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["zhu", *words])
    with pytest.raises(SystemExit) as ended:
        zhu.main()
    return ended.value.code


def test_installed_program_is_this_one() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    module, function = setup["options.entry_points"]["console_scripts"].removeprefix("\nzhu = ").split(":")
    assert getattr(import_module(module), function) is zhu.main


def test_every_tool_is_a_command() -> None:
    tools = {f"tools.{file.stem}" for file in (ROOT / "tools").glob("[!_]*.py")} - {"tools.zhu"}
    assert {module for module, _ in zhu.COMMANDS.values()} == {*tools, "train.ddp", "tools.runs.listing"}


def test_command_gets_its_arguments_and_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "convert", "digits", "--out", str(tmp_path / "digits"), "--workers", "1") == 0
    assert call(monkeypatch, "convert", "verify", str(tmp_path / "digits")) == 0
    assert "is intact" in capsys.readouterr().out
    assert call(monkeypatch, "convert", "verify", str(tmp_path)) == 2
    assert call(monkeypatch, "train", CONFIG, "train.epoch=1") == 2
    assert "did you mean train.epochs" in capsys.readouterr().err
    assert call(monkeypatch, "trian", CONFIG) == 2
    assert "'trian' is not a command; did you mean train?" in capsys.readouterr().err
    assert call(monkeypatch, "train", CONFIG, "--epochs", "3") == 2
    assert "--epochs 3; write settings as KEY=VALUE, such as train.epochs=3" in capsys.readouterr().err
    assert call(monkeypatch, "unknown") == 2
    assert "usage: zhu [-h] COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits_lenet", "digits_lenet.yml", "configs/digits_lenet.yml"])
def test_similar_config_is_suggested(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert call(monkeypatch, "train", name) == 2
    assert f"{name} does not exist; did you mean {CONFIG}?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[CONFIG, "seed=1"], ["--cfg", CONFIG, "--opts", "seed=1"]])
def test_show_and_benchmark_take_the_config_as_a_word(words: list[str]) -> None:
    for parsed in (
        show.parse_arguments(words),
        *(benchmark.parse_arguments([s, *words]) for s in ("profile", "train")),
    ):
        assert (parsed.cfg, parsed.opts) == (CONFIG, ["seed=1"])


@pytest.mark.parametrize("parse", [ddp.parse_arguments, find_lr.parse_arguments, speedrun.parse_arguments])
@pytest.mark.parametrize(
    "command",
    [
        f"{CONFIG} seed=1 train.lr=2 --data-path d",
        f"--data-path d {CONFIG} seed=1 train.lr=2",
        f"{CONFIG} seed=1 --data-path d train.lr=2",
        f"{CONFIG} seed=1 --data-path d --opts train.lr=2",
        f"--cfg {CONFIG} seed=1 train.lr=2 --data-path d",
    ],
)
def test_plain_words_are_the_config_and_its_settings(parse: object, command: str) -> None:
    assert callable(parse)
    assert parse(command.split()) == parse(f"--cfg {CONFIG} --data-path d --opts seed=1 train.lr=2".split())


def test_sweep_takes_the_config_as_a_plain_word() -> None:
    plain, option = (sweep.parse_arguments([*words, "seed=1,2"]) for words in ([CONFIG], ["--cfg", CONFIG]))
    assert plain == option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the config file is missing"),
        ("train.lr=2", "the config file is missing"),
        (f"{CONFIG} train.lr 2", "'train.lr' is not a setting"),
        (f"--cfg {CONFIG} {CONFIG}", f"'{CONFIG}' is not a setting"),
    ],
)
def test_words_that_are_neither_config_nor_setting_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ddp.parse_arguments(words.split())
    assert message in capsys.readouterr().err


def test_nproc_starts_torchrun_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["missing.yaml", "--nproc", "2"]
    call(monkeypatch, "train", *words)
    ((program, dash_m, module, *arguments),) = started
    assert [program, dash_m, module] == [sys.executable, "-m", "torch.distributed.run"]
    parsed = parse_torchrun(arguments)
    assert (parsed.nproc_per_node, parsed.standalone) == ("2", True)
    assert (parsed.training_script, parsed.training_script_args) == (str(ROOT / "train" / "ddp.py"), words)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call(monkeypatch, "train", *words) == 2  # a rank reads the config
    assert len(started) == 1


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("zhu tra", {"train "}),
        ("zhu train configs/digits", {"configs/digits_lenet.yaml "}),
        ("zhu train configs/digits_lenet.yaml train.ep", {"train.epochs="}),
        ("zhu sweep configs/digits_lenet.yaml aug.mix.m", {"aug.mix.mixup=", "aug.mix.mode="}),
        ("zhu predict --checkpoint x --tta f", {"flip", "flip-translate"}),
        ("zhu convert hd", {"hdf5 "}),
        ("zhu list ru", {"runs "}),
    ],
)
def test_shell_completes_commands_options_files_and_settings(tmp_path: Path, line: str, completions: set[str]) -> None:
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"), "_ARGCOMPLETE_SHELL": "bash"}
    subprocess.run([sys.executable, "-m", "tools.zhu"], env={**os.environ, **asked}, cwd=ROOT, check=True)
    assert set((tmp_path / "words").read_text().splitlines()) == completions
