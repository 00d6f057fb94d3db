"""Whole runs of train/ddp.py, from command line to run folder, and refused input."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train.throughput
import train.trainer
from configs.load import load_config
from configs.schema import TrainConfig
from helpers.training import (
    CLEAN,
    DIGITS,
    ROOT,
    after_each_save,
    broken_after,
    command_line,
    random_batch,
    run_script,
    strict_lines,
)
from models import build_model
from pipelines.loader.batches import Batch
from tools import convert
from train import ddp
from train.build import to_device
from train.checkpoint import writer
from train.checkpoint.run_dir import LOCK_FILE
from train.distributed.process_group import Ranks, process_group
from train.engine.epoch import training_steps
from train.engine.evaluate import Evaluation
from train.engine.execution import build_plan
from train.engine.state import build_state
from train.engine.step import train_step
from train.optim.factory import build_optimizer
from train.throughput import measure_images_per_s

METRICS = [
    "epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr", "images_per_s",
    "data_wait_fraction", "epoch_time_s", "memory_gib",
]  # fmt: skip
EPOCHS, STEPS_PER_EPOCH = 3, 44  # 1,437 samples in global batches of 32
SHORT = [
    f"train.epochs={EPOCHS}", "train.warmup_epochs=0", "train.lr=3e-3", "train.save_every_steps=5",
    "data.batch_size=32", "aug.crop=pad", "aug.padding=2", "aug.flip=0", "model.drop_rate=null",
]  # fmt: skip
MODELS = {
    "lenet": [],
    # the smallest of timm, with batch norm
    "dropout": [
        "model.name=timm/test_efficientnet",
        "model.drop_rate=0.5",
        "aug.flip=0.5",
        "data.batch_size=16",
        "train.accumulation_steps=2",
    ],
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, converted: 1,437 train and 360 val samples of 32x32; read only."""
    out = tmp_path_factory.mktemp("train") / "digits"
    assert convert.main(["digits", "--out", str(out), "--workers", "1"]) == 0
    return out


def arguments(data: Path, output: Path, *opts: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--opts", *SHORT, *opts]


@pytest.fixture(scope="session")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a finished one-process run of one of MODELS; read only."""
    folders: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in folders:
            output = tmp_path_factory.mktemp(model)
            done = run_script(*arguments(digits, output, *MODELS[model]))
            assert (done.returncode, done.stderr) == (0, "")
            folders[model] = output / "digits_lenet"
        return folders[model]

    return run


Call = Callable[..., tuple[int, str, str]]
Unbroken = Callable[[str], Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the model's state of the last checkpoint."""
    model: dict[str, torch.Tensor] = torch.load(folder / "last.pt", weights_only=True)["model"]
    return model


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """Copy the run folder to a new output folder that may be modified."""
    target = tmp_path / "output" / folder.name
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# The run folder


def test_run_writes_config_log_metrics_curves_and_checkpoints(unbroken: Unbroken, digits: Path) -> None:
    folder = unbroken("lenet")
    checkpoints = {"last.pt", "previous.pt", "best.pt"}
    names = {"config.yaml", "facts.json", "lock", "log.txt", "metrics.jsonl", "curves.png", *checkpoints}
    assert {path.name for path in folder.iterdir()} == names
    config = load_config(DIGITS, SHORT, **{"data.path": str(digits), "output": str(folder.parent)})
    assert load_config(folder / "config.yaml") == config
    log = (folder / "log.txt").read_text()
    assert "lenet (83,126 parameters) on digits (1,437 train samples), 3 epochs of 44 steps at global batch 32" in log
    assert str(folder) in log
    with Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"


def test_metrics_have_one_line_per_epoch_with_fixed_fields(unbroken: Unbroken) -> None:
    lines = strict_lines(unbroken("lenet") / "metrics.jsonl")
    assert [list(line) for line in lines] == [METRICS] * EPOCHS
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 44), (1, 88), (2, 132)]
    for line in lines:
        assert 0 <= line["train_top1"] <= 1
        assert 0 <= line["val_top1"] <= line["val_top5"] <= 1
        assert 0 <= line["data_wait_fraction"] <= 1
        assert line["images_per_s"] == pytest.approx(44 * 32 / line["epoch_time_s"])
        assert 0.05 < line["memory_gib"] < 64
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    assert lines[-1]["val_top1"] > 0.6


