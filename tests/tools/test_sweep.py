"""Tests of tools/sweep.py: points depend on the command line only; runs finish once and end with the sweep."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import load_config, to_yaml
from configs.schema import settings_by_key
from configs.utils.errors import UserError
from helpers.sweep_commands import start_sweep
from helpers.sweeps import points_of
from helpers.training import CLEAN, DIGITS, ROOT, Run
from tools import sweep
from tools.runs import sweep_report, sweep_runner
from tools.runs.sweep_report import Sweep
from train.ddp import parse_arguments
from train.reporting.metrics_file import read_metrics

SWEEP = ROOT / "tools" / "sweep.py"
WANDB_SWEEP = ROOT / "configs" / "sweeps" / "cifar10_alexnet_lr.yaml"


def settings(data: Path, *more: str) -> list[str]:
    """Return settings of a short run with many steps, so that it can be stopped between two of them."""
    steps = ["train.epochs=1", "train.warmup_epochs=0", "data.batch_size=8", "train.save_every_steps=20"]
    return [f"data.path={data}", "eval.batch_size=64", *steps, *more]


def arguments(data: Path, out: Path, *axes: str) -> list[str]:
    return [sys.executable, str(SWEEP), "--cfg", str(DIGITS), *axes, "--out", str(out), "--opts", *settings(data)]


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=CLEAN, cwd=ROOT)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def processes_of(folder: Path) -> list[int]:
    """Return the processes whose command line contains the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue  # the process has ended
        if str(folder).encode() in text and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def wait_for_none(folder: Path) -> None:
    give_up_at = time.monotonic() + 60
    while left := processes_of(folder):
        assert time.monotonic() < give_up_at, left
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep over two learning rates; read only."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    result = call(arguments(digits_run.data, out, "train.lr=1e-3,6e-3"))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.mark.slow
def test_sweep_writes_tables_and_plots_and_prints_best_setting(finished: tuple[Path, str], digits_run: Run) -> None:
    out, printed = finished
    table = rows(out)
    assert [row["run"] for row in table] == ["lr=0.001", "lr=0.006"]
    assert {row["status"] for row in table} == {"finished"}
    best = max(table, key=lambda row: float(row["best_val_top1"]))
    content = json.loads((out / "sweep.json").read_text())
    assert content["best"]["run"] == best["run"]
    line = next(line for line in printed.splitlines() if line.startswith("best: "))
    shown, command = line.split("): ", 1)
    assert shown == f"best: {content['best']['settings'][0]} (val top1 {float(best['best_val_top1']):.4f}"
    assert command.startswith("zhu train ")  # the printed command repeats the best run
    pasted = parse_arguments(shlex.split(command)[2:])
    config = load_config(pasted.cfg, pasted.opts)
    recorded = settings_by_key(load_config(out / best["run"] / "config.yaml"))
    assert settings_by_key(config) | {"name": "", "output": ""} == recorded | {"name": "", "output": ""}
    assert {path.name for path in out.iterdir() if path.suffix in (".png", ".csv", ".json")} == {
        "sweep.png", "sweep_values.png", "sweep.csv", "sweep.json", "curves.csv",
    }  # fmt: skip


@pytest.mark.slow
def test_killed_sweep_leaves_no_process_and_resumes_missing_runs(
    finished: tuple[Path, str], digits_run: Run, tmp_path: Path
) -> None:
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        shutil.copytree(finished[0] / "lr=0.001", out / "lr=0.001")
        command = arguments(digits_run.data, out, "train.lr=1e-3,6e-3")
        run = out / "lr=0.006"
        killed = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN, cwd=ROOT
        )
        wait_until(lambda run=run: (run / "last.pt").exists(), killed)
        started = len(processes_of(out))
        killed.kill()
        killed.wait()
        wait_for_none(out)
        if read_metrics(run) == []:  # else it was killed too late; try again
            break
    assert (started >= 2, read_metrics(run)) == (True, [])

    again = call(command)
    assert again.returncode == 0, again.stderr
    assert "2 runs in" in again.stdout
    assert "1 of them finished before" in again.stdout
    assert not (out / "lr=0.001.log").exists()  # the finished run was not started
    assert "resumed from" in (out / "lr=0.006.log").read_text()
    timing = ("training_time_s", "images_per_s", "memory_gib")
    for row, unbroken in zip(rows(out), rows(finished[0]), strict=True):
        for key in unbroken:
            assert row[key] == unbroken[key] or (key in timing and row["run"] == "lr=0.006"), key


