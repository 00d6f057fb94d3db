"""Tests of tools.perf.model_cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.utils.errors import UserError
from helpers.training import Run
from tools import summary
from tools.perf import model_cases
from train.checkpoint import store


def test_default_size_comes_from_the_configs() -> None:
    sizes = {name: model_cases.default_size(name) for name in ("lenet", "alexnet", "resnet18", "resnet50", "resnet34")}
    assert sizes == {"lenet": 32, "alexnet": 70, "resnet18": 32, "resnet50": 96, "resnet34": 32}
    assert model_cases.default_size("timm/vit_tiny_patch16_224") == 224


def test_run_folder_and_its_config_give_the_same_case(digits_run: Run, tmp_path: Path) -> None:
    options = summary.parse_arguments(["x"])
    run = model_cases.build_case(str(digits_run.folder), options)
    assert (run.label, run.model, run.image_size, run.classes) == ("digits_lenet", "lenet", 32, 10)
    assert (run.batch_size, run.train.lr) == (64, 6e-3)
    config = str(digits_run.folder / "config.yaml")
    assert model_cases.build_case(config, options) == run
    options = summary.parse_arguments(["x", "--batch-size", "7", "--classes", "3", "--size", "35"])
    changed = model_cases.build_case(config, options)
    assert (changed.batch_size, changed.classes, changed.image_size) == (7, 3, 35)


def test_checkpoint_that_does_not_name_its_classes_needs_an_option(digits_run: Run, tmp_path: Path) -> None:
    store.write(tmp_path / "last.pt", store.load(digits_run.folder / "last.pt") | {"dataset": {"name": "digits"}})
    with pytest.raises(UserError, match=r"does not set the number of classes, .* give --classes"):
        model_cases.build_case(str(tmp_path), summary.parse_arguments(["x"]))
    options = summary.parse_arguments(["x", "--classes", "3", "--size", "35"])
    assert model_cases.build_case(str(tmp_path), options).classes == 3
