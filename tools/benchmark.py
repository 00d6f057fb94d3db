"""Measure the images/s of data loaders and training, and compare them to other libraries and the machine's limits.

    python tools/benchmark.py loader --data-path data/cifar10
    python tools/benchmark.py train  --cfg configs/cifar10_resnet18.yaml --json result.json
    python tools/benchmark.py peers  --cfg configs/cifar10_lenet.yaml
    python tools/benchmark.py augment --data-path data/cifar10
    python tools/benchmark.py stages --cfg configs/medium_imagenet_96_resnet18_progressive.yaml
    python tools/benchmark.py ramp   --cfg configs/cifar10_lenet.yaml
    python tools/benchmark.py profile --cfg configs/cifar10_lenet.yaml
    python tools/benchmark.py scale
    python tools/benchmark.py all --report docs/benchmarks                        (make bench, make gpu-bench)
    python tools/benchmark.py all --report docs/benchmarks --part training        (make gpu-bench PART=training)

The benchmark drives the real loader and the real training step. Each candidate (this project or a peer in one setting)
runs in a separate process. The candidates take turns in short rounds, so that a noisy machine slows all of them alike.
Each figure is the median of the rounds. If a candidate fails, only its rows are lost, and the exit code is 1. Rows that
are skipped because time ran out or an optional peer is missing are not failures.

On a GPU, `all` measures in parts, each with a time limit. The JSON files of --report and --json are replaced after each
round or row, so a killed run keeps the rows measured so far. With --report, the parts are added to those of earlier
runs in DIR/DEVICE.json. With --json alone, the file contains only the parts of this run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from pipelines.storage.open import open_split
from tools import report
from tools.benchmarks import peers
from tools.benchmarks.engine import datasets, markdown, results
from tools.benchmarks.engine.interleaved import run_in_subprocess
from tools.benchmarks.engine.run_file import Run, RunFile, write_json
from tools.benchmarks.single_stage import measure_stage
from tools.benchmarks.suites import cpu, gpu, suite
from tools.benchmarks.suites.datasets import check_free_space
from tools.benchmarks.suites.settings import Settings
from tools.perf import batch_size_command, step_command
from train.distributed.process_group import Ranks

STAGES = {
    "loader": "loading without and with the config's augmentation, for every placement of the data",
    "model": "the training step on one resident batch",
    "train": "end-to-end training, and its ratio to the resident batch",
    "peers": "the loader and, with --cfg, training, compared to other libraries on the same images, with crop and flip",
    "augment": "the loader with each kind of augmentation, compared to torchvision's transforms",
    "stages": "the cost of changing the image size in progressive resizing; needs a config with data.stages",
    "ramp": "training at batch 1, 2, 4 … until memory is full: images/s, memory, the largest batch",
    "profile": "time of a training step by phase, and its share of the peak arithmetic rate",
    "limits": "limits of the machine: copies, arithmetic, disk",
    "scale": "cost per sample and memory at 10 thousand, 100 thousand and 1.5 million samples",
    "all": "all measurements for this machine, including the GPU's if there is one; --report writes the documents",
}
COMMANDS = {"ramp": batch_size_command, "profile": step_command}  # commands with separate arguments and outputs
GIB = 2**30
FREE_SPACE_BYTES = {"cpu": 3 * GIB, "cuda": 12 * GIB}  # for the data sets of `all`


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="|".join(STAGES))
    for stage, text in STAGES.items():
        if stage in COMMANDS:
            formatter = argparse.RawDescriptionHelpFormatter
            description = COMMANDS[stage].__doc__
            COMMANDS[stage].add_arguments(
                commands.add_parser(stage, help=text, description=description, formatter_class=formatter)
            )
            continue
        command = commands.add_parser(stage, help=text, description=text)
        if stage == "all":
            _add_run_arguments(command)
        elif stage not in ("limits", "scale"):
            _add_config_arguments(command)
        if stage in ("peers", "augment", "all"):
            cores = len(os.sched_getaffinity(0))
            command.add_argument("--workers", type=int, default=cores, help="worker processes of the peers")
        command.add_argument("--scratch", type=path_argument, help="folder for temporary files")
        command.add_argument("--seconds", type=float, default=0.5, help="length of each round (default %(default)s)")
        command.add_argument("--rounds", type=int, default=5, help="rounds per figure (default %(default)s)")
        command.add_argument("--json", type=path_argument, metavar="FILE", help="also write the run to this file")
    return parser.parse_args(arguments)


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--cfg", type=path_text, metavar="FILE", help="config file, configs/….yaml")
    add("--data-path", type=path_text, help="converted data set; without --cfg, only loaders are measured")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--batch-size", type=int, help="samples per batch (default: the config's, 512 without one)")


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    part_names = ", ".join(part.name for part in gpu.PARTS)
    stages = sorted({stage for part in (*cpu.PARTS, *gpu.PARTS) for stage in part.stages})
    add("--small", type=path_argument, help="converted 32x32 data set (default: data/cifar10, else digits)")
    add("--medium", type=path_argument, help="converted 96x96 data set (default: data/medium-imagenet-96)")
    add("--source", type=path_argument, help="raw CIFAR-10, if it is not converted")
    add("--samples", type=int, help="samples of the generated data sets; fewer for a quick try")
    kept = "on a GPU: folder that keeps the generated data sets for later parts (default %(default)s)"
    add("--data", type=path_argument, default=Path("output/benchmark-data"), metavar="DIR", help=kept)
    add("--minutes", type=float, help="time limit of the whole run; measurements not started by then are left out")
    add("--part", nargs="+", default=[], metavar="NAME", help=f"on a GPU: {part_names}")
    add("--part-seconds", type=float, help=f"time limit of each part (default: {gpu.PART_S:g} on a GPU)")
    add("--seeds", type=int, default=10, help="runs of each speedrun (default %(default)s)")
    add("--epochs", type=int, help="epochs of the runs to an accuracy; fewer for a quick try")
    add("--reference", type=path_argument, metavar="DIR", help="checkout of cifar10-airbench, run beside the speedrun")
    documents = "write DIR/DEVICE.json, .md, .png and the tables of its README.md"
    add("--report", type=path_argument, metavar="DIR", help=documents)
    add("--only", nargs="+", default=[], choices=stages)


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.stage != "profile":
        Ranks.alone("tools/benchmark.py")  # train/ddp.py --throughput is for torchrun
    if arguments.stage in COMMANDS:
        return COMMANDS[arguments.stage].main(arguments)
    if arguments.seconds <= 0 or arguments.rounds < 1:
        raise UserError(f"--seconds {arguments.seconds} and --rounds {arguments.rounds} must be positive")
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="zhu-benchmark-", dir=arguments.scratch) as scratch:
        settings = build_settings(arguments, Path(scratch).resolve())
        if arguments.stage == "all":
            file = measure_all(arguments, settings)
            run, entries = file.run, file.added_tables()
        else:
            run = measure_stage(arguments, settings)
            entries = run.groups
    if arguments.json:
        write_json(run, arguments.json)
    if getattr(arguments, "report", None):
        for path in report.write(run, arguments.report):
            print(f"wrote {path}")
    failures = results.failure_lines(entries)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr, flush=True)
    print(markdown.tables_markdown(entries, run), flush=True)
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
    names = {field.name for field in fields(Settings)} - {"scratch", "data", "only"}
    return Settings(
        device="cuda" if on_gpu else "cpu",
        scratch=scratch,
        data=given.get("data", scratch) if on_gpu else scratch,
        only=tuple(given.get("only", ())),
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
        files.append(arguments.report / f"{report.slug(run)}.json")
        earlier = report.load_runs(arguments.report).get(report.slug(run))
    file = RunFile(run, files, earlier)
    suite.run_parts(parts, settings, file)
    return file


if __name__ == "__main__":
    run_main(main)
