"""Run benchmark programs and yield rows with their results.

The programs are speedruns, airbench94_muon.py, training runs timed to a target accuracy, and step profiles. Except for
profiles, results are read while the program runs, so that they are kept if it is interrupted. Programs are stopped at
the deadline.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from configs.load import to_yaml
from configs.schema import Config
from configs.utils.files import atomic_write
from configs.utils.process import die_with_parent
from pipelines.open import open_split
from tools.benchmarks.engine import datasets
from tools.benchmarks.engine.interleaved import OUT_OF_TIME
from tools.benchmarks.engine.results import RUNNING, STOPPED, Row, new_row, rounded, skipped_row
from tools.benchmarks.suites.datasets import small_dataset
from tools.benchmarks.suites.settings import Settings
from tools.runs.records import summarize_metrics, training_time_s
from train.reporting.metrics_file import MetricsLine, counted_accuracy, read_metrics

ROOT = Path(__file__).parents[3]
POLL_S = 0.5  # time between two reads of a program's output
TERMINATE_S = 5.0  # time between SIGTERM and SIGKILL
MEMORY = ("memory_gib", "device_memory_gib")
SPEEDRUN_FIGURES = ("top1_mean", "top1_std", "time_s_mean", "time_s_std", "first_result_s", *MEMORY)
SPEEDRUN_COLUMNS = ("runs", *SPEEDRUN_FIGURES, "ratio")
TIMES = ("epochs_per_s", "images_per_s", "training_s", "target_reached_s")
ACCURACY_COLUMNS = ("top1", "target", "epochs", *TIMES, *MEMORY)
PROFILE_COLUMNS = ("ms", "share", "images_per_s", "mfu", "mfu_of_data_sheet")
REFERENCE = "airbench94_muon.py"


class Program:
    """A program in a separate process group.

    The group is killed when the generator returned by `run` ends or is closed. If the calling process is killed, the
    kernel kills the program, but not the program's child processes.
    """

    def __init__(self, command: list[str], log: Path, deadline: float | None, folder: Path = ROOT) -> None:
        self._command, self._log, self._deadline, self._folder = command, log, deadline, folder
        self.is_late = False

    def run(self) -> Iterator[None]:
        """Run the program until it ends or the deadline passes.

        Yield every POLL_S seconds and once after the end. Closing the generator stops the program.
        """
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL, os.getpid()),
            )
        try:
            while self._process.poll() is None:
                self.is_late = self._deadline is not None and time.monotonic() > self._deadline
                if self.is_late:
                    break
                yield
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_S)
        finally:
            self._stop()
        yield

    def _stop(self) -> None:
        """Send SIGTERM, so that training can save a checkpoint. Kill the group after at most TERMINATE_S seconds."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(TERMINATE_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def error(self) -> str | None:
        """Reason why the program failed, or None if it is running, has succeeded or was stopped at the deadline."""
        code = self._process.poll()
        if code in (None, 0) or self.is_late:
            return None
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        last_line = text.splitlines()[-1].strip() if text else ""
        return f"exit code {code}: {last_line}"[:300]

    def row(self, name: str, figures: Mapping[str, object], **fields: object) -> Row:
        """Return a row with the figures so far.

        If the program has not ended successfully, the row has an error or a note with the reason.
        """
        fields |= figures
        if self.error is not None:
            return new_row(name, **fields, error=self.error)
        if self.is_late:
            return skipped_row(name, STOPPED if figures else OUT_OF_TIME, **fields)
        return skipped_row(name, RUNNING, **fields) if self._process.poll() is None else new_row(name, **fields)

    def rows(self, name: str, read_figures: Callable[[], Mapping[str, object]], **fields: object) -> Iterator[Row]:
        """Run the program, and yield rows with the figures so far."""
        return (self.row(name, read_figures(), **fields) for _ in self.run())


