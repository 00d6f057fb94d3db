"""Train a config with several seeds in one process, and report accuracy and time as speedruns do.

    python tools/speedrun.py --cfg configs/cifar10_speedrun_94.yaml --runs 10 --json result.json

The steps are compiled once, before the first run. The `time_s` of a run covers the same work as in airbench: whitening,
the epochs, and the evaluation after the last one. `first_result_s` is the time from the start of the command to the
first result: start-up, loading, compilation, training and evaluation.

To compare with https://github.com/KellerJordan/cifar10-airbench, run it right before or after on the same GPU:
`python airbench94_muon.py`, `python legacy/airbench95.py` and `python airbench96_faster.py` print the time of each run
in the last column and the mean accuracy at the end. Each file sets its number of runs near its end. To use the same
pixels, save this project's arrays as cifar10/train.pt and cifar10/test.pt: dictionaries of `images` (uint8
[N, 32, 32, 3]), `labels` (int64 [N]) and `classes`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version

import torch
from torch import Tensor

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument
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


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file, configs/….yaml")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--runs", type=int, default=10, help="number of seeds, starting at the config's (default 10)")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the result to this file")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class SeedResult:
    """Result of one run. The time covers whitening, the epochs and the last evaluation."""

    seed: int
    top1: float  # 0 to 1
    time_s: float


def main() -> None:
    timer = RunTimer()
    arguments = parse_arguments(sys.argv[1:])
    config = load_config(arguments.cfg, arguments.opts, **{"data.path": arguments.data_path})
    if arguments.runs < 1:
        raise UserError(f"--runs={arguments.runs} must be at least 1")
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
            runs.append(run(job, state, images, train_loader, val_loader))
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


def run(
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


if __name__ == "__main__":
    run_main(main)
