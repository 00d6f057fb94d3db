"""Train one run per combination of settings, in a grid or random search, and report the best run.

    zhu sweep configs/cifar10_alexnet.yaml train.lr=1e-4,3e-4,1e-3,3e-3
    zhu sweep configs/cifar10_lenet.yaml train.lr=1e-3,1e-2 data.batch_size=64,128 --opts seed=1
    zhu sweep configs/cifar10_lenet.yaml "train.lr=loguniform(1e-4,1e-1)" --random 10
    zhu sweep configs/cifar10_lenet.yaml \\
        --variant "plain: aug.crop=none aug.flip=0" --variant "crop+flip: aug.crop=pad aug.flip=0.5"

Each run executes train/ddp.py separately, with one process per GPU. The visible GPUs are divided among concurrent runs.
On a CPU, the runs are started one after another by default. With --engine ray, runs take free GPUs, or CPUs, of the
nodes of a Ray cluster, which share the output folder and the data. Run the same command again to resume a sweep:
finished runs are kept, interrupted ones are resumed and failed ones are retried.

--out (default OUTPUT/NAME-sweep) contains a folder, a config file and a console log for each run. It also contains
files that cover the whole sweep: sweep.csv, sweep.json, curves.csv, sweep.png (once any run has metrics) and, if the
finished runs can be compared in one plot, sweep_values.png.

Exit codes: 0: all runs finished; 1: at least one run failed; 2: invalid input, or another error that the user can fix;
130: interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from configs.arguments import complete, complete_words, new_parser, take_config
from configs.utils.console import above_bars, counted, duration, fold, progress_bar
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument
from tools.common import tables
from tools.common.engine import add_engine, open_cluster

if TYPE_CHECKING:
    from pipelines.cluster.connection import Cluster
    from tools.runs.run_slots import RunSlot
    from tools.runs.sweep_points import Point
    from tools.runs.sweep_report import Sweep
    from tools.runs.sweep_runner import Engine


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    axes = (
        "config file, and settings with their values: train.lr=1e-3,3e-3; with --random also loguniform(LOW,HIGH) and "
        "uniform(LOW,HIGH)"
    )
    words = add("axes", nargs="*", metavar="CONFIG KEY=VALUES", help=axes)
    words.completer = complete_words  # type: ignore[attr-defined]
    add("--cfg", metavar="FILE", help="same as CONFIG")
    variant = "a named set of settings that change together; repeat for each variant"
    add("--variant", action="append", default=[], metavar="'NAME: KEY=VALUE …'", help=variant)
    add("--random", type=int, metavar="N", help="draw N different points instead of the full grid")
    add("--seed", type=int, default=0, help="seed for --random (default: %(default)s)")
    opts = "settings that override the file in all runs; put KEY=VALUES before this option"
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=opts)
    add("--out", type=path_argument, metavar="FOLDER", help="output folder (default: the config's OUTPUT/NAME-sweep)")
    processes = "processes per run, one per GPU (default: %(default)s)"
    add("--gpus-per-run", type=int, default=1, metavar="N", help=processes)
    add(
        "--parallel",
        type=int,
        metavar="N",
        help="concurrent runs (default: one per group of GPUs, one per machine without GPUs)",
    )
    cpus = "CPUs per run with --engine ray (default: the runs that fit a node divide its CPUs)"
    add("--cpus-per-run", type=int, metavar="N", help=cpus)
    add_engine(parser)
    add("--project", metavar="NAME", help="W&B project; the runs form one group in it")
    complete(parser)
    parsed = parser.parse_intermixed_args(argv)
    take_config(parser, parsed, parsed.axes)
    parsed.cfg = path_argument(parsed.cfg)
    if not parsed.axes and not parsed.variant:  # KEY=VALUES after --opts would be taken for overrides
        raise UserError("nothing to vary; give KEY=VALUE,VALUE (train.lr=1e-3,3e-3) before --opts, or --variant")
    return parsed


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from configs.load import load_config
    from pipelines.open import load_dataset
    from tools.runs.engine.cluster_runs import sharing
    from tools.runs.sweep_points import build_points
    from tools.runs.sweep_report import Sweep
    from tools.runs.sweep_runner import lock_folder

    base = load_config(arguments.cfg, arguments.opts, **{"log.wandb.project": arguments.project})
    folder = arguments.out or Path(base.output) / f"{base.name}-sweep"
    replacements = {"output": str(folder)}
    if base.log.wandb.project is not None:
        replacements |= {"log.wandb.project": base.log.wandb.project, "log.wandb.group": folder.name}
    points = build_points(
        arguments.cfg,
        arguments.axes,
        arguments.variant,
        fixed=arguments.opts,
        draws=arguments.random,
        seed=arguments.seed,
        **replacements,
    )
    data = {point.config.data.path for point in points}
    for path, classes in {(point.config.data.path, point.config.data.classes) for point in points}:
        load_dataset(path, classes)  # fails once here instead of in every run
    processes = ["--nproc", str(arguments.gpus_per_run)] if arguments.gpus_per_run > 1 else []
    command = ["zhu", "train", *processes, str(arguments.cfg)]
    with open_cluster(arguments) as cluster:
        slots, make_engine = plan_runs(arguments, cluster, len(points))
        sweep = Sweep(tables.make_folder(folder), points, arguments.gpus_per_run, command, arguments.opts)
        with lock_folder(folder) as lock, sharing(cluster, folder, data):
            run_and_report(sweep, slots, make_engine(lock))
    return 1 if sweep.errors else 0


def plan_runs(
    arguments: argparse.Namespace, cluster: Cluster | None, runs: int
) -> tuple[list[RunSlot], Callable[[int], Engine]]:
    """Return the slots of the runs, and a function that makes their engine from the lock of the folder.

    Raises:
        UserError: A number in the arguments is invalid, or not enough GPUs or CPUs exist.
    """
    from tools.runs.engine.cluster_runs import ClusterRuns
    from tools.runs.engine.local_runs import LocalRuns
    from tools.runs.run_slots import make_cluster_slot, make_slots, visible_gpus

    gpus_per_run, cpus_per_run, parallel = arguments.gpus_per_run, arguments.cpus_per_run, arguments.parallel
    if cluster is None:
        if cpus_per_run is not None:
            raise UserError(f"--cpus-per-run {cpus_per_run} belongs to --engine ray; add it, or use --parallel")
        return make_slots(visible_gpus(), gpus_per_run, parallel), LocalRuns
    slot, cpus, gpus = make_cluster_slot(cluster.nodes(), gpus_per_run, cpus_per_run, parallel)
    return [slot] * (parallel or runs), lambda _: ClusterRuns(cluster, cpus, gpus)


def run_and_report(sweep: Sweep, slots: Sequence[RunSlot], engine: Engine) -> None:
    """Train the points without a finished run, and report, also when interrupted."""
    from tools.runs import sweep_report
    from tools.runs.sweep_runner import is_finished

    waiting = [point for point in sweep.points if not is_finished(point)]
    before = len(sweep.points) - len(waiting)
    print(f"{counted(len(sweep.points), 'run')} in {sweep.folder}, {before} of them finished before", flush=True)
    if replaced := sweep_report.runs_of_another_sweep(sweep):
        others = "; ".join(replaced[:3]) + " …" * (len(replaced) > 3)
        print(
            f"note: {sweep.folder} contains another sweep ({others}); its runs are kept, its tables and plots are "
            "replaced; use --out FOLDER to keep both",
            flush=True,
        )
    try:
        run(sweep, waiting, slots, engine)
    finally:
        sweep_report.write_report(sweep)
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            print(f"to resume, run the same command again: {shlex.join(['zhu', 'sweep', *sys.argv[1:]])}")


def run(sweep: Sweep, waiting: Sequence[Point], slots: Sequence[RunSlot], engine: Engine) -> None:
    """Train each point (combination of settings) in `waiting`.

    The tables are rewritten after each run, so that a killed sweep keeps its results.

    Args:
        sweep: The sweep. Errors of failed runs are added to `sweep.errors`.
        waiting: The points without a finished run.
        slots: One slot per concurrent run.
        engine: Trains the runs.
    """
    from tqdm import tqdm

    from tools.runs import sweep_report
    from tools.runs.sweep_runner import log_path, run_points

    tqdm.monitor_interval = 0  # disables tqdm's thread: processes must be started from a single-threaded program
    before = len(sweep.points) - len(waiting)
    with (
        progress_bar(total=len(sweep.points), initial=before, unit="run", desc="sweep") as bar,
        closing(run_points(waiting, slots, engine)) as outcomes,
    ):
        for outcome in outcomes:
            point = outcome.point
            if outcome.error is not None:
                sweep.errors[point.name] = outcome.error
            rows = sweep_report.write_tables(sweep)
            accuracy = rows[sweep.points.index(point)]["best_val_top1"]
            if outcome.error is not None:
                what = f"failed, {outcome.error} (full log: {log_path(point)})"
            else:
                what = "no accuracy recorded" if accuracy is None else f"best val top1 {accuracy:.4f}"
            with above_bars():
                print(fold(f"{point.name}: {what}, {duration(outcome.time_s)}", sys.stdout), flush=True)
            if (best := sweep_report.best_row(rows)) is not None:
                bar.set_postfix_str(f"best {rows[best]['best_val_top1']:.4f} {sweep.points[best].name}", refresh=False)
            bar.update()


if __name__ == "__main__":
    run_main(main)
