"""Tests of loading a trained model from its checkpoint, without its data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils.errors import UserError
from helpers.training import Run, alone
from pipelines import build_eval_loader
from train.checkpoint import store
from train.checkpoint.resume import find_checkpoints
from train.engine.evaluate import evaluate
from train.trained_model import check_same_classes, load_trained_model


def test_loaded_model_evaluates_like_the_run(digits_run: Run) -> None:
    epochs = [json.loads(line) for line in (digits_run.folder / "metrics.jsonl").read_text().splitlines()]
    with alone() as device:
        trained = load_trained_model(digits_run.folder / "last.pt", device)
        loader = build_eval_loader(trained.config.data, trained.config.eval, device=device)
        result = evaluate(trained.state, loader, 360)
    assert (result.top1, result.top5) == (epochs[-1]["val_top1"], epochs[-1]["val_top5"])
    assert trained.dataset.classes == tuple("0123456789")
    assert (trained.dataset.image_size, trained.epochs, trained.dataset.name) == (32, 2, "digits")


def test_run_folder_prefers_best_over_last_checkpoints(digits_run: Run, tmp_path: Path) -> None:
    assert find_checkpoints(digits_run.folder)[0].name == "best.pt"
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoints(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="the run ended before its first one"):
        find_checkpoints(tmp_path)
    for name in ("previous.pt", "last.pt", "best.pt"):
        shutil.copy(digits_run.folder / "last.pt", tmp_path / name)
        assert find_checkpoints(tmp_path)[0] == tmp_path / name


def test_damaged_best_checkpoint_falls_back_to_last(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.pt", "best.pt"):
        shutil.copy(digits_run.folder / name, tmp_path)
    with (tmp_path / "best.pt").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with alone() as device:
        trained = load_trained_model(tmp_path, device)
        warning = capsys.readouterr().err
        assert trained.path == tmp_path / "last.pt"
        assert warning.startswith(f"warning: checkpoint {tmp_path / 'best.pt'} cannot be read (its checksum is wrong")
        assert warning.endswith(f"{tmp_path / 'last.pt'} is used instead\n")
        with pytest.raises(UserError, match=r"best\.pt cannot be read .*last\.pt is intact$"):
            load_trained_model(tmp_path / "best.pt", device)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": []}, r"'classes' is \[\]"),
        ({"classes": ["cat", 7]}, r"'classes' is \['cat', 7\]"),
        ({"std": [0.5, "x", 0.5]}, r"'std' is \[0\.5, 'x', 0\.5\]"),
        ({"image_size": 0}, "'image_size' is 0"),
        ({"conversion": {"name": "png"}}, r"'conversion' is \{'name': 'png'\}"),
    ],
)
def test_invalid_description_of_the_data_set_is_refused(
    change: dict[str, Any], says: str, digits_run: Run, tmp_path: Path
) -> None:
    content = store.load(digits_run.folder / "last.pt")
    store.write(tmp_path / "last.pt", content | {"dataset": content["dataset"] | change})
    with (
        alone() as device,
        pytest.raises(UserError, match=rf"cannot be read \(its dataset's {says}\);"),
    ):
        load_trained_model(tmp_path / "last.pt", device)


def test_differing_classes_are_named(digits_run: Run) -> None:
    with alone() as device:
        trained = load_trained_model(digits_run.folder, device)
    check_same_classes(trained, tuple("0123456789"), "x")
    with pytest.raises(UserError, match="number 3 is '3' and 'three'"):
        check_same_classes(trained, ("0", "1", "2", "three", *"456789"), "x")
    with pytest.raises(UserError, match="10 and 11 of them"):
        check_same_classes(trained, tuple("0123456789x"), "x")


def test_weights_load_as_saved(digits_run: Run) -> None:
    content = torch.load(digits_run.folder / "best.pt", weights_only=True)
    with alone() as device:
        network = load_trained_model(digits_run.folder, device).state.network
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, content["model"][name])
