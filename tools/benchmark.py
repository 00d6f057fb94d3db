"""Measure images/s of the loader, of the training step and of both together, in one run, as medians and ratios.

    python tools/benchmark.py loader --data-path data/cifar10 --peers
    python tools/benchmark.py model  --cfg configs/cifar10_resnet18.yaml
    python tools/benchmark.py train  --cfg configs/cifar10_resnet18.yaml --json result.json

It drives the real loader and the real step. Variants take turns in short rounds, so that a noisy machine slows all of
them alike; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from configs.errors import UserError, run_main
from configs.load import load_config
from configs.schema import AugConfig, Config, DataConfig, ModelConfig
from models import build_model
from pipelines import build_train_loader
from pipelines.gather import resident_fits
from pipelines.loader import Batch
from pipelines.shards import load_dataset, open_split
from tools import peers
from train import dist
from train.ddp import check_classes, to_device
from train.dist import Ranks
from train.loop import Training, build_training
from train.optim import build_optimizer
from train.throughput import endless
from train.warm_up import warm_up

Row = dict[str, Any]
BOUND = "bound: one copy of the bytes"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="loader|model|train")
    for stage, text in (
        ("loader", "reading, and reading with the config's augmentation, on every device"),
        ("model", "the training step on one resident batch"),
        ("train", "end to end, and its ratio to the resident batch"),
    ):
        command = commands.add_parser(stage, help=text, description=text)
        command.add_argument("--cfg", metavar="FILE", help="config file, configs/….yaml")
        command.add_argument("--data-path", help="converted data set; without --cfg it is all that is needed")
        command.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
        command.add_argument(
            "--batch-size", type=int, help="samples per batch (default: the config's, 512 without one)"
        )
        command.add_argument("--seconds", type=float, default=1.0, help="of each round (default 1)")
        command.add_argument("--rounds", type=int, default=5, help="rounds per figure (default 5)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
        if stage == "loader":
            command.add_argument("--peers", action="store_true", help="other loaders on the same images beside ours")
            command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the peers")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    config = _config(arguments)
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        raise UserError("tools/benchmark.py measures one process; use train/ddp.py --throughput under torchrun")
    if arguments.seconds <= 0 or arguments.rounds < 1:
        raise UserError(f"--seconds {arguments.seconds} and --rounds {arguments.rounds} must be positive")
    if arguments.json:
        try:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.touch()
        except OSError as error:
            raise UserError(f"cannot write --json {arguments.json}: {error.strerror}; name another file") from None
    with dist.process_group(ranks) as device:
        if arguments.stage == "loader":
            rows = benchmark_loader(config, arguments)
        else:
            rows = benchmark_training(config, arguments, device, end_to_end=arguments.stage == "train")
    print(table(rows))
    print(environment_line())
    if arguments.json:
        arguments.json.write_text(json.dumps([row | environment() for row in rows], indent=1) + "\n")


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.cfg:
        replacements = {"data.batch_size": arguments.batch_size, "data.path": arguments.data_path}
        return load_config(arguments.cfg, arguments.opts, **replacements)
    if not arguments.data_path:
        raise UserError("nothing to measure: give --cfg FILE or --data-path DIR")
    if arguments.opts:
        raise UserError(
            f"--opts {' '.join(arguments.opts)} changes a config, but there is none; give --cfg FILE as well"
        )
    data = DataConfig(path=arguments.data_path, batch_size=arguments.batch_size or 512)
    size = data_size(data)
    crop = AugConfig(crop="pad") if size <= 64 else AugConfig(crop="random-resized")
    return Config(data=data, aug=crop, model=ModelConfig(name="resnet18"), name=Path(arguments.data_path).name)


def data_size(data: DataConfig) -> int:
    """The side of the stored images; of 224 where they vary."""
    shape = load_dataset(data.path)["image_shape"]
    return int(shape[0]) if shape else 224


def benchmark_loader(config: Config, arguments: argparse.Namespace) -> list[Row]:
    """Rows for reading and for reading + augmentation on every device and placement; peers read the same images."""
    split = open_split(config.data.path, config.data.train_split)
    stored = data_size(config.data)
    raw = split.encoding == "npy"
    reading = config.data.model_copy(update={"image_size": stored if raw else config.data.image_size or stored})
    plain = AugConfig(crop="none", flip=0.0)
    variants: dict[tuple[str, str, str], Iterator[Any]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        # on the CPU both placements are its memory, and auto takes the better one
        for placement in ("host", "device") if device == "cuda" and raw else ("auto",):
            if placement == "device" and not resident_fits(split, torch.device(device)):
                continue
            where = {"placement": placement}
            read = build_train_loader(reading.model_copy(update=where), plain, seed=config.seed, device=device)
            full = config.data.model_copy(update={**where, "image_size": config.data.image_size or stored})
            augment = build_train_loader(full, config.aug, seed=config.seed, device=device)
            variants[("ours, reading", device, placement)] = endless(read)
            variants[("ours, reading + augmentation", device, placement)] = endless(augment)
    if raw:
        variants[(BOUND, "cpu", "")] = memory_copies(config.data.batch_size * int(split.size[0]))
    with tempfile.TemporaryDirectory(prefix="zhu-peers-") as scratch:
        if arguments.peers:
            if not raw:
                raise UserError(f"--peers reads raw images, but {config.data.path} stores {split.encoding}; "
                                "convert with --encoding npy")  # fmt: skip
            source = peers.PeerSource(split, Path(scratch), config.data.batch_size, arguments.workers)
            for name, peer in peers.importable().items():
                variants[(name, "cpu", "")] = peer(source)
        rates = measure(variants, config.data.batch_size, arguments.seconds, arguments.rounds)
        variants.clear()  # ends the peers' workers before their files go
    ours = rates[("ours, reading", "cpu", "auto")]
    size = f"{stored}x{stored}"
    return [
        row("loader", name, rates[name, device, placement], device=device, placement=placement, image_size=size,
            encoding=split.encoding, batch_size=config.data.batch_size,
            ratio=("ours / this", ours / rates[name, device, placement]))
        for name, device, placement in rates
    ]  # fmt: skip


def memory_copies(size: int) -> Iterator[torch.Tensor]:
    """Copies of `size` bytes from memory that is not in the cache: what handing out a batch costs at the very least."""
    sources = [torch.zeros(size, dtype=torch.uint8) for _ in range(8)]
    targets = [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
    for number in itertools.count():
        yield targets[number % 4].copy_(sources[number % 8])


def measure(variants: dict[Any, Iterator[Any]], batch_size: int, seconds: float, rounds: int) -> dict[Any, float]:
    """images/s of each iterator of batches: the median of rounds, in which all take turns after a warm-up."""
    steps = {}
    for name, batches in tqdm(variants.items(), desc="warm-up", leave=False):
        _take(batches, 5)
        begin = time.perf_counter()
        _take(batches, 10)
        steps[name] = max(5, int(10 * seconds / max(time.perf_counter() - begin, 1e-6)))
    rates: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, batches in variants.items():
            _take(batches, 1)  # a loader that went idle while others ran has batches ready: they are not counted
            begin = time.perf_counter()
            _take(batches, steps[name])
            rates[name].append(steps[name] * batch_size / (time.perf_counter() - begin))
    return {name: median(values) for name, values in rates.items()}


def _take(batches: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def benchmark_training(
    config: Config, arguments: argparse.Namespace, device: torch.device, end_to_end: bool
) -> list[Row]:
    """The step on one resident batch, and end to end through the loader, in alternating rounds."""
    dataset = load_dataset(config.data.path)
    classes = check_classes(config, dataset)
    loader = build_train_loader(config.data, config.aug, seed=config.seed, device=device)
    network = build_model(config.model.name, classes, image_size=loader.image_size, mean=dataset["mean"],
                          std=dataset["std"], drop_rate=config.model.drop_rate)  # fmt: skip
    network = to_device(network, device, config.train.channels_last)
    optimizer = build_optimizer(network, config.train.optimizer, config.train.lr)
    training = build_training(network, optimizer, config.train, device)
    warm_up(training, loader)
    training.forward.train()
    resident = next(iter(loader))
    loader.state = {"epoch": 0, "step": 0}
    stages: dict[str, Iterator[None]] = {"model": steps_on(training, lambda: resident)}
    if end_to_end:
        batches = endless(loader)
        stages["train"] = steps_on(training, lambda: next(batches))
    waited = loader.wait_s
    rates = measure(stages, config.data.batch_size, arguments.seconds, arguments.rounds)
    common: dict[str, Any] = {
        "device": device.type,
        "batch_size": config.data.batch_size,
        "image_size": f"{loader.image_size}x{loader.image_size}",
        "precision": str(training.amp or torch.float32).removeprefix("torch."),
    }
    rows = [row("model", f"{config.model.name}, resident batch", rates["model"], **common)]
    if end_to_end:
        ratio = ("train / model", rates["train"] / rates["model"])
        rows.append(row("train", f"{config.model.name}, end to end", rates["train"], **common, ratio=ratio,
                        data_wait_s=round(loader.wait_s - waited, 4)))  # fmt: skip
    return rows


def steps_on(training: Training, next_batch: Callable[[], Batch]) -> Iterator[None]:
    """The real training step, once per item."""
    while True:
        training.step(training, next_batch())
        yield


def row(stage: str, name: str, images_per_s: float, *, ratio: tuple[str, float] | None = None, **facts: Any) -> Row:
    """One line of the table and of the JSON file."""
    shown = {"ratio_of": ratio[0], "ratio": round(ratio[1], 3)} if ratio else {}
    return {"name": name, "stage": stage, "images_per_s": round(images_per_s, 1), **facts, **shown}


def table(rows: list[Row]) -> str:
    """Markdown, aligned: what a person reads and docs/benchmarks keeps."""
    header = ["stage", "name", "device", "placement", "image", "batch", "images/s", "ratio"]
    lines = [header, ["---"] * len(header)]
    for item in rows:
        ratio = f"{item['ratio']:.2f} ({item['ratio_of']})" if "ratio" in item else ""
        lines.append([item["stage"], item["name"], item["device"], item.get("placement", ""), item["image_size"],
                      str(item["batch_size"]), f"{item['images_per_s']:,.0f}", ratio])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def environment() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "machine": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "dali": version("nvidia-dali-cuda120"),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def environment_line() -> str:
    return ", ".join(f"{key} {value}" for key, value in environment().items())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    run_main(main)
