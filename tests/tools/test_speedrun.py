"""Speedruns on the command line with small models: train/ddp.py with their configs, and tools/speedrun.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from helpers.training import CLEAN, ROOT, run_script, strict_lines

SMALL = [
    "model.name=speedrun96_proxy",
    "data.train_split=val",
    "data.batch_size=32",
    "train.epochs=2",
    "train.warmup_epochs=0.5",
    "train.eval_every_epochs=2",
    "train.save_every_epochs=2",
    "train.whiten_bias_epochs=1",
]


def config(percent: int) -> Path:
    return ROOT / "configs" / f"cifar10_speedrun_{percent}.yaml"


def seconds(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("percent", [94, 95, 96])
def test_speedrun_reports_training_and_command_time(percent: int, npy_data: Path, tmp_path: Path) -> None:
    arguments = ("--cfg", config(percent), "--data-path", npy_data, "--output", tmp_path, "--opts", *SMALL)
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    run = tmp_path / f"cifar10_speedrun_{percent}"
    log = (run / "log.txt").read_text()
    counted = seconds(r"epochs and last evaluation ([\d.]+) s", log)
    command = seconds(r"whole command ([\d.]+) s", log)
    lines = strict_lines(run / "metrics.jsonl")
    assert sum(line["epoch_time_s"] for line in lines) < counted < command
    assert [line["val_top1"] is None for line in lines] == [True, False]
    resolved = load_config(run / "config.yaml").train
    assert resolved.optimizer == load_config(config(percent)).train.optimizer


def test_proxy_on_two_processes_is_a_user_error(npy_data: Path, tmp_path: Path) -> None:
    result = run_script("--cfg", config(96), "--data-path", npy_data, "--output", tmp_path, processes=2)
    assert result.returncode != 0
    assert "error: train.proxy.model=speedrun96_proxy selects" in result.stderr
    assert "world_size=2; use 1 or set train.proxy.model to null" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tool_runs_several_seeds_and_writes_means(npy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "tools/speedrun.py", "--cfg", config(95), "--data-path", npy_data, "--runs", 2]
    command += ["--json", out, "--opts", *SMALL]
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT, env=CLEAN
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert [one["seed"] for one in figures["runs"]] == [0, 1]
    assert figures["top1_mean"] == pytest.approx(sum(one["top1"] for one in figures["runs"]) / 2)
    assert figures["time_s_mean"] == pytest.approx(sum(one["time_s"] for one in figures["runs"]) / 2)
    assert figures["runs"][0]["time_s"] < figures["first_result_s"] < figures["command_s"]
    assert "± " in result.stdout


def test_configs_contain_the_published_settings_for_a_mean_loss() -> None:
    muon, sgd, hard = (load_config(config(percent)).train for percent in (94, 95, 96))
    assert muon.optimizer.bias_lr == muon.optimizer.norm_bias_lr == pytest.approx(0.053 * 2000)
    assert muon.optimizer.linear_lr == pytest.approx(0.67 * 2000)
    assert muon.lr * muon.optimizer.weight_decay == pytest.approx(2e-6 * 2000)
    # per 1024 samples, and per step size of Nesterov momentum for a constant gradient
    for train, lr, decay, kept in ((sgd, 10.0, 0.0153, 1024), (hard, 9.0, 0.012, 512)):
        steps = 1024 * (1 + 1 / (1 - train.optimizer.momentum))
        assert train.lr == pytest.approx(lr / steps * kept)
        assert train.optimizer.norm_bias_lr == pytest.approx(64 * train.lr)
        assert train.lr * train.optimizer.weight_decay == pytest.approx(decay * 1024 / steps)
        assert train.warmup_lr == pytest.approx(0.2 * train.lr)
        assert train.lookahead.decay == pytest.approx(0.95**5)
    assert sgd.min_lr == pytest.approx(0.07 * sgd.lr)
    assert sgd.warmup_epochs == pytest.approx(0.23 * 15)
    assert hard.warmup_epochs == pytest.approx(0.1 * 45)
