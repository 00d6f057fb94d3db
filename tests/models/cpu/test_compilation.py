"""When train.compile=auto compiles the training step on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Config
from helpers.launches import assert_same_weights
from helpers.training import CLEAN, DIGITS, ROOT, Run
from models.cpu import compilation
from models.cpu.compilation import (
    CACHE_VARIABLE,
    MIN_IMAGES,
    choose_compilation,
    find_obstacle,
    has_toolchain,
    keep_compiled_code,
    training_images,
)

ENOUGH = MIN_IMAGES["lenet"]
# Trains with another length from which LeNet is compiled, and prints how many graphs came from the cache.
PROGRAM = """
import sys
from models.cpu import compilation
compilation.MIN_IMAGES["lenet"] = int(sys.argv.pop(1))
from train import ddp
ddp.main()
from torch._dynamo.utils import counters
print("graphs:", counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def config_of(model: str = "lenet", **sections: Any) -> Config:
    return Config.model_validate({"name": "run", "data": {"path": "data"}, "model": {"name": model}, **sections})


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_toolchain", lambda: True)


def test_long_runs_of_lenet_are_compiled(toolchain: None) -> None:
    assert choose_compilation(config_of(), ENOUGH, 1, None).is_on
    assert "500,000" in choose_compilation(config_of(), ENOUGH, 1, None).reason


@pytest.mark.parametrize(
    ("config", "images", "world_size", "reason"),
    [
        (config_of(), ENOUGH - 1, 1, "fewer than 500,000"),
        (config_of("resnet18"), 10 * ENOUGH, 1, "for lenet only"),
        (config_of("timm/resnet18"), 10 * ENOUGH, 1, "for lenet only"),
        (config_of(), ENOUGH, 2, "several ranks"),
        (config_of(train={"amp": "bf16"}), ENOUGH, 1, "train.amp=bf16"),
        (config_of(train={"loss": "losses.py:focal"}), ENOUGH, 1, "train.loss is your own"),
        (config_of(train={"proxy": {"model": "lenet"}}), ENOUGH, 1, "second model"),
        (config_of(data={"path": "data", "stages": [{"epoch": 1, "image_size": 34}]}), ENOUGH, 1, "1,000,000"),
    ],
)
def test_other_runs_are_not_compiled(config: Config, images: int, world_size: int, reason: str) -> None:
    assert reason in (find_obstacle(config, images, world_size) or "")


def test_resumed_run_does_as_its_checkpoint_says(toolchain: None) -> None:
    assert choose_compilation(config_of("resnet18"), 1, 1, before=True).is_on
    assert not choose_compilation(config_of(), ENOUGH, 1, before=False).is_on


def test_nothing_is_compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_toolchain()
    assert choose_compilation(config_of(), ENOUGH, 1, None) == (
        False,
        "a C++ compiler and Python's headers are not both installed",
    )
    assert not choose_compilation(config_of(), ENOUGH, 1, before=True).is_on


@pytest.mark.parametrize(
    ("data", "train", "images"),
    [
        ({}, {"epochs": 3}, 3000),
        ({}, {"epochs": 3, "first_epoch": 1}, 2000),
        ({"limit": 100}, {"epochs": 3}, 300),
        ({"limit": 0.25}, {"epochs": 3}, 750),
        ({"batch_size": 8}, {"epochs": 3, "max_steps": 5, "accumulation_steps": 2}, 80),
        ({"batch_size": 8}, {"epochs": 1, "max_steps": 10_000}, 1000),
    ],
)
def test_images_are_counted_over_epochs_and_limits(data: dict[str, Any], train: dict[str, Any], images: int) -> None:
    assert training_images(config_of(data={"path": "data", **data}, train=train), 1000) == images


def test_compiled_code_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "chosen")
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == "chosen"
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    folder = Path(os.environ[CACHE_VARIABLE])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "model-zhu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(__file__)))  # no folder can be made there
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    assert CACHE_VARIABLE not in os.environ


def test_run_continues_if_compiling_fails(
    digits_run: Run,
    tmp_path: Path,
    toolchain: None,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    def failing(*_: object, **__: object) -> Callable[..., None]:
        def step(*_: object) -> None:
            raise RuntimeError("g++ is broken\nline 2")

        return step

    monkeypatch.setitem(MIN_IMAGES, "lenet", 1)
    monkeypatch.setattr(torch, "compile", failing)
    code, said, errors = call(DIGITS, f"data.path={digits_run.data}", f"output={tmp_path}", "train.max_steps=1")
    assert code == 0, errors
    assert "cannot compile the step, so it is not compiled: RuntimeError: g++ is broken" in said
    assert "1 steps are done" in said


@pytest.mark.slow
@pytest.mark.skipif(not has_toolchain(), reason="torch.compile on the CPU needs a C++ compiler and Python's headers")
def test_compiled_run_resumes_bitwise_with_code_of_an_earlier_process(digits_run: Run, tmp_path: Path) -> None:
    environment = {
        **CLEAN,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    environment.pop(CACHE_VARIABLE, None)

    def train(min_images: int, steps: int, name: str, *more: str) -> tuple[str, Path]:
        settings = [f"data.path={digits_run.data}", f"output={tmp_path}", f"name={name}", f"train.max_steps={steps}"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(min_images), str(DIGITS), *settings, *more],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment,
        )
        return done.stdout, tmp_path / name

    said, whole = train(1, 4, "whole")
    assert "the step is compiled (train.compile=auto): it saves time in a run of 256 images" in said
    assert "graphs: 0 2" in said
    train(1, 2, "cut")
    said, cut = train(ENOUGH, 4, "cut", "--resume", "auto")
    assert "the step is compiled (train.compile=auto): like when the run started" in said
    assert "graphs: 2 0" in said
    assert_same_weights(cut, whole)


def test_log_says_why_a_short_run_is_not_compiled(digits_run: Run) -> None:
    log = (digits_run.folder / "log.txt").read_text()
    assert "the step is not compiled (train.compile=auto): " in log