def test_interrupted_sweep_ends_runs_and_prints_resume_command(
    digits_run: Run, finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "lr=0.001", out / "lr=0.001")
    command = arguments(digits_run.data, out, "train.lr=1e-3,6e-3")
    process = start_sweep(command)
    wait_until(lambda: (out / "lr=0.006.log").exists(), process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"run the same command again: zhu sweep {shlex.join(command[2:])}" in printed
    assert "best: train.lr=1e-3" in printed
    assert [row["status"] for row in rows(out)] == ["finished", "not started"]
    assert processes_of(out) == []


@pytest.mark.slow
def test_failed_run_is_listed_and_retried(digits_run: Run, finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run = Path(shutil.copytree(finished[0] / "lr=0.006", out / "name=lenet"))
    config = load_config(DIGITS, settings(digits_run.data), output=str(out), name="name=lenet")
    (run / "config.yaml").write_text(to_yaml(config))
    result = call(arguments(digits_run.data, out, "model.name=lenet,nothing"))
    assert result.returncode == 1, result.stderr
    assert "1 of them finished before" in result.stdout
    assert "name=nothing: failed, exit code 2: error: model 'nothing' is unknown" in result.stdout
    good, bad = rows(out)
    assert (good["status"], good["error"]) == ("finished", "")
    assert bad["status"] == "failed at epoch 0 of 1"
    assert bad["error"].startswith("exit code 2: error: model 'nothing' is unknown")
    assert json.loads((out / "sweep.json").read_text())["best"]["run"] == "name=lenet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.epoch=1,2"], "train.epoch=1 is unknown"),
        (["train.lr=1e-3,1e-2", "--opts", "data.path=/nowhere"], "'/nowhere' does not exist"),
        (["--opts", "seed=1", "train.lr=1e-3,1e-2"], "give KEY=VALUE,VALUE (train.lr=1e-3,3e-3) before --opts"),
        (["train.lr=1e-3", "--parallel", "0"], "--parallel 0 is not"),
    ],
)
def test_bad_sweep_input_is_refused_before_writing(
    options: list[str], message: str, digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tmp_path / "digits.yaml"
    config.write_text(DIGITS.read_text().replace("data/digits", str(digits_run.data)))
    monkeypatch.setattr("sys.argv", ["sweep.py", "--cfg", str(config), "--out", str(tmp_path / "out"), *options])
    with pytest.raises(UserError) as caught:
        sweep.main()
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == [config]


def test_wandb_groups_runs_only_if_project_is_given(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen: list[tuple[str | None, str | None]] = []

    def note(found: Sweep, *_: Any) -> None:
        seen.extend((point.config.log.wandb.project, point.config.log.wandb.group) for point in found.points)

    monkeypatch.setattr(sweep, "run", note)
    command = ["sweep.py", "--cfg", str(DIGITS), "seed=1,2", "--opts", f"data.path={digits_run.data}"]
    command += [f"output={tmp_path}"]
    for more in ([], ["--project", "zhu"]):
        monkeypatch.setattr("sys.argv", [*command, *more])
        assert sweep.main() == 0
    assert seen == [(None, None)] * 2 + [("zhu", "digits_lenet-sweep")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["digits_lenet-sweep"]


def test_run_with_other_settings_is_refused_and_kept(
    digits_run: Run, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0] / "lr=0.001", tmp_path / "lr=0.001"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (point,) = points_of("train.lr=1e-3", fixed=settings(digits_run.data, "aug.flip=0.5"), output=str(tmp_path))
    with pytest.raises(UserError, match=r"contains a run with other settings \(aug.flip: 0 there, 0.5 here\)"):
        sweep_runner.is_finished(point)
    (point,) = points_of("train.lr=1e-3", fixed=settings(digits_run.data), output=str(tmp_path))
    assert sweep_runner.is_finished(point)
    (run / "last.pt").unlink()
    assert not sweep_runner.is_finished(point)
    (tmp_path / "lr=0.001-3").mkdir()
    (tmp_path / "lr=0.001-3" / "config.yaml").write_text("name: lr=0.001\n")
    with pytest.raises(UserError, match="would be taken for the latest run"):
        sweep_runner.is_finished(point)
    assert {path.name: path.read_bytes() for path in run.iterdir()} | {"last.pt": before["last.pt"]} == before


def test_multi_process_runs_end_with_their_parent(digits_run: Run, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tools.runs.sweep_points import build_points
from tools.runs.engine.local_runs import LocalRuns
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_runner import lock_folder, run_points
fixed = {settings(digits_run.data, "train.epochs=50")}
found = build_points(Path({str(DIGITS)!r}), ["seed=1"], [], fixed=fixed, draws=None, seed=0, output={str(tmp_path)!r})
with lock_folder(Path({str(tmp_path)!r})) as lock:
    print(list(run_points(found, [RunSlot(processes=2)], LocalRuns(lock))))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=CLEAN, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    wait_until(lambda: len(processes_of(tmp_path)) >= 4, process)  # the script, torchrun and its two processes
    process.kill()
    process.communicate()
    wait_for_none(tmp_path)
    assert len(read_metrics(tmp_path / "seed=1")) < 50  # the run was terminated before it finished


def test_runs_of_another_sweep_are_reported_and_old_plots_removed(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    assert sweep_report.runs_of_another_sweep(Sweep(out, points_of("train.lr=1e-3,6e-3,1e-2"), 1, [], [])) == []
    other = Sweep(out, points_of("train.lr=6e-3", "aug.flip=0", output=str(out)), 1, [], [])
    assert sweep_report.runs_of_another_sweep(other) == ["lr=0.001", "lr=0.006"]
    sweep_report.write_report(other)
    assert list(out.glob("*.png")) == []
    assert (out / "lr=0.001" / "best.pt").is_file()


def wandb_command(values: dict[str, Any]) -> list[str]:
    """Return the command that W&B's agent creates for one point of the sweep file, using W&B's functions."""
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    content = sweeps.load_sweep_config(str(WANDB_SWEEP))
    parts = sweeps.create_sweep_command(content["command"])
    replacements = sweeps.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    replacements |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [content["program"]]}
    return [
        item
        for part in parts
        for item in (replacements[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part])
    ]


def drawn(parameters: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the points at both ends of every parameter."""
    for end in (0, -1):
        yield {key: (one.get("values") or [one["min"], one["max"]])[end] for key, one in parameters.items()}


def test_wandb_sweep_gives_valid_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(WANDB_SWEEP.read_text())  # as W&B reads it
    for values in drawn(content["parameters"]):
        command = wandb_command(values)
        assert command[:3] == ["/usr/bin/env", "python", "train/ddp.py"]
        parsed = parse_arguments(command[3:])
        config = load_config(parsed.cfg, parsed.opts, output=parsed.output)
        settings = settings_by_key(config)
        assert {key: settings[key] for key in values} == values
        assert config.log.wandb.project == content["project"]
        assert parsed.resume is None  # it would resume another agent's run


def test_wandb_sweep_file_is_well_formed() -> None:
    content = yaml.safe_load(WANDB_SWEEP.read_text())
    assert set(content) <= {"project", "name", "program", "command", "method", "run_cap", "metric", "parameters"}
    assert content["metric"] == {"name": "val_top1", "goal": "maximize"}
    assert content["method"] in ("grid", "random", "bayes")
    for parameter in content["parameters"].values():
        if "values" in parameter:
            assert set(parameter) == {"values"}
            continue
        assert set(parameter) == {"distribution", "min", "max"}
        assert type(parameter["min"]) is type(parameter["max"]) is float  # 1e-4 without a dot would be text
        assert 0 < parameter["min"] < parameter["max"]
