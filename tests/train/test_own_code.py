"""Runs with the user's own model, loss and augmentation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.own_code import OWN_CODE, write_own_code
from helpers.training import DIGITS, run_here
from tools import convert
from tools.perf.model_cases import load_model_config
from train.checkpoint.store import load
from train.distributed.process_group import Ranks, process_group
from train.trained_model import load_trained_model

OWN = ("model.name=own.py:Net", "train.loss=own.py:smooth", "aug.custom=own.py:noise")


def arguments(digits: Path, output: Path, *options: str, code: tuple[str, ...] = OWN) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", digits, "--output", output, "--opts", "train.warmup_epochs=0", *code,
            *options]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits; read only."""
    out = tmp_path_factory.mktemp("data") / "digits"
    convert.main(["digits", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with own code, started in the folder of the code."""
    folder = tmp_path_factory.mktemp("own")
    write_own_code(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(*arguments(digits, folder / "out", "train.epochs=2", "name=whole"))
    return folder


def test_own_model_loss_and_augmentation_train(finished: Path) -> None:
    log = (finished / "out" / "whole" / "log.txt").read_text()
    assert "own.py:Net (2,274 parameters)" in log
    checkpoint = load(finished / "out" / "whole" / "last.pt")
    assert checkpoint["progress"]["best_top1"] > 0.5
    assert {entry["file"] for entry in checkpoint["code"].values()} == {str(finished / "own.py")}


def test_interrupted_run_resumes_bitwise_from_another_folder(
    finished: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(digits, tmp_path, "train.epochs=2", "name=broken", "train.save_every_steps=5")
    monkeypatch.chdir(finished)
    run_here(*command, stop_at={"epoch": 1, "step": 8})
    monkeypatch.chdir(tmp_path)  # which has no own.py
    run_here(*command, "--resume", "auto")
    ours, theirs = load(tmp_path / "broken" / "last.pt"), load(finished / "out" / "whole" / "last.pt")
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor), name
    assert "name: own.py:Net" in ours["config"]
    assert ours["code"] == theirs["code"]


def test_augmentation_and_loss_take_part_in_training(finished: Path, digits: Path, tmp_path: Path) -> None:
    weights = [load(finished / "out" / "whole" / "last.pt")["model"]["network.head.bias"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        for name, code in (("loss", OWN[:2]), ("aug", (OWN[0], OWN[2]))):
            run_here(*arguments(digits, tmp_path, "train.epochs=2", f"name={name}", code=code))
            weights.append(load(tmp_path / name / "last.pt")["model"]["network.head.bias"])
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_resume_with_another_name_of_the_code_is_refused(
    finished: Path, digits: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    code, _, err = call(
        *arguments(digits, finished / "out", "train.epochs=2", "name=whole", code=OWN[:2]), "--resume", "auto"
    )
    assert code == 2
    assert 'aug.custom: "own.py:noise" then, null now' in err


def test_trained_model_is_loaded_in_another_folder_without_its_loss(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished / "out" / "whole"
    with process_group(Ranks.alone("a test")) as device:
        model = load_trained_model(run, device)
    assert model.state.network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 10)
    assert capsys.readouterr().err == ""
    own = write_own_code(tmp_path, OWN_CODE.split("\ndef smooth")[0])  # changed, and without loss and augmentation
    with process_group(Ranks.alone("a test")) as device:
        load_trained_model(run, device)
    assert f"warning: {own} (model.name=own.py:Net) has changed since" in capsys.readouterr().err


def test_summary_of_a_run_finds_its_code(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, classes, _ = load_model_config(finished / "out" / "whole", argparse.Namespace(classes=None, size=None))
    assert (config.model.name, classes) == (f"{finished / 'own.py'}:Net", 10)
