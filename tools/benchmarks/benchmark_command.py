"""Run the stages of `tools/benchmark.py`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import UserError
from pipelines.open import open_split
from tools.benchmarks import documents, peers
from tools.benchmarks.engine import datasets, markdown, results
from tools.benchmarks.engine.interleaved import run_in_subprocess
from tools.benchmarks.engine.run_file import Run, RunFile, write_json
from tools.benchmarks.single_stage import measure_stage
from tools.benchmarks.suites import cpu, gpu, suite
from tools.benchmarks.suites.datasets import check_free_space
from tools.benchmarks.suites.settings import Settings
from tools.perf import batch_size_command, step_command
from train.distributed.process_group import Ranks

GIB = 2**30
FREE_SPACE_BYTES = {"cpu": 3 * GIB, "cuda": 12 * GIB}  # for the data sets of `all`


def run(arguments: argparse.Namespace) -> int:
    """Measure as the arguments of `tools/benchmark.py` say, and return the exit status."""
    if arguments.stage != "profile":
        Ranks.alone("tools/benchmark.py")  # train/ddp.py --throughput is for torchrun
    if arguments.stage == "ramp":
        return batch_size_command.run(arguments)
    if arguments.stage == "profile":
        return step_command.run(arguments)
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="zhu-benchmark-", dir=arguments.scratch) as scratch:
        settings = build_settings(arguments, Path(scratch).resolve())
        if arguments.stage == "all":
            file = measure_all(arguments, settings)
            result, entries = file.run, file.added_tables()
        else:
            result = measure_stage(arguments, settings)
            entries = result.groups
    if arguments.json:
        write_json(result, arguments.json)
    if getattr(arguments, "report", None):
        for path in documents.write(result, arguments.report):
            print(f"wrote {path}")
    failures = results.failure_lines(entries)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr, flush=True)
    print(markdown.tables_markdown(entries, result), flush=True)
    return 1 if failures else 0


def check_outputs(arguments: argparse.Namespace) -> None:
    """Create the folders given by the arguments, and check that the --json file is writable.

    Call this before measuring. Raises UserError if a folder cannot be created or the file cannot be written.
    """
    for folder in (arguments.scratch, getattr(arguments, "report", None), arguments.json and arguments.json.parent):
        if folder is not None:
            _try_output(_make_folder, folder)
    if arguments.json is not None:
        _try_output(_check_writable, arguments.json)


def _try_output(function: Callable[[Path], None], path: Path) -> None:
    try:
        function(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file or folder") from None


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _check_writable(file: Path) -> None:
    """Raise OSError if the file cannot be written.

    A file created by the check is removed again, since an empty file does not contain a run.
    """
    is_new = not file.exists()
    file.open("ab").close()
    if is_new:
        file.unlink()


def build_settings(arguments: argparse.Namespace, scratch: Path) -> Settings:
    """Return the settings of a run. Paths become absolute, since subprocesses run in the project's folder."""
    given: dict[str, Any] = vars(arguments)
    given = {name: value.resolve() if isinstance(value, Path) else value for name, value in given.items()}
    on_gpu, minutes = torch.cuda.is_available(), given.get("minutes")
    names = {field.name for field in fields(Settings)} - {"scratch", "data", "only", "workers"}
    return Settings(
        device="cuda" if on_gpu else "cpu",
        scratch=scratch,
        data=given.get("data", scratch) if on_gpu else scratch,
        only=tuple(given.get("only", ())),
        workers=tuple(given.get("workers", ())),
        deadline=None if minutes is None else time.monotonic() + 60 * minutes,
        part_s=given.get("part_seconds") or (gpu.PART_S if on_gpu else None),
        **{name: given[name] for name in names & given.keys()},
    )


def measure_all(arguments: argparse.Namespace, settings: Settings) -> RunFile:
    """Measure the selected parts on this machine, and return the `RunFile` with their tables.

    On a GPU with --report, the parts are added to those of earlier runs in DEVICE.json.

    Raises:
        UserError: A given data set cannot be used, a folder cannot be created, the disk has too little space, --part or
            --only does not select a part, or a file of earlier runs is invalid.
    """
    on_gpu = settings.device == "cuda"
    for given in (arguments.small, arguments.medium):
        if given is not None and open_split(given, datasets.SPLIT).encoding != "npy":
            raise UserError(
                f"{given} stores JPEG, but the other encodings are made from raw pixels; give an npy data set"
            )
    _try_output(_make_folder, settings.data)
    check_free_space(settings.data, FREE_SPACE_BYTES[settings.device], "--data" if on_gpu else "--scratch")
    parts = suite.choose(gpu.PARTS if on_gpu else cpu.PARTS, arguments.part, arguments.only)
    # on a GPU in a subprocess, since a CUDA context in this process would use GPU memory during the measurements
    environment = run_in_subprocess(results.environment) if on_gpu else results.environment()
    run = Run(environment=environment, missing_peers=peers.all_missing())
    files, earlier = [arguments.json] if arguments.json else [], None
    if on_gpu and arguments.report is not None:
        files.append(arguments.report / f"{documents.slug(run)}.json")
        earlier = documents.load_runs(arguments.report).get(documents.slug(run))
    file = RunFile(run, files, earlier)
    suite.run_parts(parts, settings, file)
    return file
