"""Tests of tools/sweep.py: points depend on the command line only; runs finish once and end with the sweep."""

from __future__ import annotations

import csv
import itertools
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
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from helpers.training import CLEAN, DIGITS, ROOT, Run, restore_signal_handlers
from tools import sweep
from tools.runs import sweep_report, sweep_runner
from tools.runs.records import settings_by_key
from tools.runs.run_slots import RunSlot, make_slots
from tools.runs.sweep_axes import split_outside_brackets
from tools.runs.sweep_plots import plot_values
from tools.runs.sweep_points import Point, build_points
from tools.runs.sweep_report import Sweep, edge_hints
from tools.runs.sweep_runner import RunOutcome, run_points
from train.ddp import parse_arguments
from train.reporting import figures
from train.reporting.metrics_file import read_metrics

SWEEP = ROOT / "tools" / "sweep.py"
WANDB_SWEEP = ROOT / "configs" / "sweeps" / "cifar10_alexnet_lr.yaml"


def of(*axes: str, variants: tuple[str, ...] = (), **changes: Any) -> list[Point]:
    return build_points(DIGITS, axes, variants, **{"fixed": (), "draws": None, "seed": 0, **changes})


def names(*axes: str, **changes: Any) -> list[str]:
    return [point.name for point in of(*axes, **changes)]


def error_of(*axes: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        of(*axes, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Points


def test_grid_is_product_of_lists_with_order_independent_names() -> None:
    grid = of("train.lr=1e-3,0.01", "data.batch_size=64,128")
    assert [point.name for point in grid] == [
        "batch_size=64,lr=0.001", "batch_size=128,lr=0.001", "batch_size=64,lr=0.01", "batch_size=128,lr=0.01",
    ]  # fmt: skip
    assert [(p.config.train.lr, p.config.data.batch_size) for p in grid] == [
        (1e-3, 64), (1e-3, 128), (1e-2, 64), (1e-2, 128),
    ]  # fmt: skip
    assert grid[0].settings == ("train.lr=1e-3", "data.batch_size=64")
    assert all(point.config.name == point.name for point in grid)
    turned = names("data.batch_size=64,128", "train.lr=1e-3,0.01")
    assert set(turned) == {point.name for point in grid}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("train.optimizer.betas=[0.9,0.999],[0.9, 0.99]", ["betas=[0.9,0.999]", "betas=[0.9,0.99]"]),
        ("train.optimizer.betas=(0.9,0.999),(0.8,0.9)", ["betas=[0.9,0.999]", "betas=[0.8,0.9]"]),
        ("aug.crop=none,pad", ["crop=none", "crop=pad"]),
        ("data.image_size=null,64", ["image_size=null", "image_size=64"]),
        ("model.name=lenet,timm/resnet18", ["name=lenet", "name=timm_resnet18"]),
        ("train.clip_grad_norm=None,1", ["clip_grad_norm=null", "clip_grad_norm=1"]),
        ("train.optimizer.nesterov=true,false", ["nesterov=true", "nesterov=false"]),
        ("train.lr=0.1234567,0.1234568", ["lr=0.1234567", "lr=0.1234568"]),
        ("seed=0, 1", ["seed=0", "seed=1"]),
    ],
)
def test_values_split_outside_brackets_and_named_by_parsed_value(axis: str, expected: list[str]) -> None:
    assert names(axis) == expected


@given(st.lists(st.sampled_from(["1e-3", "[0.9,0.99]", "(1, 2)", "{a: [1,2], b: 3}", '"x,y"', "", "none"]), min_size=1))
def test_splitting_inverts_joining(parts: list[str]) -> None:
    assert split_outside_brackets(",".join(parts), ",") == parts


def test_point_names_are_unique_and_limited_in_length() -> None:
    assert names("train.optimizer.name=adamw", "model.name=lenet") == ["model.name=lenet,optimizer.name=adamw"]
    long = names(*(f"train.optimizer.{key}_lr=0.111111,0.222222" for key in ("norm_bias", "bias", "linear")),
                 "train.optimizer.newton_schulz_steps=1,2", "train.optimizer.weight_decay=0.01")  # fmt: skip
    assert len(set(long)) == 16
    assert max(map(len, long)) <= 80


def test_variants_set_settings_together_and_multiply_with_lists() -> None:
    variants = ("plain: aug.crop=none aug.flip=0", "crop+flip: aug.crop=pad aug.flip=0.5", "as is:")
    result = of("seed=1,2", variants=variants)
    assert [point.name for point in result] == [
        "plain,seed=1", "crop+flip,seed=1", "as_is,seed=1", "plain,seed=2", "crop+flip,seed=2", "as_is,seed=2",
    ]  # fmt: skip
    assert (result[1].config.aug.crop, result[1].config.aug.flip) == ("pad", 0.5)
    assert result[1].settings == ("seed=1", "aug.crop=pad", "aug.flip=0.5")
    spaced = of(variants=("small: aug.scale=[0.5, 1.0] aug.crop=random-resized",))
    assert spaced[0].config.aug.scale == (0.5, 1.0)


