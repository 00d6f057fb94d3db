"""Log the start and the results of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from math import isnan
from pathlib import Path
from typing import NamedTuple

from configs.utils.console import duration
from models.cpu.compilation import Compilation
from pipelines.interfaces import Position
from train.build import Job
from train.distributed import collectives
from train.engine.state import stop_compiling
from train.engine.warm_up import warm_up
from train.optim.averaging import eval_weights, uses_ema
from train.optim.schedule import config_warnings
from train.reporting.cost_warnings import cost_warnings
from train.reporting.run_info import Facts, collect_run_info, stage_warnings, summary_line
from train.reporting.run_log import RunLog
from train.reporting.sample_images import show_predictions, show_samples
from train.reporting.trackers import single_line
from train.trainer import Trainer

BEST_NAMES = {"top1": "accuracy", "top5": "top-5 accuracy"}  # by eval.best_by


class RunEnd(NamedTuple):
    """Where and how training ended."""

    folder: Path
    exit_code: int = 0  # 128 plus the number of the signal that stopped the run


def open_log(job: Job, folder: Path) -> RunLog:
    """Open the log of a run in its folder. Only rank 0 writes it."""
    config, ranks = job.config, job.ranks
    return RunLog(
        folder if ranks.is_first else None,
        peers_wait=ranks.world_size > 1,
        loss=config.train.loss,
        epochs=config.train.epochs,
        weights=config.eval.weights,
    )


def log_start(
    trainer: Trainer, position: Position, source: Path | None, resume: str | None, compilation: Compilation | None
) -> Facts:
    """Write config.yaml and facts.json, and log where the run starts, a summary, and warnings.

    Args:
        trainer: The trainer of the run.
        position: Position at which training starts.
        source: The checkpoint that was loaded, or None for a new run.
        resume: The value of --resume.
        compilation: Whether and why train.compile=auto compiles the step on a CPU, or None.

    Returns:
        The contents of facts.json.
    """
    job, log = trainer.job, trainer.log
    val_samples = len(trainer.val_loader.split)
    facts = collect_run_info(job.config, job.dataset, trainer.state, trainer.train_loader, val_samples, job.ranks)
    log.write_config(trainer.run.config, facts)
    if trainer.end_reason(position) is None:
        log.drop_epochs_from(position.epoch)
    if source is not None:
        trainer.checkpoints.mark_saved(source, trainer.timeline.done(position))
        log.info(f"resumed from {source} at {position}")
    elif resume is not None:
        log.info(f"starting a new run, since --resume {resume} found no checkpoint")
    log.info(summary_line(job.config, facts, job.device))
    warnings = (*stage_warnings(job.config), *config_warnings(job.config.train, trainer.timeline))
    for note in (*trainer.state.notes, *warnings):
        log.info(note)
    if job.ranks.is_first:
        shapes = [(stage.batch_images, stage.image_size) for stage in trainer.train_loader.stages]
        for warning in cost_warnings(job.config.model, trainer.state, shapes, job.ranks.local_world_size):
            log.info(f"warning: {warning}")
    if compilation is not None:
        log_to = log.info if compilation.is_on else log.detail
        log_to(f"the step is {'' if compilation.is_on else 'not '}compiled (train.compile=auto): {compilation.reason}")
    return facts


def prepare(trainer: Trainer, position: Position, facts: Facts) -> None:
    """Start the trackers, compile and capture the step, and show pictures of the training data."""
    config, log, state = trainer.config, trainer.log, trainer.state
    done = trainer.timeline.done(position)
    log.start_trackers(config.log, {**config.model_dump(mode="json"), "facts": facts}, done)
    try:
        prepared_s = warm_up(state, trainer.train_loader, trainer.val_loader, config.eval.tta)
    except RuntimeError as error:
        if not state.plan.compiles_optionally:
            raise
        log.info(f"cannot compile the step, so it is not compiled: {type(error).__name__}: {single_line(error)}")
        stop_compiling(state)
    if state.plan.needs_warmup:
        log.info(f"compiled{' and captured' if state.plan.uses_cuda_graph else ''} the step in {prepared_s:.1f} s")
    if config.log.images and done == trainer.timeline.first_step(config.train.first_epoch):
        show_samples(log, trainer.train_loader, trainer.job.dataset.classes)


def next_commands(folder: Path) -> list[str]:
    """Return the commands that a user may want next for the finished run in `folder`."""
    run = shlex.quote(str(folder))
    activate = Path(sys.prefix, "bin", "activate")
    needs_path = shutil.which("zhu") is None and activate.exists()
    return [
        *([f"source {shlex.quote(os.path.relpath(activate))}"] if needs_path else []),
        f"zhu show --checkpoint {run}",
        f"zhu predict PHOTO.jpg --checkpoint {run}",
        f"zhu compare {run} OTHER",
    ]


def log_results(trainer: Trainer, position: Position, *, is_kept: bool = True) -> None:
    """Log the best result, the times and the next commands, and show predictions. All ranks must call this function.

    Args:
        trainer: The trainer of the run.
        position: Position at which the run has ended.
        is_kept: Whether the run folder stays, so that it is named with the next commands.
    """
    config, state, log, run = trainer.config, trainer.state, trainer.log, trainer.run
    progress, clock = run.progress, run.clock
    if progress.left_out:
        log.info(f"steps skipped in total: {progress.left_out} of {trainer.timeline.total}")
    log.live.close()
    if not isnan(clock.training_s):
        log.detail(f"epochs and last evaluation {clock.training_s:.2f} s")
        log.update_summary({"training_s": clock.training_s})
    log.detail(f"whole command {clock.command_s:.2f} s")
    if (residency := trainer.train_loader.split.residency) is not None:
        log.detail(f"fetched {residency.fetched_bytes / 2**20:,.1f} MiB of {config.data.path}")
    log.update_summary({"command_s": clock.command_s})
    which = " of the moving average" if uses_ema(state.ema, config.eval.weights) else ""
    if position.epoch < config.train.epochs:
        log.info(f"stopped early: {trainer.end_reason(position)}")
    best, best_by = progress.best(config.eval.best_by) or 0.0, config.eval.best_by
    result = f"loss {best:.4f}" if best_by == "loss" else f"{BEST_NAMES[best_by]} {100 * best:.2f} %"
    if is_kept:
        log.info(
            f"best {config.data.val_split} {result}{which}, done in {duration(clock.command_s)}; "
            f"the run is in {trainer.checkpoints.folder}"
        )
    for number, command in enumerate(next_commands(trainer.checkpoints.folder) if is_kept else ()):
        log.info(f"{'next:' if number == 0 else '':<5} {command}")
    if config.log.images and collectives.from_first_rank(lambda: log.has_trackers):
        classes, step = trainer.job.dataset.classes, trainer.timeline.total
        with eval_weights(state.ema, config.eval.weights):
            show_predictions(log, state, trainer.val_loader, config, classes, step=step)
