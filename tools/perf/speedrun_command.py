"""Train a config with several seeds with `tools/speedrun.py`."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version

import torch
from torch import Tensor

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from pipelines.interfaces import Position
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from tools.common.tables import write_json
from train.build import Job
from train.distributed.process_group import Ranks, process_group
from train.engine.cpu_settings import limit_threads
from train.engine.epoch import train_epoch
from train.engine.evaluate import evaluate
from train.engine.metrics import RunTimer, memory_usage
from train.engine.state import TrainState, restart_in_place
from train.engine.warm_up import check_image_sizes, warm_up
from train.engine.whitening import whiten, whitening_images
from train.optim.averaging import eval_weights
from train.reporting.run_info import device_name


@dataclass(frozen=True)
class SeedResult:
    """Result of one run. The time covers whitening, the epochs and the last evaluation."""

    seed: int
    top1: float  # 0 to 1
    time_s: float


def run(arguments: argparse.Namespace) -> None:
    """Train with several seeds as the arguments of `tools/speedrun.py` say."""
    timer = RunTimer()
    config = load_config(arguments.cfg, arguments.opts, **{"data.path": arguments.data_path})
    if config.train.schedule == "plateau":
        raise UserError(
            "train.schedule=plateau needs an evaluation after every epoch, but speedruns evaluate once; "
            "use another schedule"
        )
    ranks = Ranks.alone("tools/speedrun.py")
    job = Job.load(config, ranks)

    with process_group(ranks) as device:
        limit_threads(device)
        job = job.on(device)
        val_loader = job.val_loader()
        state = job.build_state(val_loader.image_size)
        images = whitening_images(state, config.data)
        runs: list[SeedResult] = []
        first_result_s = 0.0
        for seed in range(config.seed, config.seed + arguments.runs):
            job = replace(job, config=config.model_copy(update={"seed": seed}))
            train_loader = job.train_loader()
            if not runs:
                check_image_sizes(state, train_loader, val_loader.image_size)
                warm_up(state, train_loader, val_loader, config.eval.tta)
            restart_in_place(state, job.build_state(val_loader.image_size))
            runs.append(run_seed(job, state, images, train_loader, val_loader))
            first_result_s = first_result_s or timer.command_s
            print(f"seed {seed}: top1 {runs[-1].top1:.4f}, {runs[-1].time_s:.3f} s", flush=True)
            result = summary(config, runs, device)
            result |= {"first_result_s": first_result_s, "command_s": timer.command_s}
            if arguments.json is not None:  # after every run, so that an interruption loses at most one
                write_json(arguments.json, result)
            del train_loader  # frees resident data before the next loader is built
    print(
        f"{config.name}: top1 {result['top1_mean']:.4f} ± {result['top1_std']:.4f} over {len(runs)} runs of "
        f"{result['time_s_mean']:.3f} ± {result['time_s_std']:.3f} s on {result['device']}; "
        f"first result after {first_result_s:.1f} s, all after {result['command_s']:.1f} s"
    )


def run_seed(
    job: Job, state: TrainState, images: Tensor | None, train_loader: TrainLoader, val_loader: EvalLoader
) -> SeedResult:
    """Whiten, train from the weights of `state`, and evaluate.

    Args:
        job: Config with the seed of this run, and data set.
        state: Freshly initialized training state.
        images: Images from `whitening_images`, or None if there is no whitening layer.
        train_loader: Loader of the training split.
        val_loader: Loader of the validation split.
    """
    config, timer = job.config, RunTimer()
    timer.add(whiten(state, images))
    train_loader.position = Position(config.train.first_epoch)
    for _ in range(config.train.first_epoch, config.train.epochs):
        times = train_epoch(state, train_loader, seed=config.seed, rank=0)
        timer.add(times.time_s)
    with timer, eval_weights(state.ema, config.eval.weights):
        top1 = evaluate(state, val_loader, len(val_loader.split), config.eval.tta).top1
    return SeedResult(job.config.seed, top1, timer.training_s)


def summary(config: Config, runs: list[SeedResult], device: torch.device) -> dict[str, object]:
    """Return the runs, the mean and standard deviation of top1 and time_s, memory, device, versions and date.

    The standard deviation of a single run is 0.
    """
    figures: dict[str, object] = {"name": config.name, "runs": [asdict(run) for run in runs]}
    for name in ("top1", "time_s"):
        values = [getattr(run, name) for run in runs]
        figures[f"{name}_mean"] = statistics.fmean(values)
        figures[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return figures | {
        **memory_usage(device),
        "device": device_name(device),
        "torch": torch.__version__,
        "dali": version("nvidia-dali-cuda120"),
        "date": date.today().isoformat(),
    }
