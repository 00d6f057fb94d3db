"""Measure the time of a training step by phase, and the share of the device's peak arithmetic rate that it reaches.

    python tools/benchmark.py profile --cfg configs/cifar10_lenet.yaml --steps 20
    torchrun --nproc_per_node=2 tools/benchmark.py profile --cfg configs/cifar10_resnet18.yaml

Phases: data (waiting for a batch), proxy (sample selection by train.proxy, if set), forward, backward, reduce (the part
of the all-reduce that does not overlap with backward), optimizer (with clipping, clearing gradients and averages), host
(everything else while the device is idle or, on the CPU, between the phases). They add up to the wall time of the step.
They are device times on a GPU and host times on the CPU. Under torchrun, rank 0 is profiled.

A captured step (CUDA graph) has no phases. It is profiled without capture, and the time of the captured step is
reported separately. Model FLOPs utilization is the arithmetic rate of forward and backward, with 2 FLOPs per
multiply-add, divided by the rate that a large matrix multiplication reaches on this machine. trace.json.gz can be
opened in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from configs.load import load_config
from configs.schema import Config
from configs.stages import config_at
from configs.utils.errors import UserError
from configs.utils.files import path_argument, path_text
from pipelines.loader.loader import Loader
from tools.common.tables import make_folder
from tools.perf.step_report import TRACE, flops_utilization, profile_content, write_results
from tools.perf.step_trace import profile_steps, run_alongside
from train.build import Job
from train.distributed import collectives
from train.distributed.process_group import Ranks, process_group
from train.engine.execution import build_plan
from train.engine.state import TrainState
from train.throughput import measure_images_per_s

WARM_STEPS = 3


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--cfg", type=path_text, required=True, metavar="FILE", help="config file, configs/….yaml")
    add("--data-path", type=path_text, help="data.path, the converted data set")
    add("--batch-size", type=int, help="data.batch_size, per rank")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--steps", type=int, default=20, help="number of profiled steps (default %(default)s)")
    add("--seconds", type=float, default=3.0, help="length of unprofiled training (default %(default)s)")
    add("--out", type=path_argument, help="folder (default output/NAME-profile)")


def main(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1 or not 0 < arguments.seconds < math.inf:
        raise UserError(f"--steps {arguments.steps} and --seconds {arguments.seconds} must be positive and finite")
    replacements = {"data.path": arguments.data_path, "data.batch_size": arguments.batch_size}
    config = config_at(load_config(arguments.cfg, arguments.opts, **replacements), epoch=0)
    ranks = Ranks.from_environment()
    job = Job.load(config, ranks)

    with process_group(ranks) as device:
        job = job.on(device)
        folder = arguments.out or Path("output") / f"{config.name}-profile"
        out = collectives.from_first_rank(lambda: make_folder(folder))
        captures = build_plan(config.train, device).uses_cuda_graph
        state, loader = build_training(replace(job, config=without_graph(config)))
        amp, image_size = state.plan.amp, loader.image_size
        rates = {"uncaptured": measure_rate(state, loader, ranks, arguments.seconds)}
        profile = None
        if ranks.is_first:
            hidden = out / f".{TRACE}"  # the profiler compresses files with this ending
            try:
                profile = profile_steps(state, loader, arguments.steps, hidden)
                hidden.rename(out / TRACE)
            finally:
                hidden.unlink(missing_ok=True)
        else:
            run_alongside(state, loader, arguments.steps)
        del state, loader
        if captures:
            state, loader = build_training(job)
            rates["captured"] = measure_rate(state, loader, ranks, arguments.seconds)
            del state, loader
    if profile is not None:
        utilization = None
        if not config.train.proxy.model:
            rate = rates.get("captured", rates["uncaptured"]) / ranks.world_size
            utilization = flops_utilization(config, len(job.dataset.classes), image_size, device.type, amp, rate)
        write_results(profile_content(config, ranks, amp, profile, rates, utilization), out)
    return 0


def without_graph(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": "off"})})


def build_training(job: Job) -> tuple[TrainState, Loader]:
    """Build the training state, without pretrained weights, and the loader of epoch 0.

    All ranks must call this function.
    """
    loader = job.train_loader().at(0)
    return job.build_state(loader.image_size, pretrained=False), loader


def measure_rate(state: TrainState, loader: Loader, ranks: Ranks, seconds: float) -> float:
    """Return the training rate over all ranks in images/s, measured without the profiler.

    All ranks must call this function.
    """
    return measure_images_per_s(state, loader, ranks.world_size, warmup_steps=WARM_STEPS, seconds=seconds)
