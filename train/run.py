"""Run a config: train, evaluate a checkpoint or measure throughput."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from configs.load import to_yaml
from configs.schema import Config
from pipelines.interfaces import Position
from train.build import Job
from train.checkpoint.code import code_entries, find_code
from train.checkpoint.compatibility import check_same_run, stream_info
from train.checkpoint.progress import RunInfo, dataset_entry
from train.checkpoint.run_dir import RunDir
from train.checkpoint.writer import CheckpointWriter
from train.dev_run import fast_dev_run
from train.distributed import collectives
from train.distributed.process_group import Ranks, process_group
from train.distributed.signals import Preempted, catch_signals
from train.engine.cpu_settings import limit_threads
from train.engine.epoch import build_timeline
from train.engine.metrics import RunTimer
from train.engine.warm_up import check_image_sizes
from train.engine.whitening import whiten, whitening_images
from train.evaluation import print_evaluation
from train.optim.averaging import uses_ema
from train.report import RunEnd, log_results, log_start, open_log, prepare
from train.throughput import print_throughput
from train.trainer import Trainer, restore_run


def run(
    config: Config, resume: str | None, *, extend: bool, evaluates_only: bool, throughput: bool, tries_out: bool
) -> int:
    """Train, evaluate or measure throughput, and return the exit status.

    Args:
        config: The config.
        resume: Checkpoint, run folder or "auto", or None for a new run.
        extend: Allow more epochs than the checkpoint's run had.
        evaluates_only: Evaluate the checkpoint, which must be given, and do not train.
        throughput: Measure images/s, and do not train.
        tries_out: Train a few steps in a temporary folder.
    """
    job = Job.load(config, Ranks.from_environment(), trains=not evaluates_only)  # refuses what it can without a GPU
    with process_group(job.ranks) as device:
        job = job.on(device)
        if evaluates_only:
            print_evaluation(job, resume)
        elif throughput:
            print_throughput(job)
        elif tries_out:
            return fast_dev_run(job, partial(train, is_kept=False))
        else:
            return train(job, resume, extend=extend).exit_code
    return 0


def train(
    job: Job, resume: str | None, *, extend: bool = False, is_kept: bool = True, start_s: float | None = None
) -> RunEnd:
    """Train a new run, or resume one from its newest checkpoint.

    Args:
        job: The job, on its device.
        resume: Checkpoint, run folder or "auto", or None for a new run.
        extend: Allow more epochs than the checkpoint's run had.
        is_kept: Whether the run folder stays.
        start_s: When the command started, see `RunTimer`.
    """
    config, val_loader = job.config, job.val_loader()
    before = config  # of the checkpoint
    with RunDir(config, resume) as run_dir:  # found and locked, with an interrupted save completed
        newest = run_dir.load_newest()  # None for a new run
        stream = stream_info(config, job.dataset, job.passes)
        if newest is None or "threads" not in newest.checkpoint:
            limit_threads(job.device)  # otherwise `restore_run` sets the number of threads
        if newest is not None:
            before = check_same_run(newest.checkpoint, config, stream, newest.path, extend=extend)
            job = replace(job, config=find_code(config, newest.checkpoint, newest.path))

        compilation = job.compilation(None if newest is None else newest.checkpoint.get("compiled", False))
        state = job.build_state(
            val_loader.image_size,
            pretrained=newest is None,
            compiles_on_cpu=compilation is not None and compilation.is_on,
        )
        train_loader = job.train_loader()
        check_image_sizes(state, train_loader, val_loader.image_size)
        uses_ema(state.ema, config.eval.weights)  # refuses eval.weights=ema without an average
        timeline = build_timeline(state.config, train_loader)
        run = RunInfo(
            stream, to_yaml(config), dataset_entry(job.dataset, val_loader.image_size), clock=RunTimer(start_s)
        )
        run.code = code_entries(job.config)
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
            facts = log_start(trainer, position, source, run_dir.resume, compilation)
            if (reason := trainer.end_reason(position)) is not None:
                log.info(f"nothing to do: the run in {folder} has ended: {reason}")
                return RunEnd(folder)
            if before.train.epochs != config.train.epochs:
                trainer.extend(position, before.train)
            prepare(trainer, position, facts)  # starts the trackers; compiles and captures the step
            try:
                with catch_signals() as trainer.signals:
                    while trainer.end_reason(position) is None:
                        position = trainer.run_epoch(position)  # trains, evaluates, saves; rewinds if the loss is nan
                    collectives.from_first_rank(checkpoints.wait)
            except Preempted as preempted:  # a checkpoint has been written
                log.fast_shutdown = True  # the scheduler may kill the process soon
                return RunEnd(folder, preempted.exit_code)
            log_results(trainer, position, is_kept=is_kept)
    return RunEnd(folder)