@hypothesis_settings(max_examples=20)
@given(draws=st.integers(1, 12), seed=st.integers(0, 5))
def test_random_sweep_is_reproducible_and_extendable(draws: int, seed: int) -> None:
    axes = ("train.lr=1,2,3,4", "seed=1,2,3")
    drawn = names(*axes, draws=draws, seed=seed)
    assert len(set(drawn)) == draws
    assert set(drawn) <= set(names(*axes))
    assert drawn == names(*axes, draws=draws, seed=seed)
    assert drawn == names(*axes, draws=12, seed=seed)[:draws]  # a longer sweep starts with the same points


def test_random_points_match_earlier_versions() -> None:
    assert names("train.lr=loguniform(1e-4,1e-1)", "aug.flip=uniform(0,0.5)", draws=2, seed=3) == [
        "flip=0.2721,lr=0.0005175", "flip=0.302,lr=0.001288",
    ]  # fmt: skip


@given(seed=st.integers(0, 1000))
def test_ranges_respect_their_bounds(seed: int) -> None:
    (point,) = of("train.lr=loguniform(1e-4,1e-1)", "aug.flip=uniform(0.25,0.5)", draws=1, seed=seed)
    assert 1e-4 <= point.config.train.lr <= 1e-1
    assert 0.25 <= point.config.aug.flip <= 0.5


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        (
            ["train.epoch=1,2"],
            {},
            "the point train.epoch=1: train.epoch=1 is unknown; did you mean train.epochs or train.first_epoch?",
        ),
        (["train.lr=1e-3,fast"], {}, 'the point train.lr=fast: train.lr="fast" must be a valid number'),
        (["train.lr"], {}, "'train.lr' is not KEY=VALUE,VALUE"),
        (["train.lr=1,,2"], {}, "'train.lr=1,,2' has an empty value"),
        (["train.lr=[1,2"], {}, "unbalanced brackets or quotes"),
        (["train.lr=1,2", "train.lr=3"], {}, "train.lr and train.lr are varied separately; give a setting once"),
        (["train.optimizer={name: sgd}", "train.optimizer.name=adamw"], {}, "are varied separately"),
        (["train.lr=1,2"], {"variants": ["a: train.lr=3"]}, "train.lr and train.lr are varied separately"),
        (["train.lr=1,2"], {"fixed": ["train.lr", "3"]}, "train.lr is varied, but --opts sets train.lr"),
        (["train.lr=1e-3,0.001"], {}, "'train.lr=1e-3' and 'train.lr=0.001' are the same run"),
        (["data.threads=1,2"], {}, "are the same run"),  # does not affect results
        (["name=a,b"], {}, "name cannot be varied"),
        (["train.lr=uniform(0,1)"], {}, "train.lr is a range and has no grid; add --random N"),
        (["train.lr=uniform(1,0)"], {"draws": 1}, "the smaller one first"),
        (["train.lr=loguniform(0,1)"], {"draws": 1}, "two finite numbers above 0"),
        (["train.lr=uniform(1)"], {"draws": 1}, "uniform needs two finite numbers"),
        (["train.lr=uniform(1,2),3"], {"draws": 1}, "mixes a range with other values"),
        (["train.lr=1,2"], {"draws": 3}, "--random 3 exceeds the 2 points of the grid; use at most 2"),
        (["train.lr=1,2"], {"draws": 0}, "--random 0 is not a positive whole number"),
        ([], {"variants": ["aug.flip=0"]}, "is not 'NAME: KEY=VALUE …'"),
        ([], {"variants": ["a: aug.flip"]}, "'aug.flip' is not KEY=VALUE"),
        ([], {"variants": ["a: aug.flip=0 aug.flip=1"]}, "sets aug.flip twice"),
        ([], {"variants": ["a: aug.flip=0", "a: aug.flip=1"]}, "--variant 'a' is given twice"),
        ([], {"variants": ["a: aug.flip=0", "a-2: aug.flip=1"]}, "'a-2' would be taken for a second run of 'a'"),
    ],
)
def test_invalid_sweep_is_a_one_line_error(axes: list[str], changes: dict[str, Any], message: str) -> None:
    assert message in error_of(*axes, **{"variants": (), **changes})


# Processes, with short scripts in place of train/ddp.py