def test_last_rates_and_best_checkpoint_match_metrics(unbroken: Unbroken) -> None:
    folder = unbroken("lenet")
    lines = strict_lines(folder / "metrics.jsonl")
    assert lines[0]["lr"] > lines[1]["lr"] > lines[2]["lr"] > 0
    best = max(lines, key=lambda line: line["val_top1"])
    content = torch.load(folder / "best.pt", weights_only=True)
    assert content["progress"] == {"best_top1": best["val_top1"]}
    assert content["position"] == {"epoch": best["epoch"] + 1, "step": 0}


def test_second_run_of_same_name_gets_next_number(digits: Path, tmp_path: Path, call: Call) -> None:
    command = arguments(digits, tmp_path, "train.epochs=1", "name=twice")
    assert call(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()}
    code, out, _ = call(*command, "seed=1")
    assert (code, str(tmp_path / "twice-2") in out) == (0, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()} == before
    assert not torch.equal(*(weights(tmp_path / name)["network.fc3.weight"] for name in ("twice", "twice-2")))


def test_training_metrics_are_those_of_their_epoch_alone(
    digits: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[list[float]] = []

    def noted(state: Any, *parts: Any, **options: Any) -> Iterator[tuple[int, float]]:
        yield from training_steps(state, *parts, **options)
        sums.append(state.sums.tolist())

    monkeypatch.setattr(train.trainer, "training_steps", noted)
    assert call(*arguments(digits, tmp_path, "train.epochs=2"))[0] == 0
    lines = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [seen for _, _, seen in sums] == [44 * 32] * 2
    assert [line["train_loss"] for line in lines] == [loss / seen for loss, _, seen in sums]
    assert [line["train_top1"] for line in lines] == [correct / seen for _, correct, seen in sums]


def test_skipped_evaluations_are_null_in_metrics(digits: Path, tmp_path: Path, call: Call) -> None:
    code, _, _ = call(*arguments(digits, tmp_path, "train.eval_every_epochs=2", "data.batch_size=256"))
    assert code == 0
    lines = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [line["val_top1"] is None for line in lines] == [True, False, False]
    assert [line["val_loss"] is None for line in lines] == [True, False, False]


# Broken runs


def saved_steps(folder: Path) -> int:
    """Return the optimizer steps of the last checkpoint; -1 without one."""
    if not (folder / "last.pt").exists():
        return -1
    position = torch.load(folder / "last.pt", weights_only=True)["position"]
    return int(position["epoch"] * STEPS_PER_EPOCH + position["step"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_run_killed_at_any_time_resumes_bitwise(model: str, unbroken: Unbroken, digits: Path, tmp_path: Path) -> None:
    expected = unbroken(model)
    seed = time.time_ns()
    print(f"{seed=}")  # shown when the test fails
    instant = random.Random(seed)
    steps_before, delay_s = instant.randrange(100), instant.uniform(0, 0.05)
    command = arguments(digits, tmp_path, *MODELS[model])
    folder = tmp_path / "digits_lenet"
    process = subprocess.Popen(command_line(*command), env=CLEAN, stdout=subprocess.DEVNULL)
    while process.poll() is None and saved_steps(folder) <= steps_before:
        time.sleep(0.02)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still running
    print(f"resumes after {saved_steps(folder)} steps")

    done = run_script(*command, "--resume", "auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed from" in done.stdout
    ours, theirs = weights(folder), weights(expected)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    results = ["epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr"]
    for line, other in zip(*(strict_lines(at / "metrics.jsonl") for at in (folder, expected)), strict=True):
        assert {key: line[key] for key in results} == {key: other[key] for key in results}


@pytest.fixture(scope="session")
def interrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run stopped after step 26, in its second epoch; to be copied."""

    output = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddp.py", *map(str, arguments(digits, output))])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with broken_after(lambda _, position: position == {"epoch": 1, "step": 26}):
            ddp.main()
    return output / "digits_lenet"


@pytest.mark.slow
def test_two_accumulating_processes_resume_run_of_one(
    digits: Path, tmp_path: Path, unbroken: Unbroken, interrupted: Path
) -> None:
    folder = copy_of(interrupted, tmp_path)
    other_cut = ["data.batch_size=8", "train.accumulation_steps=2"]
    done = run_script(*arguments(digits, folder.parent, *other_cut), "--resume", "auto", processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_curves(folder, unbroken("lenet"))


def assert_same_curves(ours: Path, theirs: Path) -> None:
    for line, other in zip(*(strict_lines(at / "metrics.jsonl") for at in (ours, theirs)), strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert line["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
        assert (line["step"], line["lr"]) == (other["step"], other["lr"])


@pytest.mark.slow
def test_two_processes_give_curves_of_one(digits: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    done = run_script(*arguments(digits, tmp_path, "data.batch_size=16"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count(" 1/3 ") == 1  # only one rank prints
    assert_same_curves(tmp_path / "digits_lenet", unbroken("lenet"))


@pytest.mark.parametrize("what", ["last.pt", "", "best.pt"], ids=["last.pt", "the folder", "best.pt"])
def test_resume_from_file_or_folder_repeats_no_epoch(
    what: str, digits: Path, tmp_path: Path, call: Call, unbroken: Unbroken, interrupted: Path
) -> None:
    folder = copy_of(interrupted, tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "train_loss": 77}\n{"epoch": 1, "tra')  # left by a kill between log and save
    code, out, err = call(*arguments(digits, folder.parent), "--resume", folder / what)
    assert (code, err) == (0, "")
    assert f"resumed from {folder / (what or 'last.pt')} at" in out
    lines = strict_lines(folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert_same_curves(folder, unbroken("lenet"))


def test_best_checkpoint_survives_resume_until_improved(
    digits: Path, tmp_path: Path, call: Call, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(interrupted, tmp_path)
    best = torch.load(folder / "best.pt", weights_only=True)["progress"]["best_top1"]
    results = iter([best - 0.01, best + 0.01])
    monkeypatch.setattr(
        train.trainer, "evaluate", lambda *_: Evaluation(loss=1.0, top1=next(results), top5=1.0, samples=360)
    )
    before, written = (folder / "best.pt").read_bytes(), []

    def note(name: str, position: dict[str, int]) -> None:
        written.append((name, position["epoch"]))
        if position == {"epoch": 2, "step": 0}:
            assert (folder / "best.pt").read_bytes() == before

    with after_each_save(note):
        assert call(*arguments(digits, folder.parent), "--resume", "auto")[0] == 0
    assert [epoch for name, epoch in written if name == "best.pt"] == [3]
    assert torch.load(folder / "best.pt", weights_only=True)["progress"] == {"best_top1": best + 0.01}


def test_resume_auto_without_checkpoint_starts_new_run(digits: Path, tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "digits_lenet"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "train_loss": 77}\n')  # killed before the first checkpoint
    code, out, _ = call(*arguments(digits, tmp_path, "train.epochs=1"), "--resume", "auto")
    assert code == 0
    assert "resumed" not in out
    assert [line["step"] for line in strict_lines(folder / "metrics.jsonl")] == [STEPS_PER_EPOCH]
    assert [path.name for path in tmp_path.iterdir()] == ["digits_lenet"]


def test_resume_auto_takes_the_latest_run_of_the_name(digits: Path, tmp_path: Path, call: Call) -> None:
    for seed in (0, 1):
        assert call(*arguments(digits, tmp_path, "train.epochs=1", f"seed={seed}"))[0] == 0
    code, out, _ = call(*arguments(digits, tmp_path, "train.epochs=1", "seed=1"), "--resume", "auto")
    assert code == 0
    assert f"resumed from {tmp_path / 'digits_lenet-2' / 'last.pt'}" in out


def test_finished_run_reports_nothing_to_do_and_changes_nothing(
    digits: Path, tmp_path: Path, call: Call, unbroken: Unbroken
) -> None:
    folder = copy_of(unbroken("lenet"), tmp_path)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "last.pt", "best.pt")}
    code, out, err = call(*arguments(digits, folder.parent), "--resume", "auto")
    assert (code, err) == (0, "")
    assert "nothing to do" in out
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_save_interval_applies_without_save_every_steps(
    digits: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, int]] = []
    monkeypatch.setattr(writer, "SAVE_INTERVAL_S", 0.0)
    opts = ["train.save_every_steps=null", "train.epochs=1"]
    with after_each_save(lambda name, position: saved.extend([position] if name == "last.pt" else [])):
        assert call(*arguments(digits, tmp_path, *opts))[0] == 0
    assert saved == [*({"epoch": 0, "step": step} for step in range(1, 45)), {"epoch": 1, "step": 0}]


def test_due_checkpoint_is_written_also_at_epoch_end(digits: Path, tmp_path: Path, call: Call) -> None:
    saved: list[tuple[str, int, int]] = []
    opts = ["train.save_every_steps=44", "train.save_every_epochs=3", "train.eval_every_epochs=3"]
    with after_each_save(lambda name, position: saved.append((name, position["epoch"], position["step"]))):
        assert call(*arguments(digits, tmp_path, *opts))[0] == 0
    assert saved == [("last.pt", epoch, 44) for epoch in range(3)] + [("best.pt", 3, 0), ("last.pt", 3, 0)]


# Refused resumes


def test_resume_with_other_settings_is_refused_by_name(
    digits: Path, tmp_path: Path, call: Call, unbroken: Unbroken, npy_data: Path
) -> None:
    folder = copy_of(unbroken("lenet"), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    for options, names in (
        (["seed=7"], ["seed: 0 then, 7 now"]),
        (["data.batch_size=16"], ["global batch: 32 then, 16 now"]),
        (["train.accumulation_steps=2"], ["global batch: 32 then, 64 now"]),
        (["data.image_size=33", "aug.padding=3"], ["data.image_size: null then, 33 now", "aug.padding: 2 then, 3 now"]),
        (["train.optimizer.weight_decay=0.1"], ["train.optimizer.weight_decay: 0.05 then, 0.1 now"]),
        (["model.name=resnet18"], ['model.name: "lenet" then, "resnet18" now']),
    ):
        code, _, err = call(*arguments(digits, folder.parent, *options), "--resume", "auto")
        assert_refused(code, err, *names)
    code, _, err = call(*arguments(npy_data, folder.parent), "--resume", "auto")
    assert_refused(code, err, "data set: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before


# --eval and --throughput


def test_eval_prints_metrics_accuracy_and_writes_nothing(
    digits: Path, tmp_path: Path, call: Call, unbroken: Unbroken
) -> None:
    folder = copy_of(unbroken("lenet"), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = strict_lines(folder / "metrics.jsonl")
    for source, expected in (
        ("auto", lines[-1]),
        (str(folder / "best.pt"), max(lines, key=lambda line: line["val_top1"])),
    ):
        code, out, err = call(*arguments(digits, folder.parent), "--eval", "--resume", source)
        assert (code, err) == (0, "")
        shown = re.search(r"val loss ([\d.]+), top1 ([\d.]+), top5 ([\d.]+) over 360 samples", out)
        assert shown is not None
        for text, key in zip(shown.groups(), ("val_loss", "val_top1", "val_top5"), strict=True):
            assert text == f"{expected[key]:.4f}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_throughput_prints_images_per_second_and_creates_no_folder(
    digits: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(measure_images_per_s, warmup_steps=1, seconds=0.1)
    monkeypatch.setattr(train.throughput, "measure_images_per_s", quick)
    code, out, err = call(*arguments(digits, tmp_path, "train.accumulation_steps=2"), "--throughput")
    assert (code, err) == (0, "")
    shown = re.fullmatch(r"digits_lenet: ([\d,]+) images/s in training on 1 x cpu\n", out)
    assert shown is not None
    assert int(shown[1].replace(",", "")) > 0
    assert list(tmp_path.iterdir()) == []


# Bad input


def assert_refused(code: int, err: str, *fragments: str) -> None:
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--opts", "train.epoch=5"], ["train.epoch=5 is unknown", "train.epochs"]),
        (["--opts", "train.epochs=many"], ['train.epochs="many"', "integer"]),
        (["--opts", "model.num_classes=7"], ["model.num_classes=7", "has 10 classes", "set it to 10"]),
        (["--data-path", "/nowhere/digits"], ["'/nowhere/digits' does not exist", "zhu convert"]),
        (["--opts", "data.val_split=test"], ["split 'test'", "does not exist", "['train', 'val']"]),
        (["--batch-size", "2000"], ["data.batch_size=2000", "1437 samples", "use at most 1437"]),
        (["--opts", "train.accumulation_steps=30", "data.batch_size=64"], ["accumulation_steps 30", "at most 47"]),
        (["--opts", "data.image_size=28"], ["28x28", "smallest is 32"]),
        (["--opts", "model.name=alexnet"], ["32x32", "smallest is 63"]),
        (["--opts", "model.name=lenet5"], ["'lenet5' is unknown", "lenet"]),
        (["--resume", "/nowhere/last.pt"], ["/nowhere/last.pt does not exist"]),
        (["--resume", "."], ["last.pt does not exist"]),
        (["--eval"], ["--eval needs a checkpoint", "--resume PATH"]),
        (["--eval", "--resume", "auto"], ["no run 'digits_lenet'", "--resume PATH"]),
        (["--resume", str(DIGITS)], [f"{DIGITS} cannot be read"]),
        (["--output", str(DIGITS)], ["cannot create the run folder", "give another --output"]),
        (["--cfg", "configs/missing.yaml"], ["configs/missing.yaml cannot be read"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "_")[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_refused_before_creating_a_run_folder(
    options: list[str], fragments: list[str], digits: Path, tmp_path: Path, call: Call
) -> None:
    code, out, err = call(*arguments(digits, tmp_path / "output"), *options)
    assert_refused(code, err, *fragments)
    assert out == ""
    assert not (tmp_path / "output").exists()
    assert not Path(LOCK_FILE).exists()  # in the folder that --resume . names


def test_script_refuses_a_damaged_checkpoint(digits: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((unbroken("lenet") / "last.pt").read_bytes()[:-1000])
    done = run_script(*arguments(digits, tmp_path), "--resume", damaged)
    assert_refused(done.returncode, done.stderr, "damaged.pt cannot be read")
    assert done.stdout == ""


@pytest.mark.parametrize(
    "options", [[], ["--cfg"], ["--cfg", str(DIGITS), "--batch-size", "many"], ["--cfg", str(DIGITS), "--epochs", "5"]]
)
def test_malformed_command_line_exits_with_2_and_usage(options: list[str], call: Call) -> None:
    code, out, err = call(*options)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ")
    assert "Traceback" not in err


# W&B


def test_run_completes_if_wandb_cannot_start(
    digits: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    code, out, err = call(*arguments(digits, tmp_path, "train.epochs=1", "log.wandb.project=zhu"))
    assert (code, err) == (0, "")
    assert "W&B is off for this run: CommError: no route to host" in out
    assert len(strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")) == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_amp_channels_last_and_compile_learn_one_batch_on_a_gpu() -> None:
    with process_group(Ranks()) as device:
        torch.manual_seed(0)
        network = build_model("resnet18", 10, mean=[0.5] * 3, std=[0.25] * 3)
        network = to_device(network, device, channels_last=True)
        config = TrainConfig(lr=1e-3, amp="auto", compile="default")
        optimizer = build_optimizer(network, config.optimizer, config.lr)
        state = build_state(network, optimizer, config, build_plan(config, device))
        assert state.plan.amp in (torch.bfloat16, torch.float16)
        images, labels = random_batch(64)
        batch = Batch(images.to(device), labels.to(device))
        losses = []
        for _ in range(30):
            state.sums.zero_()
            train_step(state, batch)
            losses.append(float(state.sums[0] / state.sums[2]))
        assert losses[-1] < 0.5 * losses[0]
        convolutions = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
        assert all(p.dtype == torch.float32 for p in network.parameters())


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_resnet18_learns_cifar10_in_two_epochs_on_gpu(tmp_path: Path) -> None:
    data = ROOT / "data" / "cifar10"
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not data.is_dir():
        if not unpack.is_file():
            pytest.skip("needs data/cifar10 or ../shared/data")
        subprocess.run([sys.executable, unpack, tmp_path, "--only", "cifar10"], check=True)
        data = tmp_path / "cifar10"
        assert convert.main(["cifar10", "--source", str(tmp_path), "--out", str(data)]) == 0
    command = command_line(
        "--cfg", ROOT / "configs" / "cifar10_resnet18.yaml", "--data-path", data, "--output", tmp_path / "output",
        "--opts", "train.epochs=2", "data.batch_size=256", processes=1,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    lines = strict_lines(tmp_path / "output" / "cifar10_resnet18" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[-1]["val_top1"] > 0.35
