"""One short run of each kind on a GPU: no exception, and all files are written. Values are not compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import AugConfig, DataConfig
from configs.utils.errors import run_main
from helpers.driver import IS_STAND_IN
from helpers.training import ROOT, broken_after, strict_lines
from pipelines import build_train_loader
from pipelines.interfaces import Position
from tools import convert, export, find_lr, predict, show, speedrun, summary
from tools.perf import speedrun_command
from train import ddp

pytestmark = pytest.mark.gpu

CONFIGS = ROOT / "configs"
RESNET = ("model.name=resnet18", "model.options={width: 16}")
PLAIN = ("train.compile=off",)
KINDS: dict[str, tuple[str, ...]] = {
    "captured": ("train.cuda_graph=on", *PLAIN),
    "eager": ("train.cuda_graph=off", *PLAIN),
    "fp16": ("train.amp=fp16", *PLAIN),
    "float32": ("train.amp=off", *PLAIN),
    "host placement": ("data.placement=host", *PLAIN),
    "device placement": ("data.placement=device", *PLAIN),
    "device placement, no augmentation": ("data.placement=device", "aug.crop=none", *PLAIN),
    "device placement, DALI": ("data.placement=device", "aug.crop=random-resized", "aug.flip=0.5", *PLAIN),
    "host placement, no augmentation": ("data.placement=host", "aug.crop=none", *PLAIN),
    "RandAugment": ("aug.auto.policy=randaugment", "aug.erase.probability=0.5", *PLAIN),
    "mixing": ("aug.mix.mixup=0.2", "aug.mix.cutmix=1.0", *PLAIN),
    "stages": (
        "data.stages=[{epoch: 0, image_size: 32, batch_size: 32}, {epoch: 1, image_size: 40}]",
        *("eval.image_size=40", *RESNET, *PLAIN),
    ),
    "accumulation": ("train.accumulation_steps=2", "train.clip_grad_norm=1.0", *PLAIN),
    "averages": ("train.ema.decay=0.9", "train.lookahead.every_steps=2", "eval.weights=ema", *PLAIN),
    "skips non-finite steps": ("train.on_nonfinite=skip", *PLAIN),
    "muon": ("train.optimizer.name=muon", *RESNET, *PLAIN),
    "weighted classes, ended within an epoch": (
        *("data.limit=640", "train.class_weights=balanced", "train.max_steps=15", "eval.best_by=loss"),
        *("data.placement=device", *PLAIN),
    ),
    "plateau": ("train.schedule=plateau", *PLAIN),
    "test-time augmentation": ("eval.tta=flip-translate", "eval.crop_fraction=0.875", *PLAIN),
    "tracked": ("log.tensorboard=true", *PLAIN),
    "timm": ("model.name=timm/test_resnet", *PLAIN),
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "npy"
    assert convert.main(["digits", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def jpeg_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "jpeg"
    assert convert.main(["digits", "--out", str(folder), "--encoding", "jpeg"]) == 0
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the main function of a command in this process, and return its output."""

    def call(main: Callable[[], Any], *command: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, command)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(main)
        out, err = capfd.readouterr()
        assert not stopped.value.code, err
        assert "Traceback" not in err, err
        return out

    return call


def arguments(data: Path, output: Path, *options: str, config: str = "digits_lenet") -> list[object]:
    settings = ("train.epochs=2", "train.warmup_epochs=0", *options)
    return ["--cfg", CONFIGS / f"{config}.yaml", "--data-path", data, "--output", output, "--opts", *settings]


# A kernel counts the entries of a confusion matrix, one per sample with a label.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.gpu_values) if kind == "tracked" else kind for kind in KINDS]
)
def test_short_run_of_each_kind_writes_its_files(kind: str, digits: Path, tmp_path: Path, run: Any) -> None:
    out = run(ddp.main, *arguments(digits, tmp_path, *KINDS[kind]))
    folder = tmp_path / "digits_lenet"
    assert {"last.pt", "best.pt", "curves.png", "config.yaml"} <= {path.name for path in folder.iterdir()}
    assert [line["epoch"] for line in strict_lines(folder / "metrics.jsonl")] == [0, 1]
    assert ", done in " in out


@pytest.mark.parametrize(
    "decoder",
    [
        ("data.hw_decoder_load=0",),
        ("data.hw_decoder_load=0.65", "data.decoder_memory={preallocate_width_hint: 32, preallocate_height_hint: 32}"),
        ("data.decoder_memory={device_memory_padding: 1024, host_memory_padding: 0}",),
    ],
)
def test_short_run_decodes_jpeg(decoder: tuple[str, ...], jpeg_digits: Path, tmp_path: Path, run: Any) -> None:
    run(ddp.main, *arguments(jpeg_digits, tmp_path, *decoder, "aug.crop=random-resized", *PLAIN))


