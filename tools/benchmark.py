"""Measure images/s of loaders and of training, beside peers and beside what the machine can do at most, in one run.

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

It drives the real loader and the real step. Contestants take turns in short rounds, each in a process of its own, so
that a noisy machine slows all of them alike; each figure is the median of the rounds. A contestant that fails costs its
own row, and exit code 1; what was not measured for lack of time or of a peer is no failure.

On a GPU `all` measures in parts, each with a time limit. After every row the JSON files of --report and --json are
replaced, so the rows measured before a kill are kept. With --report the parts are added to those that earlier runs have
left in DIR/DEVICE.json; with --json alone the file holds the parts of this run only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from configs.load import load_config
from configs.schema import AugConfig, Config, DataConfig, ModelConfig
from configs.stages import config_at
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from pipelines.storage.split import open_split
from tools import report
from tools.benchmarks import peers
from tools.benchmarks.engine import datasets, results, roofline, run_file
from tools.benchmarks.engine.interleaved import Candidate, measure, run_in_subprocess
from tools.benchmarks.suites import augmentations, gpu, groups, progressive, scale, suite, tables
from tools.perf import batch_size_command, step_command
from train.distributed.process_group import Ranks

STAGES = {
    "loader": "reading, and reading with the config's augmentation, on every device",
    "model": "the training step on one resident batch",
    "train": "end to end, and its ratio to the resident batch",
    "peers": "the loader and, with --cfg, training, beside other libraries on the same images, with crop and flip",
    "augment": "the loader with each kind of augmentation on its own, beside torchvision's transforms",
    "stages": "whether progressive resizing costs anything at a change: needs a config with data.stages",
    "ramp": "training at batch 1, 2, 4 … until memory is full: images/s, memory, the largest batch",
    "profile": "where a training step's time goes, and its share of the arithmetic peak",
    "limits": "what the machine can do at most: copies, arithmetic, disk",
    "scale": "cost per sample and memory at 10 thousand, 100 thousand and 1.5 million samples",
    "all": "the whole run for this machine, a GPU's parts where there is one; --report writes the documents",
}
OWN_MAIN = {"ramp": batch_size_command, "profile": step_command}  # with arguments, results and pictures of their own
CROP_SIDE = {96: 64}  # what augmentation ends with where there is no config to say so


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="|".join(STAGES))
    for stage, text in STAGES.items():
        if stage in OWN_MAIN:
            command = commands.add_parser(
                stage,
                help=text,
                description=OWN_MAIN[stage].__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            OWN_MAIN[stage].add_arguments(command)
            continue
        command = commands.add_parser(stage, help=text, description=text)
        if stage in ("loader", "model", "train", "peers", "augment", "stages"):
            command.add_argument("--cfg", type=path_text, metavar="FILE", help="config file, configs/….yaml")
            command.add_argument(
                "--data-path", type=path_text, help="converted data set; without --cfg it is all that a loader needs"
            )
            command.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
            command.add_argument(
                "--batch-size", type=int, help="samples per batch (default: the config's, 512 without one)"
            )
        if stage == "all":
            command.add_argument(
                "--small", type=path_argument, help="converted 32x32 data set (default: data/cifar10, else digits)"
            )
            command.add_argument(
                "--medium", type=path_argument, help="converted 96x96 data set (default: data/medium-imagenet-96)"
            )
            command.add_argument("--source", type=path_argument, help="raw CIFAR-10, where it is not converted")
            command.add_argument("--samples", type=int, help="of the data sets that are made, fewer for a quick try")
            command.add_argument(
                "--data",
                type=path_argument,
                default=Path("output/benchmark-data"),
                metavar="DIR",
                help="on a GPU: keeps the data sets that are made, for the parts to come (default %(default)s)",
            )
            command.add_argument("--minutes", type=float, help="for all parts; what is not begun by then is left out")
            command.add_argument(
                "--part",
                nargs="+",
                default=[],
                metavar="NAME",
                help=f"on a GPU: {', '.join(p.name for p in gpu.PARTS)}",
            )
            command.add_argument(
                "--part-seconds", type=float, help=f"time limit of each part (default: {gpu.PART_S:g} on a GPU)"
            )
            command.add_argument("--seeds", type=int, default=10, help="runs of each speedrun (default %(default)s)")
            command.add_argument("--epochs", type=int, help="of the runs to an accuracy, for a quick try")
            command.add_argument(
                "--reference",
                type=path_argument,
                metavar="DIR",
                help="checkout of cifar10-airbench, measured beside the speedrun",
            )
            command.add_argument(
                "--report", type=path_argument, metavar="DIR", help="write DIR/DEVICE.json, .md, .png, README's table"
            )
            command.add_argument(
                "--only",
                nargs="+",
                default=[],
                choices=sorted({stage for part in (*suite.CPU_PARTS, *gpu.PARTS) for stage in part.stages}),
            )
        if stage in ("peers", "augment", "all"):
            command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the peers")
        command.add_argument(
            "--scratch", type=path_argument, help="folder for files made on the way, which are removed"
        )
        command.add_argument("--seconds", type=float, default=0.5, help="of each round (default %(default)s)")
        command.add_argument("--rounds", type=int, default=5, help="rounds per figure (default %(default)s)")
        command.add_argument("--json", type=path_argument, metavar="FILE", help="write the run there as well")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.stage != "profile":
        Ranks.alone("tools/benchmark.py")  # train/ddp.py --throughput is for torchrun
    if arguments.stage in OWN_MAIN:
        return OWN_MAIN[arguments.stage].main(arguments)
    if arguments.seconds <= 0 or arguments.rounds < 1:
        raise UserError(f"--seconds {arguments.seconds} and --rounds {arguments.rounds} must be positive")
    for folder in (arguments.scratch, getattr(arguments, "report", None)):
        _make(folder, lambda path: path.mkdir(parents=True, exist_ok=True))
    _make(arguments.json and arguments.json.parent, lambda path: path.mkdir(parents=True, exist_ok=True))
    _make(arguments.json, _check_writable)
    with tempfile.TemporaryDirectory(prefix="zhu-benchmark-", dir=arguments.scratch) as scratch:
        if arguments.stage == "all":
            kept = measure_all(arguments, Path(scratch).resolve())
            run, entries = kept.run, kept.added_tables()
        else:
            run = measure_one(arguments, Path(scratch))
            entries = run["groups"]
    if arguments.json:
        run_file.write_json(run, arguments.json)
    if getattr(arguments, "report", None):
        for written in report.write(run, arguments.report):
            print(f"wrote {written}")
    failed = results.failure_lines(entries)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr, flush=True)
    print(tables.tables_markdown(entries, run), flush=True)
    return 1 if failed else 0


def _make(path: Path | None, make: Any) -> None:
    """Before anything is measured: a figure that cannot be written would be lost."""
    try:
        if path is not None:
            make(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file or folder") from None


def _check_writable(file: Path) -> None:
    """Raise OSError if the file cannot be written; a new file is removed again, since an empty one is no run."""
    is_new = not file.exists()
    file.open("ab").close()
    if is_new:
        file.unlink()


def measure_all(arguments: argparse.Namespace, scratch: Path) -> run_file.RunFile:
    """Measure the parts of this machine; on a GPU the record adds to that of earlier parts in the same file."""
    on_gpu = torch.cuda.is_available()
    for given in (arguments.small, arguments.medium):
        if given is not None and open_split(given, datasets.SPLIT).encoding != "npy":
            raise UserError(
                f"{given} stores JPEG, but the other encodings are made of raw pixels; give an npy data set"
            )
    data = arguments.data.resolve() if on_gpu else scratch  # programs that are started run in the project's folder
    _make(data, lambda path: path.mkdir(parents=True, exist_ok=True))
    roofline.check_scratch(data, (12 if on_gpu else 3) * 2**30, "--data" if on_gpu else "--scratch")
    names = ("small", "medium", "source", "reference", "seconds", "rounds", "workers", "seeds", "epochs", "samples")
    settings = suite.Settings(
        device="cuda" if on_gpu else "cpu",
        scratch=scratch,
        data=data,
        deadline=None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes,
        part_s=arguments.part_seconds or (gpu.PART_S if on_gpu else None),
        only=tuple(arguments.only),
        **{name: _absolute(getattr(arguments, name)) for name in names},
    )
    parts = suite.choose(gpu.PARTS if on_gpu else suite.CPU_PARTS, arguments.part, arguments.only)
    missing = [*peers.missing(peers.LOADERS), *peers.missing(peers.LOOPS)]
    # on a GPU in another process, since a CUDA context in this one would take a share of the memory
    run = run_file.new_run(run_in_subprocess(results.environment) if on_gpu else results.environment(), missing)
    files, earlier = [], None
    if on_gpu and arguments.report is not None:
        files.append(arguments.report / f"{report.slug(run)}.json")
        earlier = report.load_runs(arguments.report).get(report.slug(run))
    kept = run_file.RunFile(run, [*files, *([arguments.json] if arguments.json else [])], earlier)
    suite.run_parts(parts, settings, kept)
    return kept


def _absolute(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value


def measure_one(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One stage on its own: its groups, and the limits where a bound needs them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    if arguments.stage == "stages":
        config = _config(arguments)
        if len(config.data.stages) < 2:
            raise UserError(f"data.stages of {arguments.cfg} has fewer than two stages; there is no change to measure")
        entry = progressive.measure_stage_changes(config, Ranks(), arguments.rounds)
        return _run_of([entry], [], begin)
    if arguments.stage == "scale":
        return _run_of([scale.measure_scale(scratch, arguments.seconds)], [], begin)
    chosen = [] if arguments.stage == "limits" else stage_groups(arguments, device, scratch)
    candidate = Candidate("limits", roofline.limit_workloads, (device, scratch))
    measurements = measure([candidate], arguments.seconds, min(3, arguments.rounds))
    found = roofline.limits_from(measurements)
    entries: list[dict[str, Any]] = []
    if arguments.stage == "limits":
        entries.append({"title": "Limits of the machine", "stage": "limits", "rows": groups.limit_rows(measurements)})
    entries += [group.run(found, arguments.seconds, arguments.rounds, None) for group in chosen]
    missing = [*peers.missing(peers.LOADERS), *peers.missing(peers.LOOPS)] if arguments.stage == "peers" else []
    return _run_of(entries, missing, begin)


def _run_of(entries: list[groups.Entry], missing: list[str], begin: float) -> dict[str, Any]:
    run = run_file.new_run(results.environment(), missing)
    return run | {"groups": entries, "duration_s": round(time.monotonic() - begin, 1)}


def stage_groups(arguments: argparse.Namespace, device: str, scratch: Path) -> list[groups.InterleavedTable]:
    config = _config(arguments)
    beside: dict[str, Any] = {}
    if arguments.stage == "peers":
        beside = {"scratch": scratch, "workers": arguments.workers}
        config = config.model_copy(update={"aug": groups.crop_and_flip(config.aug)})
    if arguments.stage == "augment":
        return [
            augmentations.augmentation_table(
                Path(config.data.path),
                batch_size=config.data.batch_size,
                device=device,
                scratch=scratch,
                workers=arguments.workers,
            )
        ]
    found = []
    if arguments.stage in ("loader", "peers"):
        folder, stored = Path(config.data.path), data_size(config.data)
        for aug in (None, config.aug):
            found.append(
                groups.loading(
                    [folder],
                    aug,
                    size=config.data.image_size or stored,
                    data=config.data,
                    batch_size=config.data.batch_size,
                    device=device,
                    **beside,
                )
            )
    if arguments.stage in ("model", "train") or (arguments.stage == "peers" and arguments.cfg):
        variants: dict[str, dict[str, Any]] = {} if arguments.stage == "model" else {"end to end": {}}
        found.append(groups.training(config.name or config.model.name, config, variants, device=device, **beside))
    return found


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.cfg:
        replacements = {"data.batch_size": arguments.batch_size, "data.path": arguments.data_path}
        config = load_config(arguments.cfg, arguments.opts, **replacements)
        return config if arguments.stage == "stages" else config_at(config, epoch=0)
    if not arguments.data_path or arguments.stage in ("model", "train", "stages"):
        need = "--cfg FILE" if arguments.stage in ("model", "train", "stages") else "--cfg FILE or --data-path DIR"
        raise UserError(f"nothing to measure: give {need}")
    if arguments.opts:
        raise UserError(
            f"--opts {' '.join(arguments.opts)} changes a config, but there is none; give --cfg FILE as well"
        )
    data = DataConfig(path=arguments.data_path, batch_size=arguments.batch_size or 512)
    size = data_size(data)
    crop = AugConfig(crop="pad") if size <= 64 else AugConfig(crop="random-resized")
    data = data.model_copy(update={"image_size": CROP_SIDE.get(size, size)})
    return Config(data=data, aug=crop, model=ModelConfig(name="resnet18"), name=Path(arguments.data_path).name)


def data_size(data: DataConfig) -> int:
    """The side of the stored images; of 224 where they vary."""
    shape = open_split(data.path, data.train_split).image_shape
    return int(shape[0]) if shape else 224


if __name__ == "__main__":
    run_main(main)
