"""The training loop over epochs: logging, evaluation, checkpoints, stopping on a signal, and rewinding.

`done` is the number of optimizer steps of the run so far. Before a checkpoint is saved, each rank checks that the data
files are unchanged and only then joins the reduction of the metric sums. Therefore, no checkpoint contains a state that
was trained on changed files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.schema import Config
from configs.utils.errors import UserError
from pipelines.interfaces import Position
from pipelines.loader.loader import Loader
from pipelines.loader.train_loader import TrainLoader
from train.checkpoint.restore import restore_state
from train.checkpoint.run_dir import latest_checkpoints
from train.checkpoint.store import BEST, LAST, load_newest_on_all_ranks
from train.checkpoint.writer import CheckpointWriter
from train.distributed import collectives
from train.distributed.consensus import StopConsensus
from train.distributed.process_group import Ranks, is_first_rank
from train.distributed.signals import PendingSignal, Preempted
from train.engine.epoch import train_epoch
from train.engine.evaluate import EvaluationInterrupted, evaluate
from train.engine.metrics import RunTimer, ThroughputMeter, memory_usage
from train.engine.state import TrainState
from train.optim.averaging import uses_ema
from train.optim.nonfinite import FiniteCheck, NonFiniteError
from train.optim.schedule import Timeline, learning_rate, update_plateau
from train.reporting.bad_samples import report_bad_samples
from train.reporting.run_log import RunLog

RESULTS = ("loss", "top1", "top5")  # results of an evaluation, as suffixes of metric names
MAX_REWINDS = 5  # per run; more failures are not due to chance
MAX_SKIPPED_STEPS = 10  # consecutive steps


@dataclass
class Trainer:
    """The parts of a run, assembled by train/ddp.py."""

    config: Config
    state: TrainState
    train_loader: TrainLoader
    val_loader: Loader
    val_samples: int
    timeline: Timeline
    progress: dict[str, Any]  # best_top1, plateau, passed_over, left_out; updated here
    saving: CheckpointWriter
    log: RunLog
    ranks: Ranks
    clock: RunTimer
    prepare: Callable[[], object]  # compiles and captures the step again after a restore


def fit(trainer: Trainer, position: dict[str, int], pending: PendingSignal) -> None:
    """Train from `position` to the end of the last epoch, with evaluations, logs and checkpoints.

    All ranks must call this function.

    Args:
        trainer: Parts of the run.
        position: Epoch to start in, and number of optimizer steps already done in this epoch.
        pending: Signal that this process has received, if any.

    Raises:
        Preempted: A signal asked to stop. The state is saved in a checkpoint.
        RuntimeError: An evaluation did not count every sample exactly once.
        UserError: The loss, gradients, weights or optimizer state are not finite and the run cannot continue; the data
            cannot be read or have changed; or a checkpoint or metrics.jsonl cannot be read or written.
    """
    config, loader = trainer.config.train, trainer.train_loader
    is_due = trainer.saving.is_due if config.save_every_steps is None else lambda: False
    finite_check, consensus = FiniteCheck(trainer.state), StopConsensus(lambda: pending.number, is_due)
    epoch, step = position["epoch"], position["step"]
    if config.on_nonfinite == "rewind" and not trainer.saving.has_own_checkpoint:
        done = trainer.timeline.first_step(epoch) + step
        trainer.saving.save((LAST,), position, finite_check.sums(done), done)
    stage = None
    while epoch < config.epochs:
        if len(loader.stages) > 1 and loader.at(epoch) is not stage:
            stage = loader.at(epoch)
            trainer.log.info(
                f"epoch {epoch}: images of {stage.image_size} x {stage.image_size} pixels, "
                f"{trainer.timeline.steps[epoch]} steps at global batch {_global_batch(trainer, epoch)}"
            )
        done = trainer.timeline.first_step(epoch) + step
        finite_check.start(done)
        consensus.reset(done)
        try:
            _train_epoch(trainer, epoch, step, finite_check, consensus)
            _finish_epoch(trainer, epoch, pending, finite_check, consensus)
        except NonFiniteError as found:
            epoch, step = _rewind(trainer, found)
        else:
            epoch, step = epoch + 1, 0
    collectives.from_first_rank(trainer.saving.wait)


def _train_epoch(trainer: Trainer, epoch: int, step: int, finite_check: FiniteCheck, consensus: StopConsensus) -> None:
    """Train the rest of an epoch after its first `step` optimizer steps."""
    config, state, loader = trainer.config, trainer.state, trainer.train_loader
    timeline, log = trainer.timeline, trainer.log
    first, steps, save_every = timeline.first_step(epoch), timeline.steps[epoch], config.train.save_every_steps
    bar = tqdm(
        total=steps,
        initial=step,
        desc=f"epoch {epoch + 1}/{config.train.epochs}",
        unit="step",
        leave=False,
        disable=log.is_disabled or not sys.stderr.isatty(),
        file=sys.stderr,
    )
    meter = ThroughputMeter(loader)
    loss, _, seen = finite_check.sums(first + step).tolist() if step else (0.0, 0.0, 0.0)
    meter.start(first + step, loss, seen, images_per_step=_global_batch(trainer, epoch))

    def after_step(step: int, lr: float) -> None:
        bar.update()
        done = step + 1
        trainer.saving.check()
        signal, saves = consensus.poll(done)
        saves = saves or signal != 0 or (save_every is not None and done % save_every == 0)
        logs = done % config.log.every_steps == 0
        if not (saves or logs):
            return
        if saves:
            loader.check_unchanged()
        sums = finite_check.sums(done)  # synchronizes, but only to log or save
        if logs:
            loss, _, seen = sums.tolist()
            measured = {**meter.read(done, loss, seen), "lr": lr, **memory_usage(state.device)}
            bar.set_postfix(loss=f"{measured['step_loss']:.3f}", lr=f"{lr:.2g}")
            log.log_step(measured, done)
            _report_skipped(trainer, finite_check, done)
        if saves:
            trainer.clock.count(done)
            trainer.saving.save((LAST,), {"epoch": epoch, "step": done - first}, sums, done)
        if signal:
            _stop(trainer, signal, done)

    if step == steps:  # the run was stopped during the evaluation
        return
    skipped = trainer.progress.get("passed_over", [])  # first and last steps, counted from 1
    skip_steps = {step for first_step, last_step in skipped for step in range(first_step - 1, last_step)}
    trainer.clock.start_epoch(first + step, loader, images_per_step=_global_batch(trainer, epoch))
    with bar:
        train_epoch(
            state,
            loader,
            seed=config.seed,
            rank=trainer.ranks.rank,
            after_step=after_step,
            timeline=timeline,
            decays=_decays(trainer),
            skip_steps=skip_steps,
        )
    trainer.clock.count(first + steps)


def _global_batch(trainer: Trainer, epoch: int) -> int:
    """Return the global batch size in `epoch`: images per optimizer step over all ranks."""
    batch_size = trainer.train_loader.at(epoch).plan.batch_size
    return batch_size * trainer.ranks.world_size * trainer.config.train.accumulation_steps


def _decays(trainer: Trainer) -> int:
    """Return the number of decays of the plateau schedule so far."""
    return int(trainer.progress.get("plateau", {}).get("decays", 0))


def _finish_epoch(
    trainer: Trainer, epoch: int, pending: PendingSignal, finite_check: FiniteCheck, consensus: StopConsensus
) -> None:
    """Evaluate every train.eval_every_epochs epochs, log the metrics of the epoch, and save checkpoints.

    best.pt is saved if the top-1 accuracy has improved, and last.pt is saved every train.save_every_epochs epochs. The
    last epoch is always evaluated and saved.

    Raises:
        Preempted: A signal interrupted the evaluation. The state is saved in a checkpoint.
    """
    config, state, progress = trainer.config, trainer.state, trainer.progress
    done, is_last = trainer.timeline.first_step(epoch + 1), epoch + 1 == config.train.epochs
    trainer.train_loader.check_unchanged()
    sums = finite_check.sums(done)
    loss, correct, seen = sums.tolist()
    _report_skipped(trainer, finite_check, done)
    weights = ("",) if state.ema is None else ("", "ema_")
    metrics = {
        "epoch": epoch,
        "step": done,
        "train_loss": loss / seen if seen else nan,
        "train_top1": correct / seen if seen else nan,
        **dict.fromkeys(f"{which}val_{result}" for which in weights for result in RESULTS),
        "lr": learning_rate(done - 1, trainer.timeline, state.config, _decays(trainer)),
        **trainer.clock.rates(),
        **memory_usage(state.device),
    }
    improved = False
    if is_last or (epoch + 1) % config.train.eval_every_epochs == 0:
        try:
            with trainer.clock if is_last else nullcontext():
                results, top1 = _validate(trainer, pending)
        except EvaluationInterrupted:
            trainer.saving.save((LAST,), {"epoch": epoch, "step": trainer.timeline.steps[epoch]}, sums, done)
            _stop(trainer, consensus.poll_now(), done)
        metrics |= results
        improved = top1 > progress["best_top1"]
        progress["best_top1"] = max(progress["best_top1"], top1)
    if config.train.schedule == "plateau":
        progress["plateau"] = update_plateau(progress.get("plateau", {}), metrics, config.train.schedule_options)
    trainer.log.log_epoch(metrics)
    if (report := report_bad_samples(trainer.train_loader)) is not None:
        trainer.log.info(report)
    state.sums.zero_()
    trainer.clock.end_epoch()
    names = (BEST,) if improved else ()
    if is_last or (epoch + 1) % config.train.save_every_epochs == 0:
        names = (*names, LAST)
    if names:
        trainer.saving.save(names, {"epoch": epoch + 1, "step": 0}, torch.zeros_like(sums), done)


def _validate(trainer: Trainer, pending: PendingSignal) -> tuple[dict[str, float], float]:
    """Evaluate the weights and, if there is one, the moving average.

    Returns:
        The metrics by name, and the top-1 accuracy of the weights selected by eval.weights.
    """
    state, tta = trainer.state, trainer.config.eval.tta
    what = trainer.val_loader, trainer.val_samples, tta, lambda: pending.number != 0
    evaluations = {"": evaluate(state, *what)}
    if state.ema is not None:
        with state.ema.swapped_in():
            evaluations["ema_"] = evaluate(state, *what)
    results = {f"{which}val_{result}": getattr(one, result) for which, one in evaluations.items() for result in RESULTS}
    return results, evaluations["ema_" if uses_ema(state.ema, trainer.config.eval.weights) else ""].top1


def _stop(trainer: Trainer, signal: int, done: int) -> None:
    """Wait until the checkpoint is written, log the stop, and raise Preempted."""
    collectives.from_first_rank(trainer.saving.wait)
    stopped = Preempted(signal)
    trainer.log.info(
        f"{stopped} after step {done} of {trainer.timeline.total}, saved in {trainer.saving.folder / LAST}; "
        "continue with --resume auto"
    )
    raise stopped


def _report_skipped(trainer: Trainer, finite_check: FiniteCheck, done: int) -> None:
    """Count and log the optimizer steps skipped by train.on_nonfinite=skip since the last report.

    Raises:
        UserError: At least MAX_SKIPPED_STEPS steps were run since the last report, and all of them were skipped.
    """
    count, since = finite_check.skipped()
    if count:
        trainer.progress["left_out"] = trainer.progress.get("left_out", 0) + count
        trainer.log.info(
            f"step {done}: {count} of the last {since} steps skipped, since their gradients were not finite"
        )
    if count == since >= MAX_SKIPPED_STEPS:
        raise UserError(
            f"the gradients of all steps from step {done - since + 1} to {done} are not finite, and "
            f"train.on_nonfinite=skip skipped all of them; {_last_checkpoint(trainer)}; "
            f"lower train.lr={trainer.config.train.lr}, clip gradients (train.clip_grad_norm), or use train.amp=off"
        )


def _last_checkpoint(trainer: Trainer) -> str:
    newest, steps = trainer.saving.newest, trainer.saving.steps
    return f"the last good checkpoint is {newest} of step {steps}" if newest else "no checkpoint had been written yet"


def _rewind(trainer: Trainer, found: NonFiniteError) -> tuple[int, int]:
    """Restore the last checkpoint, and mark the steps reported by `found` to be skipped.

    Returns:
        The epoch to continue in, and the number of optimizer steps already done in this epoch.

    Raises:
        UserError: train.on_nonfinite is not "rewind", the run has already been rewound MAX_REWINDS times, or the
            checkpoint could not be written or loaded.
    """
    train, skipped = trainer.config.train, trainer.progress.get("passed_over", [])
    collectives.from_first_rank(trainer.saving.wait)  # so that the checkpoint in the message exists
    sentence = f"{found.what} not finite in {found.steps}; {_last_checkpoint(trainer)}"
    if train.on_nonfinite != "rewind":
        advice = "continue from there with --resume auto and" if trainer.saving.newest else "start again with"
        raise UserError(
            f"{sentence}; lower train.lr={train.lr}, clip gradients (train.clip_grad_norm) or use train.amp=off, or "
            f"{advice} train.on_nonfinite=rewind, which skips these steps"
        )
    if len(skipped) >= MAX_REWINDS:
        raise UserError(
            f"{sentence}, and the run has been rewound {MAX_REWINDS} times already; lower train.lr={train.lr}, clip "
            "gradients (train.clip_grad_norm) or use train.amp=off"
        )
    source, content = load_newest_on_all_ranks(latest_checkpoints(trainer.saving.folder))
    position = restore_run(trainer.state, trainer.train_loader, trainer.timeline, content, source)
    trainer.progress.clear()
    trainer.progress |= content["progress"]
    trainer.clock.restore(content)
    trainer.progress["passed_over"] = [*skipped, [found.first, found.last]]
    trainer.saving.mark_saved(source, trainer.timeline.first_step(position["epoch"]) + position["step"])
    trainer.prepare()
    trainer.log.drop_epochs_from(position["epoch"])
    trainer.log.info(
        f"{found.what} not finite in {found.steps}: rewound to {source} of step {trainer.saving.steps}; "
        f"skipping {found.steps}"
    )
    return position["epoch"], position["step"]


def restore_run(
    state: TrainState, loader: TrainLoader, timeline: Timeline, content: dict[str, Any], source: Path
) -> dict[str, int]:
    """Load a checkpoint into the training state and the loader, and return the position of the checkpoint.

    Args:
        state: Training state to load into.
        loader: Training loader to move to the position.
        timeline: Timeline of the run.
        content: Contents of the checkpoint.
        source: Path of the checkpoint, for messages.

    Returns:
        The epoch, and the number of optimizer steps done in this epoch, with the keys epoch and step.

    Raises:
        UserError: The checkpoint does not match this run, or its position does not exist in this run.
    """
    restore_state(state, content, source)
    if not is_first_rank():
        state.sums.zero_()  # the checkpoint holds the sums over all ranks
    for part in state.parts():
        if part.guard is not None:
            part.guard.start()
    position: dict[str, int] = content["position"]
    epoch, step = position["epoch"], position["step"]
    steps = (*timeline.steps, 0)
    if not (0 <= epoch < len(steps) and 0 <= step <= steps[epoch]):
        raise UserError(
            f"checkpoint {source} is at {position}, outside of {len(timeline.steps)} epochs with these numbers of "
            f"steps: {sorted(set(timeline.steps))}; use another checkpoint"
        )
    if step and step == timeline.steps[epoch]:  # only the evaluation of the epoch is left
        loader.position = Position(epoch + 1)
    else:
        loader.position = Position(epoch, step * state.config.accumulation_steps)
    return position
