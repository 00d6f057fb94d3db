"""Whole runs with data.views: every view is an image of its own, with the label of its sample."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from helpers.training import DIGITS, Run, alone, run_here, strict_lines
from pipelines import build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch
from tools.perf.batch_size_search import with_batch_size
from tools.visualize.samples import augmented_samples
from train import fit, throughput
from train.build import Job
from train.checkpoint import store
from train.distributed.process_group import Ranks
from train.engine.epoch import train_epoch
from train.engine.step import train_step
from train.optim.freeze import set_training_mode

# Trained on the 360 digits of val: 7 steps of 48 samples, 96 images.
OPTIONS = ["data.train_split=val", "data.batch_size=48", "data.views=2", "aug.crop=pad", "train.epochs=2",
           "train.warmup_epochs=0", "train.schedule=constant"]  # fmt: skip
RESULTS = ("epoch", "step", "lr", "train_loss", "train_top1", "val_loss", "val_top1")


def arguments(data: Path, output: Path, *options: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", "--opts", *OPTIONS, *options]


def config_of(data: Path, *options: str) -> Config:
    return load_config(DIGITS, [*OPTIONS, *options], **{"data.path": str(data)})


def lines_of(output: Path) -> list[dict[str, Any]]:
    lines = strict_lines(output / "digits_lenet" / "metrics.jsonl")
    return [{key: line[key] for key in RESULTS} for line in lines]


@pytest.mark.parametrize("options", [(), ("train.class_weights=balanced",), ("train.label_smoothing=0.1",)])
def test_step_with_views_equals_step_on_the_flattened_batch(options: tuple[str, ...], digits_run: Run) -> None:
    config = config_of(digits_run.data, *options)
    with alone() as device:
        job = Job.load(config, Ranks()).on(device)
        states = [job.build_state(32) for _ in range(2)]
        train_epoch(states[0], job.train_loader(), seed=config.seed)
        set_training_mode(states[1].forward)
        for images, labels in build_train_loader(config.data, config.aug, seed=config.seed, device=device):
            assert images.shape == (48, 2, 3, 32, 32)
            train_step(states[1], Batch(images.flatten(0, 1), labels.repeat_interleave(2)))
    torch.testing.assert_close(*(state.network.state_dict() for state in states), rtol=0, atol=0)
    assert states[0].sums.tolist() == states[1].sums.tolist()
    assert states[0].sums[2] == 7 * 96


def test_run_counts_samples_in_batches_and_views_in_rates(digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path, "log.every_steps=1"))
    folder = tmp_path / "digits_lenet"
    lines = strict_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 14]
    assert [line["images_per_s"] * line["epoch_time_s"] for line in lines] == pytest.approx([7 * 96, 7 * 96])
    assert all(0 < line["train_loss"] < 5 and 0 <= line["train_top1"] <= 1 for line in lines)
    assert (
        "2 epochs of 7 steps at global batch 48 with 2 views of each sample, 1 x cpu"
        in (folder / "log.txt").read_text()
    )
    facts = json.loads((folder / "facts.json").read_text())
    assert (facts["global_batch"], facts["views"]) == (48, 2)


def test_run_with_views_resumes_bitwise_within_an_epoch(digits_run: Run, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for output, at in ((whole, None), (broken, {"epoch": 1, "step": 2}), (broken, None)):
        run_here(*arguments(digits_run.data, output, "train.save_every_steps=3"), stop_at=at)
    ours, theirs = (store.load(output / "digits_lenet" / "last.pt") for output in (broken, whole))
    for part in ("model", "optimizer", "position", "progress"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert lines_of(broken) == lines_of(whole)
    with pytest.raises(UserError, match=r"data\.views: 2 then, 3 now"):
        run_here(*arguments(digits_run.data, broken, "data.views=3"))


def test_proxy_selects_from_all_views(digits_run: Run) -> None:
    config = config_of(digits_run.data, "train.proxy.model=lenet", "train.proxy.keep=0.25")
    with alone() as device:
        job = Job.load(config, Ranks()).on(device)
        state = job.build_state(32)
        train_epoch(state, job.train_loader(), seed=config.seed)
    assert state.sums[2] == 7 * 96 / 4


def test_throughput_counts_views(digits_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # each group takes a second
    monkeypatch.setattr(throughput, "time", clock)
    with alone() as device:
        job = Job.load(config_of(digits_run.data), Ranks()).on(device)
        rate = throughput.measure_images_per_s(job.build_state(32), job.train_loader(), 1, warmup_steps=1, seconds=3)
    assert rate == 96


def test_tools_see_images_of_one_view(digits_run: Run) -> None:
    config = config_of(digits_run.data)
    data = with_batch_size(config, 96).data
    assert (data.batch_size, data.views) == (96, 1)
    samples, (row,) = augmented_samples(config, [0], 4, torch.device("cpu"))
    loader = build_train_loader(config.data, config.aug, seed=config.seed, device="cpu")
    loader.position = Position(0)
    assert torch.equal(next(iter(loader)).images[:4, 0], row.images)
    assert samples.tolist() == loader.plan.indices(0, 0)[:4].tolist()


def test_mixing_views_is_refused_before_the_run(digits_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("data.views=2 cannot be combined with mixup or CutMix")):
        run_here(*arguments(digits_run.data, tmp_path, "aug.mix.cutmix=1"))
    assert not (tmp_path / "digits_lenet").exists()


@pytest.mark.gpu
def test_gpu_run_captures_the_step_for_all_views(digits_run: Run, tmp_path: Path) -> None:
    settings = {"data.path": str(digits_run.data), "output": str(tmp_path), "train.epochs": 1}
    run = fit(str(DIGITS), *OPTIONS, **settings)
    assert "captured the step" in (run.folder / "log.txt").read_text()
    assert run.metrics[0]["images_per_s"] * run.metrics[0]["epoch_time_s"] == pytest.approx(7 * 96)
