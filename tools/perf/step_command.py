"""Measure the time of a training step by phase: `tools/benchmark.py profile`."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path

from configs.load import load_config
from configs.stages import config_at
from configs.utils.errors import UserError
from pipelines.loader.train_loader import TrainLoader
from tools.benchmarks.engine import results
from tools.common.tables import make_folder, markdown, write_csv, write_json
from tools.perf import plots
from tools.perf.step_report import StepReport, flops_utilization
from tools.perf.step_trace import StepProfile, profile_steps, run_alongside
from train.build import Job
from train.distributed import collectives
from train.distributed.process_group import Ranks, process_group
from train.engine.execution import build_plan
from train.engine.state import TrainState
from train.reporting.figures import save
from train.throughput import measure_images_per_s

WARM_STEPS = 3
TRACE = "trace.json.gz"


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1 or not 0 < arguments.seconds < math.inf:
        raise UserError(f"--steps {arguments.steps} and --seconds {arguments.seconds} must be positive and finite")
    replacements = {"data.path": arguments.data_path, "data.batch_size": arguments.batch_size}
    config = config_at(load_config(arguments.cfg, arguments.opts, **replacements), epoch=0)
    ranks = Ranks.from_environment()
    job = Job.load(config, ranks)

    with process_group(ranks) as device:
        job, plan = job.on(device), build_plan(config.train, device)
        folder = arguments.out or Path("output") / f"{config.name}-profile"
        out = collectives.from_first_rank(lambda: make_folder(folder))
        image_size, rate, profile = profile_uncaptured(job, arguments.steps, arguments.seconds, out / TRACE)
        rates = {"uncaptured": rate}
        if plan.uses_cuda_graph:
            rates["captured"] = measure_rate(*build_training(job), ranks, arguments.seconds)
    if profile is not None:
        utilization = None
        if not config.train.proxy.model:
            rate = rates.get("captured", rates["uncaptured"]) / ranks.world_size
            utilization = flops_utilization(config, len(job.dataset.classes), image_size, device.type, plan.amp, rate)
        environment = results.environment()
        report = StepReport(config, ranks.world_size, plan.amp, environment, profile, rates, utilization)
        write_results(report, out)
    return 0


def profile_uncaptured(job: Job, steps: int, seconds: float, trace: Path) -> tuple[int, float, StepProfile | None]:
    """Measure training without CUDA graphs, and profile it on rank 0. All ranks must call this function.

    Returns:
        A tuple (image_size, images_per_s, profile). The rate is over all ranks, and the profile is None on other ranks.
    """
    train = job.config.train.model_copy(update={"cuda_graph": "off"})
    state, loader = build_training(replace(job, config=job.config.model_copy(update={"train": train})))
    rate = measure_rate(state, loader, job.ranks, seconds)
    profile = None
    if job.ranks.is_first:
        hidden = trace.with_name(f".{trace.name}")  # the profiler compresses files with this ending
        try:
            profile = profile_steps(state, loader, steps, hidden)
            hidden.rename(trace)
        finally:
            hidden.unlink(missing_ok=True)
    else:
        run_alongside(state, loader, steps)
    return loader.image_size, rate, profile


def build_training(job: Job) -> tuple[TrainState, TrainLoader]:
    """Build the training state, without pretrained weights, and the loader of epoch 0.

    All ranks must call this function.
    """
    loader = job.train_loader().single_stage()
    return job.build_state(loader.image_size, pretrained=False), loader


def measure_rate(state: TrainState, loader: TrainLoader, ranks: Ranks, seconds: float) -> float:
    """Return the training rate over all ranks in images/s, measured without the profiler.

    All ranks must call this function.
    """
    return measure_images_per_s(state, loader, ranks.world_size, warmup_steps=WARM_STEPS, seconds=seconds)


def write_results(report: StepReport, out: Path) -> None:
    """Write profile.json, profile.csv and profile.png, and print the tables and the summary."""
    write_csv(out / "profile.csv", [asdict(phase) for phase in report.profile.phases])
    write_json(out / "profile.json", report.content(), indent=1, ensure_ascii=False)
    save(plots.plot_profile(report), out / "profile.png")
    tables = markdown(report.phase_rows()), markdown(report.operator_rows())
    print("\n\n".join([*tables, "\n".join(report.summary_lines())]))
    print(f"wrote {', '.join(str(out / name) for name in ('profile.json', 'profile.csv', 'profile.png', TRACE))}")
