"""Run train/ddp.py in processes that start fast, record every batch, and can be killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from configs.utils.errors import run_main
from helpers.training import free_port, strict_lines
from pipelines.loader.batches import Batch
from pipelines.loader.train_loader import TrainLoader
from train import ddp
from train.checkpoint import store
from train.distributed.process_group import Ranks
from train.reporting.run_log import RunLog

TIMEOUT_S = 300.0
RESULTS = ["epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr"]
TRAINED = ["model", "optimizer", "scaler", "sums", "position", "progress"]  # names of checkpoint files
Sample = tuple[int, int]  # (epoch, position in its order)


def start(
    arguments: Sequence[str | Path],
    notes: Path,
    *,
    ranks: Ranks | None = None,
    port: int = 0,
    largest: int | None = None,
    step_s: float = 0.0,
    flush_s: float = 0.0,
) -> BaseProcess:
    """Start train/ddp.py with these arguments, as this rank of several.

    Batches are appended to NOTES.jsonl and output to NOTES.txt.

    Args:
        largest: Maximum file size in bytes, as with a quota.
        step_s: Delay of each batch, so that a kill comes in time.
        flush_s: Maximum delay of each flush to disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.training", "pipelines.build", "torch._dynamo"])  # once, for all processes
    variables = {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    if ranks is not None:
        numbers = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size,
                   "LOCAL_WORLD_SIZE": ranks.local_world_size, "MASTER_PORT": port}  # fmt: skip
        variables |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in numbers.items()}
    process = context.Process(target=_run, args=([*map(str, arguments)], notes, variables, largest, step_s, flush_s))
    process.start()
    return process


def start_ranks(arguments: Sequence[str | Path], notes: Path, world_size: int) -> list[BaseProcess]:
    port = free_port()
    ranks = [Ranks(rank, rank, world_size, world_size) for rank in range(world_size)]
    return [start(arguments, notes, ranks=one, port=port) for one in ranks]


def exit_code(process: BaseProcess) -> int | None:
    process.join(TIMEOUT_S)
    return process.exitcode


def run(arguments: Sequence[str | Path], notes: Path, **options: Any) -> int | None:
    """Return the exit code."""
    return exit_code(start(arguments, notes, **options))


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait for the condition or the end of the run. Polls without sleeping, so that short states are not missed."""
    end = time.monotonic() + TIMEOUT_S
    while process.is_alive() and not condition():
        assert time.monotonic() < end, "the condition never came true"


def kill_when(condition: Callable[[], bool], process: BaseProcess) -> bool:
    """Send SIGKILL as soon as the condition is true; return False if the run ended before."""
    wait_until(condition, process)
    process.kill()
    return exit_code(process) == -signal.SIGKILL


def _run(
    arguments: list[str], notes: Path, variables: dict[str, str], largest: int | None, step_s: float, flush_s: float
) -> None:
    output = os.open(notes.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    note_batches(notes.with_suffix(".jsonl"), step_s)
    fsync, chance = os.fsync, random.Random(0)
    os.fsync = lambda file: time.sleep(chance.uniform(0.0, flush_s)) or fsync(file)  # type: ignore[func-returns-value]
    RunLog.draw_curves = lambda *_: None  # type: ignore[method-assign]  # curves.png would take most of the time of a short run
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["train/ddp.py", *arguments]
    run_main(ddp.main)


def note_batches(path: Path, step_s: float = 0.0) -> None:
    """Make training loaders append a line to the file before each batch, and delay it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ranks, iterate = Ranks.from_environment(), TrainLoader.__iter__

    def noting(loader: TrainLoader) -> Iterator[Batch]:
        batches = iterate(loader)
        while True:
            position = loader.position
            try:
                batch = next(batches)
            except StopIteration:
                return
            indices = loader.plan.indices(position.epoch, position.step)
            first = (position.step * ranks.world_size + ranks.rank) * len(indices)
            pixels = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
            samples = [
                f"{index} {label} {hashlib.blake2b(image, digest_size=8).hexdigest()}"
                for index, label, image in zip(indices.tolist(), batch.labels.tolist(), pixels, strict=True)
            ]
            line = json.dumps({"epoch": position.epoch, "first": first, "samples": samples})
            os.write(file, line.encode() + b"\n")  # in one write, so that a kill leaves no partial line
            time.sleep(step_s)
            yield batch

    TrainLoader.__iter__ = noting  # type: ignore[method-assign, assignment]


def samples_of(notes: Path) -> dict[Sample, str]:
    """Return all samples that a run trained on, over all its starts; repeated samples must be equal."""
    samples: dict[Sample, str] = {}
    for line in strict_lines(notes.with_suffix(".jsonl")):
        for position, sample in enumerate(line["samples"], line["first"]):
            assert samples.setdefault((line["epoch"], position), sample) == sample
    return samples


def printed(notes: Path) -> str:
    return notes.with_suffix(".txt").read_text()


def saved_position(folder: Path) -> tuple[int, int]:
    """Return (epoch, step) of last.pt or the previous checkpoint; (-1, 0) before the first."""
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            position = store.load(folder / name)["position"]
            return position["epoch"], position["step"]
    return -1, 0


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return the differences between two finished runs: weights, other state and results of every epoch."""
    first, second = (store.load(folder / "last.pt") for folder in (ours, theirs))
    found = [part for part in TRAINED if not _is_equal(first[part], second[part])]
    return found if results_of(ours) == results_of(theirs) else [*found, "metrics.jsonl"]


def results_of(folder: Path) -> list[dict[str, Any]]:
    """Return the contents of metrics.jsonl without times."""
    return [{key: line[key] for key in RESULTS} for line in strict_lines(folder / "metrics.jsonl")]


def _is_equal(ours: Any, theirs: Any) -> bool:
    """Compare bitwise, through dicts and lists."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_is_equal(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))
    return bool(ours == theirs)
