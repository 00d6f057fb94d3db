"""Train an image classifier: torchrun --nproc_per_node=N train/ddp.py --cfg configs/FILE.yaml"""

from __future__ import annotations

import argparse
import sys
import time

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from configs.utils.files import path_text
from pipelines.interfaces import Position
from train.build import Job
from train.checkpoint.compatibility import check_same_run, stream_info
from train.checkpoint.progress import RunInfo, dataset_entry
from train.checkpoint.run_dir import RunDir
from train.checkpoint.writer import CheckpointWriter
from train.distributed import collectives
from train.distributed.launcher import run_distributed
from train.distributed.process_group import Ranks, process_group
from train.distributed.signals import Preempted, catch_signals
from train.engine.cpu_settings import limit_threads
from train.engine.epoch import build_timeline
from train.engine.warm_up import check_image_sizes
from train.engine.whitening import whiten, whitening_images
from train.evaluation import print_evaluation
from train.optim.averaging import uses_ema
from train.report import log_results, log_start, open_log, prepare
from train.throughput import print_throughput
from train.trainer import Trainer, restore_run


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file, configs/….yaml")
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the file: train.epochs=5 or train.epochs 5",
    )
    parser.add_argument("--batch-size", type=int, help="data.batch_size, per rank")
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--output", help="folder of all runs; this one goes to OUTPUT/NAME")
    parser.add_argument(
        "--resume", type=path_text, metavar="auto|PATH", help="the latest run of this name, a checkpoint or its folder"
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the checkpoint to resume from, also the homework's ckpt_best.pth; do not train",
    )
    parser.add_argument("--throughput", action="store_true", help="print training images/s of this config and stop")
    return parser.parse_args(arguments)


def main() -> int:
    """Train, evaluate or measure throughput, depending on the arguments and the config, and return the exit status."""
    arguments = parse_arguments(sys.argv[1:])
    overrides = {
        "data.batch_size": arguments.batch_size,
        "data.path": arguments.data_path,
        "output": arguments.output,
    }
    config = load_config(arguments.cfg, arguments.opts, **overrides)
    resume = config.resume if arguments.resume is None else arguments.resume
    evaluates_only = arguments.eval or config.eval.only
    if evaluates_only and resume is None:
        flag_name = "--eval" if arguments.eval else "eval.only"
        raise UserError(f"{flag_name} needs a checkpoint; give --resume PATH or --resume auto")
    job = Job.load(config, Ranks.from_environment(), trains=not evaluates_only)  # refuses what it can without a GPU
    with process_group(job.ranks) as device:
        job = job.on(device)
        if evaluates_only:
            print_evaluation(job, resume)
        elif arguments.throughput:
            print_throughput(job)
        else:
            return train(job, resume)
    return 0


def train(job: Job, resume: str | None) -> int:
    """Train a new run, or resume one from its newest checkpoint, and return the exit status."""
    config, val_loader = job.config, job.val_loader()
    with RunDir(config, resume) as run_dir:  # found and locked, with an interrupted save completed
        newest = run_dir.load_newest()  # None for a new run
        stream = stream_info(config, job.dataset, job.passes)
        if newest is None or "threads" not in newest.checkpoint:
            limit_threads(job.device)  # otherwise `restore_run` sets the number of threads
        if newest is not None:
            check_same_run(newest.checkpoint, config, stream, newest.path)

        state = job.build_state(val_loader.image_size, pretrained=newest is None)
        train_loader = job.train_loader()
        check_image_sizes(state, train_loader, val_loader.image_size)
        uses_ema(state.ema, config.eval.weights)  # refuses eval.weights=ema without an average
        timeline = build_timeline(state.config, train_loader)
        run = RunInfo(stream, to_yaml(config), dataset_entry(job.dataset, val_loader.image_size))
        if newest is None:
            position = train_loader.position = Position(config.train.first_epoch)
            run.clock.add(whiten(state, whitening_images(state, config.data)))  # speedrun models; counts as training
        else:
            position = restore_run(state, train_loader, timeline, run, newest)  # also moves the loader
        source = None if newest is None else newest.path
        newest = None  # frees the weights that were loaded to host memory

        folder = run_dir.create()  # or the folder that was found
        with open_log(job, folder) as log, CheckpointWriter(folder, state, run) as checkpoints:
            trainer = Trainer(job, state, train_loader, val_loader, timeline, run, log, checkpoints)
            facts = log_start(trainer, position, source, run_dir.resume)
            if position.epoch >= config.train.epochs:
                log.info(f"nothing to do: the run in {folder} has finished its {config.train.epochs} epochs")
                return 0
            prepare(trainer, position, facts)  # starts the trackers; compiles and captures the step
            start_s = time.monotonic()
            try:
                with catch_signals() as trainer.signals:
                    while position.epoch < config.train.epochs:
                        position = trainer.run_epoch(position)  # trains, evaluates, saves; rewinds if the loss is nan
                    collectives.from_first_rank(checkpoints.wait)
            except Preempted as preempted:  # a checkpoint has been written
                log.fast_shutdown = True  # the scheduler may kill the process soon
                return preempted.exit_code
            log_results(trainer, time.monotonic() - start_s)
    return 0


if __name__ == "__main__":
    run_distributed(main)