def test_extended_run_and_dev_run_capture_again(digits: Path, tmp_path: Path, run: Any) -> None:
    run(ddp.main, *arguments(digits, tmp_path, *PLAIN))
    out = run(ddp.main, *arguments(digits, tmp_path, *PLAIN, "train.epochs=3"), "--resume", "auto", "--extend")
    assert "extended from 2 to 3 epochs: the cosine schedule " in out
    lines = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    out = run(ddp.main, *arguments(digits, tmp_path, *PLAIN), "--fast-dev-run")
    assert "all worked, and nothing was kept" in out
    assert [path.name for path in tmp_path.iterdir()] == ["digits_lenet"]


def test_run_resumes_and_checkpoint_is_usable(
    digits: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(digits, tmp_path, *PLAIN)
    folder, middle = tmp_path / "digits_lenet", {"epoch": 1, "step": 0}
    monkeypatch.setattr(sys, "argv", ["train/ddp.py", *map(str, command)])
    with broken_after(lambda _, position: position == middle):
        ddp.main()
    assert f"resumed from {folder / 'last.pt'} at the start of epoch 2" in run(ddp.main, *command, "--resume", "auto")
    assert "over 360 samples" in run(ddp.main, *command, "--resume", folder / "best.pt", "--eval")
    if not IS_STAND_IN:  # on which steps take no time
        run(ddp.main, *command, "--throughput")
    run(predict.main, "--checkpoint", folder, "--split", "val", "--tta", "flip", "--out", tmp_path / "predictions")
    assert (tmp_path / "predictions" / "predictions.npz").is_file()
    run(show.main, "--checkpoint", folder, "--out", tmp_path / "shown")
    run(show.main, "--cfg", CONFIGS / "digits_lenet.yaml", "--data-path", digits, "--out", tmp_path / "samples")
    run(export.main, "--checkpoint", folder, "--out", tmp_path / "export")
    assert (tmp_path / "export" / "model.onnx").is_file()


def test_summary_and_range_test(digits: Path, tmp_path: Path, run: Any) -> None:
    run(summary.main, "lenet", "alexnet", "resnet18", "--batch-size", 16, "--out", tmp_path / "summary")
    assert (tmp_path / "summary" / "summary.png").is_file()
    command = ("--cfg", CONFIGS / "digits_lenet.yaml", "--data-path", digits, "--out", tmp_path / "lr")
    run(find_lr.main, *command, "--steps", 20, "--opts", *PLAIN)
    assert (tmp_path / "lr" / "find_lr.png").is_file()


@pytest.mark.parametrize("percent", [94, 95, 96])
def test_short_speedrun(percent: int, digits: Path, tmp_path: Path, run: Any) -> None:
    config = CONFIGS / f"cifar10_speedrun_{percent}.yaml"
    options = ("train.epochs=2", "data.batch_size=256", "train.warmup_epochs=0", "train.whiten_bias_epochs=1", *PLAIN)
    result = tmp_path / "result.json"
    run(speedrun.main, "--cfg", config, "--data-path", digits, "--runs", 2, "--json", result, "--opts", *options)
    assert result.is_file()
    run(ddp.main, *arguments(digits, tmp_path, *options, config=f"cifar10_speedrun_{percent}"))


def test_speedrun_timer_starts_after_first_eigendecomposition(
    digits: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed: list[bool] = []
    before_clock: list[int] = []
    eigh, whiten = torch.linalg.eigh, speedrun_command.whiten

    def counted_eigh(matrix: torch.Tensor) -> Any:
        decomposed.append(matrix.is_cuda)
        return eigh(matrix)

    def noted_whiten(training: Any, images: Any) -> float:
        before_clock.append(len(decomposed))
        return whiten(training, images)

    monkeypatch.setattr(torch.linalg, "eigh", counted_eigh)
    monkeypatch.setattr(speedrun_command, "whiten", noted_whiten)
    command = ("--cfg", CONFIGS / "cifar10_speedrun_94.yaml", "--data-path", digits, "--runs", 1)
    run(
        speedrun.main, *command, "--opts", "train.epochs=1", "data.batch_size=256", "train.whiten_bias_epochs=1", *PLAIN
    )
    assert before_clock == [1]
    assert decomposed == [True, True]


def script(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )


def test_torchrun_trains_captured_step_without_warnings(digits: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "tests/helpers/driver.py")
    compiled = ("train.cuda_graph=on", "train.compile=default")
    done = script(sys.executable, *launcher, "train/ddp.py", *arguments(digits, tmp_path, *compiled))
    assert done.returncode == 0, done.stderr
    assert "compiled and captured the step" in done.stdout
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("stage", ["loader", "train", "ramp"])
def test_short_benchmark(stage: str, digits: Path, tmp_path: Path) -> None:
    command: list[object] = [sys.executable, "tools/benchmark.py", stage, "--cfg", "configs/digits_lenet.yaml"]
    command += ["--data-path", digits, "--seconds", 0.01, "--rounds", 1, "--opts", *PLAIN]
    command += ["--max-batch", 64, "--out", tmp_path] if stage == "ramp" else ["--json", tmp_path / "result.json"]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


# Per training step, except for events and queries: what the step launches, then what the loader launches for the batch.
GRAPH, LAUNCH = "graph launch", "launch"
MOVED, SENT = "copy from device to device memory", "copy from pinned to device memory"
MAX_CALLS = 17  # with events and queries
STEP_CALLS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "captured, device": ({GRAPH: 1, LAUNCH: 1, MOVED: 2}, {SENT: 1}),
    "captured, host": ({GRAPH: 1, LAUNCH: 1, MOVED: 2}, {SENT: 2, LAUNCH: 1}),
    "captured, device, DALI": ({GRAPH: 1, LAUNCH: 1, MOVED: 2}, {SENT: 1}),
    "captured, host, DALI": ({GRAPH: 1, LAUNCH: 1, MOVED: 2}, {SENT: 1}),
    "captured, device, dropout": ({GRAPH: 1, LAUNCH: 3, MOVED: 2}, {SENT: 1}),  # seed and offset of the generator
    "captured, device, mixing": ({GRAPH: 1, LAUNCH: 1, MOVED: 3}, {SENT: 2}),
    "captured, device, average": ({GRAPH: 1, LAUNCH: 2, MOVED: 2}, {SENT: 1}),
    "captured, device, DDP": ({GRAPH: 1, LAUNCH: 1, MOVED: 2}, {SENT: 1}),
}


@pytest.mark.skipif(not IS_STAND_IN, reason="counts the calls in the log of the stand-in driver")
def test_steps_call_the_driver_as_rarely_as_documented_and_never_wait(digits: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FAKECUDA_LEVEL": "2", "FAKECUDA_LOG": str(tmp_path / "log")}
    command = [
        sys.executable,
        "tests/helpers/driver_calls.py",
        digits,
        *STEP_CALLS,
        "eager, device",
        "eager, device, DDP",
    ]
    result = tmp_path / "calls.json"
    subprocess.run([*map(str, command), "--json", result], check=True, cwd=ROOT, env=environment)
    counts = json.loads(result.read_text())
    for kind, parts in counts.items():
        for part, callers in parts.items():
            for caller, calls in callers.items():
                made = {name for name, count in calls.items() if count}
                assert not any("pageable" in name for name in made), (kind, part, caller, calls)
                waits = any("(waits)" in name for name in made)
                assert not waits or caller == "gathering threads", (kind, part, caller, calls)
    for kind, (step, batch) in STEP_CALLS.items():
        calls = counts[kind]["training"]
        assert {name: calls["step"].get(name, 0) for name in (GRAPH, LAUNCH, MOVED, SENT)} == {SENT: 0, **step}, kind
        expected = {GRAPH: 0, LAUNCH: 0, MOVED: 0, SENT: 0, **batch}
        assert {name: calls["next batch"].get(name, 0) for name in expected} == expected, kind
        assert sum(calls["step"].values()) + sum(calls["next batch"].values()) <= MAX_CALLS, kind


@pytest.mark.parametrize("aug", [{"crop": "none"}, {"crop": "pad"}, {"crop": "random-resized", "flip": 0.5}], ids=str)
@pytest.mark.parametrize("placement", ["host", "device"])
def test_buffers_are_reused_only_after_their_copies(placement: Any, aug: Any, digits: Path) -> None:
    """Leave and resume loops without waiting for the GPU, while the stand-in driver monitors pinned memory.

    On a real GPU, the comparisons of batches in test_dali_graph.py detect early overwrites.
    """
    data = DataConfig(path=str(digits), batch_size=32, placement=placement, prefetch=1, threads=1)
    loader = build_train_loader(data, AugConfig(**aug), device="cuda")
    for stop in (1, 3, 8, len(loader)):
        for number, batch in enumerate(loader, 1):
            assert batch.images.is_cuda
            if number == stop:
                break
    assert loader.position == Position(1)
