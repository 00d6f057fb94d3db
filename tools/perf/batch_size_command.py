"""Measure images/s and peak memory at growing batch sizes: `tools/benchmark.py ramp`."""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from configs.load import load_config
from configs.schema import Config
from configs.stages import config_at
from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.process import handle_signals
from pipelines.open import load_dataset
from tools.benchmarks.engine import process_memory
from tools.common.tables import make_folder, markdown, write_csv
from tools.perf import batch_size_search
from tools.perf.batch_size_report import display_rows, summary_sentence, trial_rows, write_results
from tools.perf.batch_size_search import BatchSizeSearch, Target, Trial
from train.build import check_classes

TOLERANCE = 1 / 32  # of the bisection without --exact, as a share of the batch size


def run(arguments: argparse.Namespace) -> int:
    check_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    limit_bytes = arguments.memory_limit and int(arguments.memory_limit * process_memory.GIB)
    if limit_bytes is None and not on_gpu:
        limit_bytes = int(process_memory.SHARE_OF_AVAILABLE * process_memory.available_bytes())
    targets = build_targets(arguments, on_gpu, limit_bytes)
    name = f"{targets[0].config.name}-ramp" if len(targets) == 1 and not arguments.model else "ramp"
    out = make_folder(arguments.out or Path("output") / name)
    if limit_bytes is not None and arguments.memory_limit is None:
        share = f"{100 * process_memory.SHARE_OF_AVAILABLE:.0f} %"
        print(f"memory limit {limit_bytes / process_memory.GIB:.3g} GiB, {share} of the available memory")
    searches = [BatchSizeSearch(target) for target in targets]
    code = 0
    try:
        with handle_signals((signal.SIGTERM, signal.SIGHUP), interrupt):  # from schedulers; the terminal was closed
            search_all(searches, arguments, out / "ramp.csv")
    except KeyboardInterrupt:
        code = 130
        print("interrupted; results so far:", file=sys.stderr)
    searches = [search for search in searches if search.trials or search.end]
    for search in searches:
        search.end = search.end or "interrupted"
    write_results(searches, limit_bytes, out)
    print(markdown(display_rows(searches)))
    print("\n" + "\n".join(summary_sentence(search) for search in searches))
    for search in searches:
        if (failure := search.failure) is not None:
            print(f"failed: {search.target.name}: batch {failure.batch_size}: {failure.error}", file=sys.stderr)
            code = code or 1
    return code


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError if neither --cfg nor --model is given, or if a value is out of range."""
    if not arguments.cfg and not arguments.model:
        raise UserError("nothing to measure: give --cfg FILE or --model NAME")
    for name in ("memory_limit", "min_batch", "max_batch", "minutes", "seconds", "rounds", "size", "classes"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive and finite")
    if arguments.max_batch is not None and arguments.max_batch < arguments.min_batch:
        raise UserError(f"--max-batch {arguments.max_batch} is below --min-batch {arguments.min_batch}; raise it")


def build_targets(arguments: argparse.Namespace, on_gpu: bool, limit_bytes: int | None) -> list[Target]:
    """Return a target with a unique name for each model of --cfg and --model.

    Raises:
        UserError: A config or its data set cannot be loaded, or the config does not match the data set.
    """
    models: list[tuple[str, Config]] = []
    for file in arguments.cfg:
        config = config_at(load_config(file, arguments.opts, **{"data.path": arguments.data_path}), epoch=0)
        check_classes(config, load_dataset(config.data.path, config.data.classes))
        models.append((str(config.name), config))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "model.yaml"
        base.write_text("data: {path: none}\n", encoding="utf-8")
        for name in arguments.model:
            fields = {"model.name": name, "model.num_classes": arguments.classes, "data.image_size": arguments.size}
            title = f"{name} {arguments.size}x{arguments.size}"
            models.append((title, load_config(base, arguments.opts, **fields)))
    targets: dict[str, Target] = {}
    for number, (title, config) in enumerate(models):
        candidates = itertools.chain([title], (f"{title}-{count}" for count in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in targets)
        targets[name] = Target(name, config, number >= len(arguments.cfg), on_gpu, limit_bytes)
    return list(targets.values())


def search_all(searches: list[BatchSizeSearch], arguments: argparse.Namespace, csv: Path) -> None:
    """Run the searches in order. Replace the CSV file after every trial."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with progress_bar(unit=" trials", bar_format="{desc}: {n_fmt} trials, {elapsed}") as bar:
        for search in searches:
            trials = search.run(
                partial(_run_trial, search, arguments, deadline, bar.set_description),
                first=arguments.min_batch,
                maximum=arguments.max_batch,
                tolerance=0.0 if arguments.exact else TOLERANCE,
            )
            for _ in trials:
                bar.update()
                write_csv(csv, trial_rows(searches))


def _run_trial(
    search: BatchSizeSearch,
    arguments: argparse.Namespace,
    deadline: float | None,
    announce: Callable[[str], None],
    batch_size: int,
    origin: str,
) -> Trial:
    announce(f"{search.target.name}, batch {batch_size}")
    images = batch_size * search.target.config.train.accumulation_steps
    step_s = max((images / trial.rate for trial in search.fitting), default=0.0)
    rounds = 1 if origin == "bisection" else arguments.rounds
    trial = batch_size_search.run_trial(search.target, batch_size, arguments.seconds, rounds, deadline, step_s)
    trial.origin = origin
    return trial