Fake = Callable[[str], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace every run by a script, which gets the point's name as sys.argv[1]."""

    def use(script: str) -> None:
        monkeypatch.setattr(sweep_runner, "command_line", lambda point, _: [sys.executable, "-c", script, point.name])

    return use


def run_fakes(folder: Path, slots: list[RunSlot], *axes: str) -> dict[str, RunOutcome]:
    outcomes: list[RunOutcome] = []
    with sweep_runner.lock_folder(folder) as lock:
        run_points(of(*axes, output=str(folder)), slots, lock, outcomes.append)
    return {outcome.point.name: outcome for outcome in outcomes}


def test_failed_run_reports_its_error_and_others_continue(tmp_path: Path, fake: Fake) -> None:
    fake("import sys; print('begin'); assert sys.argv[1] != 'seed=1', 'too large\\nfor this GPU'; print('end')")
    (tmp_path / "seed=1.log").write_text("error: of an earlier attempt\n")
    outcomes = run_fakes(tmp_path, [RunSlot()], "seed=0,1,2")
    assert {name: outcome.error for name, outcome in outcomes.items()} == {
        "seed=0": None, "seed=1": "exit code 1: AssertionError: too large", "seed=2": None,
    }  # fmt: skip
    assert (tmp_path / "seed=2.log").read_text() == "begin\nend\n"
    assert (tmp_path / "seed=1.log").read_text().startswith("error: of an earlier attempt\n")
    fake("import os; os.kill(os.getpid(), 9)")
    assert run_fakes(tmp_path, [RunSlot()], "seed=0")["seed=0"].error == "killed by SIGKILL: it printed nothing"


def test_gpu_groups_run_one_point_at_a_time(tmp_path: Path, fake: Fake) -> None:
    fake("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], time.time()); "
         "time.sleep(0.2); print(time.time())")  # fmt: skip
    slots = [RunSlot(("0", "1"), 1, threads=3), RunSlot(("GPU-a",), 1, threads=3)]
    run_fakes(tmp_path, slots, "seed=0,1,2,3,4,5")
    used: dict[str, list[tuple[float, float]]] = {}
    for number in range(6):
        gpus, threads, begin, end = (tmp_path / f"seed={number}.log").read_text().split()
        assert threads == "3"
        used.setdefault(gpus, []).append((float(begin), float(end)))
        assert load_config(tmp_path / f"seed={number}.yaml").data.threads == 3
    assert set(used) == {"0,1", "GPU-a"}
    for times in used.values():
        times.sort()
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))


def test_gpus_and_threads_are_divided_into_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert make_slots(["0", "1", "2", "3", "4"], 2, None) == [RunSlot(("0", "1"), 2, 2), RunSlot(("2", "3"), 2, 2)]
    assert make_slots(["0"], 1, 2) == [RunSlot(("0",), 1, 4), RunSlot(("0",), 1, 4)]
    assert make_slots([], 1, None) == [RunSlot()]
    assert make_slots([], 1, 3) == [RunSlot((), 1, 2)] * 3
    with pytest.raises(UserError, match="--gpus-per-run 2 exceeds the 1 visible GPUs"):
        make_slots(["0"], 2, None)
    with pytest.raises(UserError, match="--parallel 0 is not"):
        make_slots([], 1, 0)


def test_second_sweep_in_a_locked_folder_is_refused(tmp_path: Path) -> None:
    with (
        sweep_runner.lock_folder(tmp_path),
        pytest.raises(UserError, match="another sweep is running in"),
        sweep_runner.lock_folder(tmp_path, wait_s=0.1),
    ):
        pass


