"""Whole runs with stages: sizes of each stage, and bitwise resume."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import DataConfig
from configs.utils.errors import UserError
from helpers.training import DIGITS, Run, alone, make_state, run_here, run_script, strict_lines
from models import build_model
from pipelines import build_train_loader
from train.checkpoint import store
from train.engine.warm_up import check_image_sizes

# Trained on the 360 digits of val, to be quick: 7 steps of 48 samples, or 15 of 24 in epochs 1 and 2.
UPDATES = [7, 22, 37, 44]  # at the ends of the epochs
STAGES = "[{{epoch: 1, image_size: 33, batch_size: {}}}, {{epoch: 3, image_size: 35, batch_size: {}}}]"
PLAIN = ["train.warmup_epochs=0", "train.schedule=constant", "train.lr_batch_size=48"]
# Everything that a run may keep beside its weights.
EVERYTHING = [
    "train.warmup_epochs=0.5", "train.schedule=plateau", "train.schedule_options.metric=train_loss",
    "train.schedule_options.patience=0", "train.schedule_options.threshold=1", "train.schedule_options.rate=0.5",
    "train.lr_batch_size=48", "train.lr_scaling=sqrt", "train.ema.decay=0.9", "train.ema.every_steps=2",
    "train.lookahead.every_steps=3", "aug.mix.mixup=0.2", "aug.mix.cutmix=1", "aug.mix.off_epoch=3",
    "train.loss=bce", "train.bce_threshold=0.3", "train.label_smoothing=0.1", "train.save_every_steps=1",
]  # fmt: skip
RESULTS = ["train_loss", "val_loss", "ema_val_loss", "train_top1", "val_top1", "ema_val_top1"]


def arguments(data: Path, output: Path, *options: str, passes: int = 1, ranks: int = 1) -> list[str | Path]:
    """Return arguments with the same global batches for any split into ranks and micro-steps."""
    batch = 48 // (passes * ranks)
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", "--opts",
            "data.train_split=val", "train.epochs=4", f"data.batch_size={batch}", f"train.accumulation_steps={passes}",
            f"data.stages={STAGES.format(batch // 2, batch)}", *options]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with EVERYTHING and two micro-steps per step; read only."""
    output = tmp_path_factory.mktemp("unbroken")
    run_here(*arguments(digits_run.data, output, *EVERYTHING, passes=2))
    return output / "digits_lenet"


@pytest.fixture(scope="module")
def broken(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of such a run, stopped within a stage and an epoch; to be copied."""
    output = tmp_path_factory.mktemp("broken")
    at = {"epoch": 2, "step": 7}
    run_here(*arguments(digits_run.data, output, *EVERYTHING, passes=2), stop_at=at)
    return output


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return strict_lines(folder / "metrics.jsonl")


def test_stage_uses_its_sizes_learning_rate_and_steps(digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path, *PLAIN, passes=2))
    lines = lines_of(tmp_path / "digits_lenet")
    assert [line["step"] for line in lines] == UPDATES
    assert [line["lr"] for line in lines] == pytest.approx([6e-3, 3e-3, 3e-3, 6e-3])
    log = (tmp_path / "digits_lenet" / "log.txt").read_text()
    for epoch, side, steps, batch in ((0, 32, 7, 48), (1, 33, 15, 24), (3, 35, 7, 48)):
        assert (
            f"from epoch {epoch + 1}: images of {side} x {side} pixels, {steps} steps at global batch {batch}\n" in log
        )
    assert "epoch 3: images" not in log
    assert "4 epochs of 7 steps at global batch 48" in log


def test_run_interrupted_within_stage_resumes_bitwise(
    digits_run: Run, unbroken: Path, broken: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(broken, tmp_path / "output"))
    run_here(*arguments(digits_run.data, output, *EVERYTHING, passes=2))
    ours, theirs = (store.load(folder / "last.pt") for folder in (output / "digits_lenet", unbroken))
    for part in ("model", "optimizer", "ema", "lookahead", "progress", "position"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    for line, other in zip(lines_of(output / "digits_lenet"), lines_of(unbroken), strict=True):
        compared = ["epoch", "step", "lr", *RESULTS]
        assert {key: line[key] for key in compared} == {key: other[key] for key in compared}
    log = (output / "digits_lenet" / "log.txt").read_text()
    assert "from epoch 3: images of 33 x 33 pixels" in log.partition("resumed")[2]


@pytest.mark.slow
def test_two_processes_continue_with_the_same_global_batches(
    digits_run: Run, unbroken: Path, broken: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(broken, tmp_path / "output"))
    done = run_script(*arguments(digits_run.data, output, *EVERYTHING, ranks=2), processes=2)
    assert done.returncode == 0, done.stderr
    for line, other in zip(lines_of(output / "digits_lenet"), lines_of(unbroken), strict=True):
        assert (line["step"], line["lr"]) == (other["step"], other["lr"])
        assert {key: line[key] for key in RESULTS} == pytest.approx({key: other[key] for key in RESULTS}, rel=1e-3)


def test_stages_after_the_last_epoch_trigger_warning(digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path, *PLAIN, "train.epochs=2"))
    log = (tmp_path / "digits_lenet" / "log.txt").read_text()
    assert "data.stages with epoch=3 or later are not reached with train.epochs=2, since" in log
    assert "count from 0: the last epoch is 1\n" in log


def test_unsupported_image_size_is_refused_before_creating_a_run_folder(digits_run: Run, tmp_path: Path) -> None:
    for option in ("data.stages=[{epoch: 1, image_size: 40}]", "data.image_size=40"):
        with pytest.raises(UserError) as error:
            run_here(*arguments(digits_run.data, tmp_path, option, "eval.image_size=32"))
        sentence = r"the model is trained on images of 40 pixels .* 32 pixels .* does not accept both \(.*35.*\); use"
        assert re.match(sentence, str(error.value))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "digits_lenet").exists()


@pytest.mark.parametrize("is_for_more", [False, True])
def test_fixed_size_timm_model_is_refused_unless_dynamic(is_for_more: bool, digits_run: Run) -> None:
    data = DataConfig(path=str(digits_run.data), batch_size=8, image_size=48)
    with alone() as device:
        shape: dict[str, Any] = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
        state = make_state(build_model("timm/test_vit", 10, **shape, dynamic_img_size=is_for_more))
        loader = build_train_loader(data, device=device)
        check_image_sizes(state, loader, built_for=48)  # no check at the size of the evaluation
        if is_for_more:
            check_image_sizes(state, loader, built_for=32)
        else:
            with pytest.raises(UserError, match=r"48 pixels .* \(Input height \(48\) .*dynamic_img_size: true"):
                check_image_sizes(state, loader, built_for=32)