def _program(settings: Settings, name: str, script: str, *arguments: object) -> Program:
    """Return the program of one of this project's scripts. Its log is NAME.log in the scratch folder."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return Program(command, settings.scratch / f"{name}.log", settings.deadline)


def _data_arguments(settings: Settings, name: str) -> tuple[object, ...]:
    return ("--cfg", ROOT / "configs" / f"{name}.yaml", "--data-path", small_dataset(settings))


def speedrun(settings: Settings, name: str) -> Iterator[Row]:
    """Run tools/speedrun.py on a config and yield rows with the results so far.

    Once the program has written its JSON file, each row contains the file's content as `result`.
    """
    output = settings.scratch / f"{name}.json"
    options = (*_data_arguments(settings, name), "--runs", settings.seeds, "--json", output)

    def figures() -> dict[str, object]:
        if not output.exists():
            return {}
        result = json.loads(output.read_text(encoding="utf-8"))
        return {
            "runs": len(result["runs"]),
            "result": result,
            **{key: rounded(result[key], 5) for key in SPEEDRUN_FIGURES if key in result},
        }

    return _program(settings, name, "tools/speedrun.py", *options).rows(name, figures)


def reference(settings: Settings, our_time_s: float | None) -> Iterator[Row]:
    """Run the published airbench94_muon.py on our CIFAR-10 and yield rows with the results so far.

    The script is stopped after `settings.seeds` runs, not counting its warm-up. The log and the images in the script's
    format are written to `settings.data`/reference. If `settings.reference` is None or lacks the script, only a skipped
    row is yielded.

    Args:
        settings: Settings of the benchmark.
        our_time_s: Mean time of this project's speedrun. `ratio` is the script's mean time divided by it.
    """
    script = settings.reference and settings.reference.resolve() / REFERENCE
    if script is None or not script.is_file():
        where = "--reference FOLDER" if script is None else f"{script}, which does not exist,"
        note = f"not measured: needs {where} of github.com/KellerJordan/cifar10-airbench"
        yield skipped_row(REFERENCE, note, ours=False)
        return
    folder = settings.data / "reference"
    for split, name in (("train", "train"), ("val", "test")):
        write_reference_data(small_dataset(settings), split, folder / "cifar10" / f"{name}.pt")
    log = folder / "reference.log"
    program = Program([sys.executable, "-u", str(script)], log, settings.deadline, folder)
    for _ in program.run():
        runs = reference_runs(log.read_text(encoding="utf-8", errors="replace"))[: settings.seeds]
        figures: dict[str, object] = {}
        if runs:
            for key, values in zip(("top1", "time_s"), zip(*runs, strict=True), strict=True):
                figures[f"{key}_mean"] = rounded(statistics.fmean(values), 5)
                figures[f"{key}_std"] = rounded(statistics.stdev(values) if len(values) > 1 else 0.0, 5)
            figures["runs"] = len(runs)
            if our_time_s:
                figures["ratio"] = rounded(statistics.fmean(time_s for _, time_s in runs) / our_time_s, 3)
        if len(runs) == settings.seeds:  # the script itself would continue to 200 runs
            yield new_row(REFERENCE, **figures, ours=False)
            return
        yield program.row(REFERENCE, figures, ours=False)


def write_reference_data(data: Path, split: str, path: Path) -> None:
    """Write a split in the format that airbench94_muon.py reads, unless the file exists.

    The file contains images (uint8 [N, 32, 32, 3]), labels (int64 [N]) and class names.
    """
    if path.is_file():
        return
    opened = open_split(data, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(datasets.read_pixels(opened).copy())
    content = {"images": images, "labels": torch.from_numpy(opened.labels), "classes": list(opened.classes)}
    atomic_write(path, lambda file: torch.save(content, file))


def reference_runs(text: str) -> list[tuple[float, float]]:
    """Parse the table that airbench94_muon.py prints, skipping the first run, which is a warm-up.

    Returns:
        For each run, the accuracy with test-time augmentation and the time in seconds.
    """
    runs = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[1] == "eval":
            runs.append((float(cells[4]), float(cells[5])))
    return runs[1:]


def train_to_accuracy(settings: Settings, name: str, target: float) -> Iterator[Row]:
    """Train config `name` with train/ddp.py and yield rows with the results so far (see `accuracy_fields`).

    Training continues past the target, until the last epoch or the deadline. If `settings.epochs` is given, it replaces
    train.epochs, and warmup is disabled.
    """
    output, epochs = settings.scratch / "accuracy", settings.epochs
    options = [*_data_arguments(settings, name), "--output", output]
    options += [] if epochs is None else ["--opts", f"train.epochs={epochs}", "train.warmup_epochs=0"]
    program = _program(settings, name, "train/ddp.py", *options)
    return program.rows(name, lambda: accuracy_fields(read_metrics(output / name), target), target=target)


def accuracy_fields(metrics: list[MetricsLine], target: float) -> dict[str, object]:
    """Return the best accuracy, rates and memory of a run so far, and the training time until `target` was reached.

    The time is None if the target has not been reached. The result is empty before the end of the first epoch.
    """
    if not metrics:
        return {}
    found = summarize_metrics(metrics)
    time_s = found["training_time_s"]
    accuracies = [counted_accuracy(line, "auto") for line in metrics]
    first = next((number for number, top1 in enumerate(accuracies, 1) if top1 is not None and top1 >= target), None)
    figures = {
        "top1": found["best_val_top1"],
        "epochs": len(metrics),
        "epochs_per_s": len(metrics) / time_s if time_s else None,
        "images_per_s": found["images_per_s"],
        "training_s": time_s,
        "target_reached_s": training_time_s(metrics[:first]) if first is not None else None,
    }
    figures |= {key: metrics[-1][key] for key in MEMORY if key in metrics[-1]}
    return {key: rounded(value, 5) if isinstance(value, float) else value for key, value in figures.items()}


def profile(settings: Settings, config: Config, steps: int) -> Iterator[Row]:
    """Run tools/benchmark.py profile on a config and yield rows with its results after it ends.

    The phases of the step come first, then the whole step without a CUDA graph and, if the config uses one, with it. If
    the program writes no results, a single row gives the reason.
    """
    out, file = settings.scratch / "profile", settings.scratch / "profile.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    options = ("--cfg", file, "--steps", steps, "--seconds", 3 * settings.seconds, "--out", out)
    program = _program(settings, "profile", "tools/benchmark.py", "profile", *options)
    for _ in program.run():
        pass
    if not (out / "profile.json").exists():
        yield program.row("step", {})
        return
    content = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    for phase in content["phases"]:
        yield new_row(phase["phase"], ms=phase["ms"], share=phase["share"])
    rates, utilization = content["images_per_s"], content["arithmetic"] or {}
    training_mode = "captured" if "captured" in rates else "uncaptured"
    for mode, rate in rates.items():
        keys = ("mfu", "mfu_of_data_sheet") if mode == training_mode else ()
        figures = {"ms": content["unprofiled_step_ms"][mode], "images_per_s": rate}
        yield new_row(f"step, {mode}", **figures, **{key: utilization.get(key) for key in keys}, result=content)