# Whole sweeps


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
    start = command.index("--cfg")  # the printed command repeats the best run
    pasted = parse_arguments(shlex.split(command[start:]))
    config = load_config(pasted.cfg, pasted.opts)
    recorded = settings_by_key(load_config(out / best["run"] / "config.yaml"))
    assert settings_by_key(config) | {"name": "", "output": ""} == recorded | {"name": "", "output": ""}
    assert {path.name for path in out.iterdir() if path.suffix in (".png", ".csv", ".json")} == {
        "sweep.png", "sweep_values.png", "sweep.csv", "sweep.json", "curves.csv",
    }  # fmt: skip


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
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
        cwd=ROOT,
        preexec_fn=restore_signal_handlers,
    )
    wait_until(lambda: (out / "lr=0.006.log").exists(), process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"run the same command again: python {shlex.join(command[1:])}" in printed
    assert "best: train.lr=1e-3" in printed
    assert [row["status"] for row in rows(out)] == ["finished", "not started"]
    assert processes_of(out) == []


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
        (["--opts", "seed=1", "train.lr=1e-3,1e-2"], "give KEY=VALUE,VALUE such as train.lr=1e-3,3e-3 before --opts"),
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
    (point,) = of("train.lr=1e-3", fixed=settings(digits_run.data, "aug.flip=0.5"), output=str(tmp_path))
    with pytest.raises(UserError, match=r"contains a run with other settings \(aug.flip: 0 there, 0.5 here\)"):
        sweep_runner.is_finished(point)
    (point,) = of("train.lr=1e-3", fixed=settings(digits_run.data), output=str(tmp_path))
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
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_runner import lock_folder, run_points
fixed = {settings(digits_run.data, "train.epochs=50")}
found = build_points(Path({str(DIGITS)!r}), ["seed=1"], [], fixed=fixed, draws=None, seed=0, output={str(tmp_path)!r})
with lock_folder(Path({str(tmp_path)!r})) as lock:
    run_points(found, [RunSlot(processes=2)], lock, print)
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
    assert sweep_report.runs_of_another_sweep(Sweep(out, of("train.lr=1e-3,6e-3,1e-2"), 1, [], [])) == []
    other = Sweep(out, of("train.lr=6e-3", "aug.flip=0", output=str(out)), 1, [], [])
    assert sweep_report.runs_of_another_sweep(other) == ["lr=0.001", "lr=0.006"]
    sweep_report.write_report(other)
    assert list(out.glob("*.png")) == []
    assert (out / "lr=0.001" / "best.pt").is_file()


# Plots and W&B


def figure_of(*axes: str, variants: tuple[str, ...] = ()) -> Any:
    found = of(*axes, variants=variants)
    table = [{"best_val_top1": 0.1 * n, "training_time_s": 10.0 + n} for n in range(len(found))]
    return plot_values(found, table, "test")


def test_plot_kind_depends_on_number_of_numeric_settings() -> None:
    axis, times = figure_of("train.lr=1e-2,1e-4,1e-3").axes
    assert list(axis.lines[0].get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.0])
    assert list(times.lines[0].get_ydata()) == [11.0, 12.0, 10.0]
    assert (axis.get_xscale(), axis.get_xlabel()) == ("log", "train.lr")
    assert figure_of("aug.flip=0,0.25,0.5").axes[0].get_xscale() == "linear"
    both = figure_of("train.lr=1e-3,1e-2", "aug.crop=none,pad")
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["aug.crop=none", "aug.crop=pad"]
    shown = figure_of("train.lr=1e-3,1e-2", "seed=1,2,3").axes[0].get_images()[0].get_array()
    assert shown.ravel().tolist() == pytest.approx([0.0, 0.3, 0.1, 0.4, 0.2, 0.5])  # one row per seed
    assert figure_of("aug.crop=none,pad") is None


VARIANTS = (
    "plain: aug.crop=none aug.flip=0",
    "TrivialAugment, erasing: aug.auto=trivialaugment aug.erase.probability=0.5",
    "_$x$: aug.flip=0.5",
)
NAMES = ["plain", "TrivialAugment, erasing", "_$x$"]


def test_each_variant_has_a_bar_with_its_given_name() -> None:
    figure = figure_of(variants=VARIANTS)
    for axis, expected in zip(figure.axes, ([0, 0.1, 0.2], [10, 11, 12]), strict=True):
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(expected)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == NAMES
    assert [point.name for point in of(variants=VARIANTS)] == ["plain", "TrivialAugment,_erasing", "__x_"]
    figures.render(figure)


def test_variants_share_bars_over_seeds_and_draw_lines_over_numbers() -> None:
    figure = figure_of("seed=1,2,3", variants=VARIANTS)  # of variant n the runs n, n + 3, n + 6
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == NAMES
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.3, 0.4, 0.5])
    figure = figure_of("train.lr=1e-3,1e-2", variants=VARIANTS)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [
        pytest.approx([0.0, 0.3]), pytest.approx([0.1, 0.4]), pytest.approx([0.2, 0.5]),
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    figure = figure_of("train.channels_last=true,false", variants=VARIANTS)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[1] == "TrivialAugment, erasing, channels_last=true"
    assert len(set(labels)) == 6


def test_unknown_results_leave_gaps() -> None:
    for axes, variants in ((["train.lr=1e-3,1e-2"], ()), (["train.lr=1e-3,1e-2", "seed=1,2"], ()), ([], VARIANTS)):
        found = of(*axes, variants=tuple(variants))
        table: list[dict[str, Any]] = [{"best_val_top1": 0.5, "training_time_s": None} for _ in found]
        table[-1] = {"best_val_top1": None, "training_time_s": 3.0}
        for results in (table, [dict.fromkeys(one) for one in table]):
            figure = plot_values(found, results, "test")
            assert figure is not None
            figures.render(figure)


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


def test_best_value_at_the_edge_gives_a_hint() -> None:
    configs = [point.config for point in of("train.lr=1e-3,3e-3,1e-2", "data.batch_size=32,64")]
    assert edge_hints(configs, 0) == ["train.lr=0.001 is the smallest that was tried; smaller ones may be better"]
    assert edge_hints(configs, 2) == []
    assert edge_hints(configs, 5) == ["train.lr=0.01 is the largest that was tried; larger ones may be better"]


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
