"""Train with batches of 1, 2, 4 … images until memory is full: images/s and peak memory by batch size, and the largest.

    python tools/benchmark.py ramp --cfg configs/cifar10_lenet.yaml configs/cifar10_alexnet.yaml --memory-limit 4
    python tools/benchmark.py ramp --model resnet18 timm/convnext_tiny --size 96 --classes 200 --exact

It runs the real training step on one batch that stays on the device (--cfg: of real images, repeated where the data set
has too few; --model: of noise), each size in a process of its own. After the first size that does not fit, bisection
finds the largest that does. The largest and the fastest size are measured again; the median of all rounds counts.
On a GPU each size is compiled anew, as the config says, which takes most of the time;
--opts train.compile=off train.cuda_graph=off is quicker, with other figures.

Memory on the CPU is the peak of the whole process, libraries included; on a GPU that of torch's tensors, and beside it
what is in use on the device altogether. Without --memory-limit a GPU is filled to its end, and on the CPU a process
gets 80 % of the memory that is available at the start, so that the machine does not swap. Exit code 1 when a model
failed by another error than its memory's.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.load import load_config
from configs.stages import config_at
from configs.utils.errors import UserError
from configs.utils.files import path_argument, path_text
from pipelines.storage.dataset import load_dataset
from tools.benchmarks.engine import process_memory, results
from tools.common.tables import Row, make_folder, markdown, write_csv, write_text
from tools.perf import batch_size_search, plots
from tools.perf.batch_size_search import BatchSizeSearch, Target, Trial
from train.build import check_classes
from train.reporting.figures import save

TOLERANCE = 1 / 32  # of the largest batch
NEAR_BEST = 0.95  # of the best rate
NOISY = 2.0  # ratio of the fastest round of a size to its slowest from which the user is told


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cfg", type=path_text, nargs="+", default=[], metavar="FILE", help="config files, configs/….yaml"
    )
    command.add_argument("--model", nargs="+", default=[], metavar="NAME", help="models without a config, on noise")
    command.add_argument(
        "--size", type=int, default=32, help="side of --model's images in pixels (default %(default)s)"
    )
    command.add_argument("--classes", type=int, default=10, help="of --model (default %(default)s)")
    command.add_argument("--data-path", type=path_text, help="data.path of all configs, a converted data set")
    command.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of all models")
    command.add_argument("--memory-limit", type=float, metavar="GIB", help="that a process, or torch on a GPU, may use")
    command.add_argument("--min-batch", type=int, default=1, metavar="N", help="the first size (default %(default)s)")
    command.add_argument("--max-batch", type=int, metavar="N", help="the last size to try")
    command.add_argument("--minutes", type=float, help="for all models; no size is begun after that")
    command.add_argument("--exact", action="store_true", help="the very largest batch, not the largest but 3 %%")
    command.add_argument("--seconds", type=float, default=0.5, help="of each round (default %(default)s)")
    command.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="per size; bisection takes one, the largest and the fastest size twice as many (default %(default)s)",
    )
    command.add_argument(
        "--out", type=path_argument, help="folder (default output/NAME-ramp, of several models output/ramp)"
    )


def main(arguments: argparse.Namespace) -> int:
    check_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    limit = arguments.memory_limit and int(arguments.memory_limit * process_memory.GIB)
    if limit is None and not on_gpu:
        limit = int(process_memory.SHARE_OF_AVAILABLE * process_memory.available_bytes())
    chosen = build_targets(arguments, on_gpu, limit)
    name = f"{chosen[0].config.name}-ramp" if len(chosen) == 1 and not arguments.model else "ramp"
    out = make_folder(arguments.out or Path("output") / name)
    if limit is not None and arguments.memory_limit is None:
        share = f"{100 * process_memory.SHARE_OF_AVAILABLE:.0f} %"
        print(f"memory limit {limit / process_memory.GIB:.3g} GiB, {share} of what is available")
    searches = [BatchSizeSearch(target) for target in chosen]
    code = 0
    try:
        with interrupt_on_termination():
            search_all(searches, arguments, out / "ramp.csv")
    except KeyboardInterrupt:
        code = 130
        print("\ninterrupted; what was measured until now:", file=sys.stderr)
    searches = [one for one in searches if one.trials or one.end]
    for one in searches:
        one.end = one.end or "interrupted"
    write_results(searches, limit, out)
    print(
        markdown(
            [
                display_row(one, size)
                for one in searches
                for size in sorted(one.trials, key=lambda size: size.batch_size)
            ]
        )
    )
    print("\n" + "\n".join(summary_sentence(one) for one in searches))
    for one in searches:
        if one.failure is not None:
            print(f"failed: {one.target.name}: batch {one.failure.batch_size}: {one.failure.error}", file=sys.stderr)
            code = code or 1
    return code


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """A scheduler's SIGTERM and a closed terminal act as Ctrl-C does; what is ignored (nohup) stays so."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) != signal.SIG_IGN]
    handlers = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def check_arguments(arguments: argparse.Namespace) -> None:
    if not arguments.cfg and not arguments.model:
        raise UserError("nothing to measure: give --cfg FILE or --model NAME")
    for name in ("memory_limit", "min_batch", "max_batch", "minutes", "seconds", "rounds", "size", "classes"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive and finite")
    if arguments.max_batch is not None and arguments.max_batch < arguments.min_batch:
        raise UserError(f"--max-batch {arguments.max_batch} is below --min-batch {arguments.min_batch}; raise it")


def build_targets(arguments: argparse.Namespace, on_gpu: bool, limit: int | None) -> list[Target]:
    """What is to be measured, each under a name of its own; raises UserError for a config that cannot be trained."""
    found: list[Target] = []

    def add(name: str, **facts: Any) -> None:
        taken = [target.name for target in found]
        number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
        name = name if number == 1 else f"{name}-{number}"
        found.append(Target(name, **facts, on_gpu=on_gpu, limit_bytes=limit))

    for file in arguments.cfg:
        config = config_at(load_config(file, arguments.opts, **{"data.path": arguments.data_path}), epoch=0)
        check_classes(config, load_dataset(config.data.path))
        add(str(config.name), config=config)
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / "model.yaml"
        blank.write_text("data: {path: none}\n", encoding="utf-8")
        for name in arguments.model:
            fields = {"model.name": name, "model.num_classes": arguments.classes, "data.image_size": arguments.size}
            add(
                f"{name} {arguments.size}x{arguments.size}",
                synthetic=True,
                config=load_config(blank, arguments.opts, **fields),
            )
    return found


def search_all(searches: list[BatchSizeSearch], arguments: argparse.Namespace, csv: Path) -> None:
    """Climb with each in turn; the CSV file is written anew after every size."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with tqdm(total=None, unit=" sizes", leave=False, file=sys.stderr) as bar:
        for one in searches:
            reach = partial(_reach, one, arguments, deadline, bar)
            sizes = batch_size_search.search(
                one,
                reach,
                first=arguments.min_batch,
                most=arguments.max_batch,
                tolerance=0.0 if arguments.exact else TOLERANCE,
            )
            for _ in sizes:
                bar.update()
                write_csv(csv, rows(searches))


def _reach(
    one: BatchSizeSearch, arguments: argparse.Namespace, deadline: float | None, bar: Any, batch: int, step: str
) -> Trial:
    bar.set_description(f"{one.target.name}, batch {batch}")
    step_s = max((batch / size.rate for size in one.fitting), default=0.0)
    rounds = 1 if step == "bisection" else arguments.rounds
    size = batch_size_search.run_trial(one.target, batch, arguments.seconds, rounds, deadline, step_s)
    size.origin = step
    return size


def rows(searches: list[BatchSizeSearch]) -> list[Row]:
    """One plain dict for each size tried, as the CSV and JSON files hold them."""
    return [row(one, size) for one in searches for size in sorted(one.trials, key=lambda size: size.batch_size)]


def row(one: BatchSizeSearch, size: Trial) -> Row:
    rates = (
        [float(f"{rate:.5g}") for rate in (size.rate, min(size.rates), max(size.rates))] if size.fits else [None] * 3
    )
    return {
        "model": one.target.name,
        "batch": size.batch_size,
        **dict(zip(("images_per_s", "lowest", "highest"), rates, strict=True)),
        "ms_per_step": float(f"{1e3 * size.batch_size / size.rate:.5g}") if size.fits else None,
        "memory_gib": _rounded(size.memory_gib),
        "reserved_gib": _rounded(size.reserved_gib),
        "device_memory_gib": _rounded(size.device_memory_gib),
        "fits": None if size.is_failure else size.fits,
        "step": size.origin,
        "rounds": len(size.rates),
        "error": size.error,
    }


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 4)


def display_row(one: BatchSizeSearch, size: Trial) -> Row:
    """A row of the table that is printed."""
    full = row(one, size)
    text = "does not fit" if full["fits"] is False else f"failed: {size.error}" if size.is_failure else ""
    names = ["model", "batch", "images_per_s", "lowest", "highest", "ms_per_step", "memory_gib"]
    if one.target.on_gpu:
        names.append("device_memory_gib")
    return {name.replace("_per_", "/").replace("_", " ").replace("gib", "GiB"): full[name] for name in names} | {
        "": "largest that fits" if size.fits and size.batch_size == one.largest and one.end == "memory" else text
    }


def summary(one: BatchSizeSearch) -> Row:
    """Return the answers: largest batch and whether there may be larger ones, best rate, smallest batch near it."""
    best = one.best
    return {
        "model": one.target.name,
        "end": one.end,
        "largest_batch": one.largest,
        "too_large_batch": one.too_large,
        "best_images_per_s": float(f"{best.rate:.5g}") if best else None,
        "best_batch": best.batch_size if best else None,
        "best_lowest": float(f"{min(best.rates):.5g}") if best else None,
        "best_highest": float(f"{max(best.rates):.5g}") if best else None,
        "near_best_batch": next((s.batch_size for s in one.reliable if best and s.rate >= NEAR_BEST * best.rate), None),
    }


def summary_sentence(one: BatchSizeSearch) -> str:
    found = summary(one)
    name, largest, too_large = one.target.name, found["largest_batch"], found["too_large_batch"]
    limit = one.target.limit_bytes
    where = f"{limit / process_memory.GIB:.3g} GiB" if limit else "memory"
    why = {
        "most": "the last one asked for",
        "time": "the time was over",
        "error": "a larger one failed" if largest else "the first one failed",
        "interrupted": "interrupted",
    }.get(one.end, "")
    if largest is None:
        return f"{name}: no batch was measured ({f'{too_large} does not fit into {where}' if too_large else why})."
    bound = f"{too_large:,} does not fit into {where}" if too_large else why
    if too_large and one.end != "memory":
        bound += f"; {why}"
    spread, noisiest = max((max(size.rates) / min(size.rates), size.batch_size) for size in one.fitting)
    noise = f" The rounds of batch {noisiest:,} differ {spread:.1f} times: the machine is busy." * (spread > NOISY)
    spread_of_best = f"{found['best_lowest']:,.0f} to {found['best_highest']:,.0f}"
    return (
        f"{name}: largest batch {'' if one.end == 'memory' else 'at least '}{largest:,} ({bound}); "
        f"best {found['best_images_per_s']:,.0f} images/s ({spread_of_best}) at batch {found['best_batch']:,}, "
        f"{found['near_best_batch']:,} is the smallest within {100 - 100 * NEAR_BEST:.0f} % of it.{noise}"
    )


def write_results(searches: list[BatchSizeSearch], limit: int | None, out: Path) -> None:
    """ramp.csv, ramp.json and ramp.png."""
    facts = results.environment()
    gpu_gib = next((size.gpu_memory_gib for one in searches for size in one.trials if size.gpu_memory_gib), None)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "environment": facts,
        "memory_limit_gib": None if limit is None else round(limit / process_memory.GIB, 4),
        "gpu_memory_gib": _rounded(gpu_gib),
        "models": [summary(one) for one in searches],
        "sizes": rows(searches),
    }
    write_csv(out / "ramp.csv", rows(searches))
    write_text(out / "ramp.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    written = ["ramp.csv", "ramp.json"]
    if any(one.fitting for one in searches):
        line = (limit / process_memory.GIB, "limit") if limit else (gpu_gib, "the GPU's memory") if gpu_gib else None
        save(
            plots.plot_batch_sizes(searches, line, f"{facts['device']}, {facts['cores']} cores, {facts['date']}"),
            out / "ramp.png",
        )
        written.append("ramp.png")
    with suppress(BrokenPipeError):
        print(f"wrote {', '.join(str(out / name) for name in written)}\n", flush=True)
