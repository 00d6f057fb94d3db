"""The training loop of a run: steps, logs, evaluation, checkpoints, stopping on a signal, and rewinding.

`done` is the number of optimizer steps of the run so far. Before a checkpoint is saved, each rank checks that the data
files are unchanged and only then joins the reduction of the metric sums. Therefore, no checkpoint contains a state that
was trained on changed files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import nan
from typing import NoReturn

import torch
from torch import Tensor

from configs.schema import TrainConfig
from configs.utils.console import counted
from configs.utils.errors import UserError
from pipelines.interfaces import Position
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.stage import Stage
from pipelines.loader.train_loader import TrainLoader
from train.build import Job
from train.checkpoint.progress import Progress, RunInfo
from train.checkpoint.restore import restore_state
from train.checkpoint.resume import latest_checkpoints
from train.checkpoint.store import BEST, LAST, Loaded, kept_files, load_newest_on_all_ranks
from train.checkpoint.writer import CheckpointWriter
from train.distributed import collectives
from train.distributed.consensus import StopConsensus
from train.distributed.process_group import is_first_rank
from train.distributed.signals import PendingSignal, Preempted
from train.engine.epoch import build_timeline, training_steps
from train.engine.evaluate import Evaluation, EvaluationInterrupted, evaluate
from train.engine.metrics import ThroughputMeter, memory_usage
from train.engine.state import TrainState
from train.engine.warm_up import warm_up
from train.optim.averaging import uses_ema
from train.optim.nonfinite import FiniteCheck, NonFiniteError
from train.optim.schedule import Timeline, extension_note, learning_rate
from train.reporting.bad_samples import report_bad_samples
from train.reporting.metrics_file import MetricsLine
from train.reporting.run_log import RunLog

RESULTS = ("loss", "top1", "top5")  # results of an evaluation, as suffixes of metric names
MAX_REWINDS = 5  # per run; more failures are not due to chance
MAX_SKIPPED_STEPS = 10  # consecutive steps


@dataclass
class Trainer:
    """Trains a run, one epoch at a time. All ranks must call its methods together."""

    job: Job
    state: TrainState
    train_loader: TrainLoader
    val_loader: EvalLoader
    timeline: Timeline
    run: RunInfo
    log: RunLog
    checkpoints: CheckpointWriter
    signals: PendingSignal = field(default_factory=PendingSignal)  # the signal that this process has received, if any

    def __post_init__(self) -> None:
        self.config = self.job.config
        is_due = self.checkpoints.is_due if self.config.train.save_every_steps is None else lambda: False
        self.finite_check = FiniteCheck(self.state)
        self.consensus = StopConsensus(lambda: self.signals.number, is_due)
        self.meter = ThroughputMeter(self.train_loader)
        self.stage: Stage | None = None
        self.has_started = False  # whether the time to the first step was logged
        total, limit = self.timeline.total, self.config.train.max_steps
        self.end = total if limit is None else min(limit, total)  # optimizer steps after which the run ends

    def end_reason(self, position: Position) -> str | None:
        """Return why the run has ended at a position, or None if it continues. All ranks return the same."""
        train, progress, done = self.config.train, self.run.progress, self.timeline.done(position)
        if position.epoch >= train.epochs:
            return "the epoch is done" if train.epochs == 1 else f"all {train.epochs} epochs are done"
        if train.patience is not None and progress.stale_epochs >= train.patience:
            what = f"{self.config.data.val_split} {self.config.eval.best_by}"
            return f"no better {what} in {counted(progress.stale_epochs, 'epoch')} (train.patience={train.patience})"
        if done >= self.end and (position.step == 0 or progress.stopped_at == done):
            return f"{done} steps are done (train.max_steps={train.max_steps})"
        return None

    def extend(self, position: Position, before: TrainConfig) -> None:
        """Log what a run with more epochs does from its position on, and save a checkpoint with its config.

        Later resumes then need no --extend. `before` is the config section `train` of the checkpoint.
        """
        done, after = self.timeline.done(position), self.state.config
        scaled = after.model_copy(update={"epochs": before.epochs, "warmup_epochs": before.warmup_epochs})
        timelines = build_timeline(scaled, self.train_loader), self.timeline
        self.log.info(extension_note(done, timelines, (scaled, after)))
        self.finite_check.start(done)
        self.checkpoints.save((LAST,), position, self.finite_check.sums(done), done)

    def run_epoch(self, position: Position) -> Position:
        """Train the rest of an epoch with logs and checkpoints, then evaluate and save.

        Args:
            position: Epoch to train, and number of optimizer steps already done in this epoch.

        Returns:
            The start of the next epoch; the current position if train.max_steps ends the run within the epoch; or, if
            the loss or the state is not finite and train.on_nonfinite=rewind, the position of the last checkpoint,
            which has been restored.

        Raises:
            Preempted: A signal asked to stop. The state is saved in a checkpoint.
            RuntimeError: An evaluation did not count every sample exactly once.
            UserError: The loss, gradients, weights or optimizer state are not finite and the run cannot continue; the
                data cannot be read or have changed; or a checkpoint or metrics.jsonl cannot be read or written.
        """
        epoch, first = position.epoch, self.timeline.first_step(position.epoch)
        try:
            self._start_epoch(position)
            for step, lr in self._steps(position):
                done = step + 1  # optimizer steps of the run
                self.log.live.step()
                self.checkpoints.check()  # raises the error of a save in the background
                # About once a second, all ranks agree on a signal that any of them received, and on a timed save.
                signal, is_due = self.consensus.poll(done)
                saves = is_due or signal != 0 or self._is_save_step(done)
                logs = done % self.config.log.every_steps == 0
                if saves:
                    self.train_loader.check_unchanged()
                if saves or logs:
                    sums = self.finite_check.sums(done)  # of the epoch's metrics; synchronizes; finds nan
                if logs:
                    self._log_step(done, lr, sums)
                if saves:
                    self.run.clock.count(done)
                    self.checkpoints.save((LAST,), Position(epoch, done - first), sums, done)
                if signal:
                    self._stop(signal, done)  # waits for the checkpoint and raises Preempted
            return self._finish_epoch(epoch)  # evaluates, logs and saves
        except NonFiniteError as error:
            return self._rewind(error)  # at most MAX_REWINDS times in a run; the steps of the error are then skipped

    def _start_epoch(self, position: Position) -> None:
        """Log the start of a stage, make sure that a rewind has a checkpoint, and start the measurements."""
        epoch, done = position.epoch, self.timeline.done(position)
        stage = self.train_loader.at(epoch)
        global_batch = stage.plan.batch_size * self.job.passes
        images_per_step = stage.batch_images * self.job.passes
        if len(self.train_loader.stages) > 1 and stage is not self.stage:
            self.log.info(
                f"from epoch {epoch + 1}: images of {stage.image_size} x {stage.image_size} pixels, "
                f"{counted(self.timeline.steps[epoch], 'step')} at global batch {global_batch}"
            )
        self.stage = stage
        self.finite_check.start(done)
        self.consensus.reset(done)
        if self.config.train.on_nonfinite == "rewind" and not self.checkpoints.has_own_checkpoint:
            self.checkpoints.save((LAST,), position, self.finite_check.sums(done), done)
        first = self.timeline.first_step(epoch)
        self.log.live.start_epoch(epoch, position.step, self._last_step(epoch) - first, first=first, total=self.end)
        loss, _, seen = self.finite_check.sums(done).tolist() if position.step else (0.0, 0.0, 0.0)
        self.meter.start(done, loss, seen, images_per_step=images_per_step)
        self.run.clock.start_epoch(done, self.train_loader, images_per_step=images_per_step)

    def _steps(self, position: Position) -> Iterator[tuple[int, float]]:
        """Run the optimizer steps that the epoch still lacks; see `training_steps`."""
        if position.step == self.timeline.steps[position.epoch]:  # the run was stopped during the evaluation
            return
        progress = self.run.progress
        steps = training_steps(
            self.state,
            self.train_loader,
            seed=self.config.seed,
            rank=self.job.ranks.rank,
            timeline=self.timeline,
            decays=progress.plateau.decays,
            skip_steps=progress.skip_steps,
            end=self.end,
        )
        if not self.has_started:
            for first in islice(steps, 1):
                self.log.detail(f"first step after {self.run.clock.command_s:.2f} s")
                yield first
            self.has_started = True
        yield from steps
        self.run.clock.count(self._last_step(position.epoch))

    def _last_step(self, epoch: int) -> int:
        """Return the number of optimizer steps of the run at the end of an epoch, which train.max_steps may cut."""
        return min(self.end, self.timeline.first_step(epoch + 1))

    def _is_save_step(self, done: int) -> bool:
        """Return True if train.save_every_steps asks for a checkpoint after `done` steps."""
        every = self.config.train.save_every_steps
        return every is not None and done % every == 0

    def _log_step(self, done: int, lr: float, sums: Tensor) -> None:
        loss, _, seen = sums.tolist()
        measured = {**self.meter.read(done, loss, seen), "lr": lr, **memory_usage(self.state.device)}
        self.log.log_step(measured, done)
        self._report_skipped(done)

    def _finish_epoch(self, epoch: int) -> Position:
        """Evaluate every train.eval_every_epochs epochs, log the metrics of the epoch, save, and return the position.

        best.pt is saved if the result eval.best_by has improved, last.pt every train.save_every_epochs epochs, and the
        checkpoint of the epoch if train.keep_checkpoints asks for it. The end of the run is always evaluated and saved.

        Raises:
            Preempted: A signal interrupted the evaluation. The state is saved in a checkpoint.
        """
        train, progress, clock = self.config.train, self.run.progress, self.run.clock
        done = self._last_step(epoch)
        position = Position(epoch, done - self.timeline.first_step(epoch))
        is_whole, is_last = done == self.timeline.first_step(epoch + 1), done == self.end
        self.train_loader.check_unchanged()
        sums = self.finite_check.sums(done)
        self._report_skipped(done)
        metrics = self._training_metrics(epoch, done, sums)
        improved = False
        if is_last or (epoch + 1) % train.eval_every_epochs == 0:
            try:
                with clock if is_last else nullcontext():
                    evaluation = self._evaluate(metrics)
            except EvaluationInterrupted:
                self.checkpoints.save((LAST,), position, sums, done)
                self._stop(self.consensus.poll_now(), done)
            improved = progress.record(evaluation, self.config.eval.best_by)
            if train.patience is not None:
                progress.stale_epochs = 0 if improved else progress.stale_epochs + is_whole * train.eval_every_epochs
        if is_whole:
            position = Position(epoch + 1)
            if train.schedule == "plateau":
                options = train.schedule_options
                progress.plateau = progress.plateau.after(metrics[options.metric], options)
        progress.stopped_at = 0 if is_whole else done
        self._close_epoch(position, metrics, sums, improved)
        return position

    def _close_epoch(self, position: Position, metrics: MetricsLine, sums: Tensor, improved: bool) -> None:
        """Log the metrics of an epoch, and save the checkpoints that are due at its end.

        Args:
            position: Position after the epoch. It is within the epoch if train.max_steps ends the run there.
            metrics: Metrics of the epoch.
            sums: Metric sums of the epoch over all ranks, which a checkpoint within the epoch holds.
            improved: Whether the result eval.best_by has improved.
        """
        train, done = self.config.train, self.timeline.done(position)
        ends = self.end_reason(position) is not None
        if ends and position.epoch < train.epochs:
            metrics["stopped_early"] = 1
        self.log.log_epoch(metrics, is_best=improved)
        if (report := report_bad_samples(self.train_loader)) is not None:
            self.log.info(report)
        names = (BEST,) * improved
        if position.step == 0:
            self.state.sums.zero_()
            self.run.clock.end_epoch()
            sums = torch.zeros_like(sums)
            names += (LAST,) * (ends or position.epoch % train.save_every_epochs == 0)
            names += kept_files(train.keep_checkpoints, position.epoch)
        else:
            names += (LAST,)
        if names:
            self.checkpoints.save(names, position, sums, done)
        if position.step:
            self.run.clock.end_epoch()  # only now, since a run that continues from the checkpoint continues the epoch

    def _training_metrics(self, epoch: int, done: int, sums: Tensor) -> MetricsLine:
        """Return the metrics of an epoch by name, with None for the results of the evaluation."""
        loss, correct, seen = sums.tolist()
        weights = ("",) if self.state.ema is None else ("", "ema_")
        return MetricsLine(
            {
                "epoch": epoch,
                "step": done,
                "train_loss": loss / seen if seen else nan,
                "train_top1": correct / seen if seen else nan,
                **dict.fromkeys(f"{which}val_{result}" for which in weights for result in RESULTS),
                "lr": learning_rate(done - 1, self.timeline, self.state.config, self.run.progress.plateau.decays),
                **self.run.clock.rates(),
                **memory_usage(self.state.device),
            }
        )

    def _evaluate(self, metrics: MetricsLine) -> Evaluation:
        """Evaluate the weights and, if there is one, the moving average, and add the results to `metrics`.

        Returns:
            The results of the weights selected by eval.weights.
        """
        state, options = self.state, self.config.eval
        self.log.live.evaluating()
        what = self.val_loader, len(self.val_loader.split), options.tta, lambda: self.signals.number != 0
        evaluations = {"": evaluate(state, *what)}
        if state.ema is not None:
            with state.ema.swapped_in():
                evaluations["ema_"] = evaluate(state, *what)
        for which, evaluation in evaluations.items():
            metrics |= {f"{which}val_{result}": getattr(evaluation, result) for result in RESULTS}
        return evaluations["ema_" if uses_ema(state.ema, options.weights) else ""]

    def _stop(self, signal: int, done: int) -> NoReturn:
        """Wait until the checkpoint is written, log the stop, and raise Preempted."""
        collectives.from_first_rank(self.checkpoints.wait)
        stopped = Preempted(signal)
        self.log.info(
            f"{stopped} after step {done} of {self.timeline.total}, saved in {self.checkpoints.folder / LAST}; "
            "continue with --resume auto"
        )
        raise stopped

    def _report_skipped(self, done: int) -> None:
        """Count and log the optimizer steps skipped by train.on_nonfinite=skip since the last report.

        Raises:
            UserError: At least MAX_SKIPPED_STEPS steps were run since the last report, and all of them were skipped.
        """
        count, since = self.finite_check.skipped()
        if count:
            self.run.progress.left_out += count
            self.log.info(
                f"step {done}: {count} of the last {since} steps skipped, since their gradients were not finite"
            )
        if count == since >= MAX_SKIPPED_STEPS:
            raise UserError(
                f"the gradients of all steps from step {done - since + 1} to {done} are not finite, and "
                f"train.on_nonfinite=skip skipped all of them; {self._last_checkpoint()}; lower "
                f"train.lr={self.config.train.lr}, clip gradients (train.clip_grad_norm), or use train.amp=off"
            )

    def _last_checkpoint(self) -> str:
        newest, steps = self.checkpoints.newest, self.checkpoints.steps
        return (
            f"the last good checkpoint is {newest} of step {steps}" if newest else "no checkpoint had been written yet"
        )

    def _rewind(self, error: NonFiniteError) -> Position:
        """Restore the last checkpoint, mark the steps reported by `error` to be skipped, and return the new position.

        Raises:
            UserError: train.on_nonfinite is not "rewind", the run has already been rewound MAX_REWINDS times, or the
                checkpoint could not be written or loaded.
        """
        train, skipped = self.config.train, self.run.progress.passed_over
        collectives.from_first_rank(self.checkpoints.wait)  # so that the checkpoint in the message exists
        sentence = f"{error.what} not finite in {error.steps}; {self._last_checkpoint()}"
        if train.on_nonfinite != "rewind":
            advice = "continue from there with --resume auto and" if self.checkpoints.newest else "start again with"
            raise UserError(
                f"{sentence}; lower train.lr={train.lr}, clip gradients (train.clip_grad_norm) or use train.amp=off, "
                f"or {advice} train.on_nonfinite=rewind, which skips these steps"
            )
        if len(skipped) >= MAX_REWINDS:
            raise UserError(
                f"{sentence}, and the run has been rewound {MAX_REWINDS} times already; lower train.lr={train.lr}, "
                "clip gradients (train.clip_grad_norm) or use train.amp=off"
            )
        loaded = load_newest_on_all_ranks(latest_checkpoints(self.checkpoints.folder))
        position = restore_run(self.state, self.train_loader, self.timeline, self.run, loaded)
        self.run.progress.passed_over = [*skipped, [error.first, error.last]]
        done = self.timeline.done(position)
        self.checkpoints.mark_saved(loaded.path, done)
        warm_up(self.state, self.train_loader, self.val_loader, self.config.eval.tta)
        self.log.drop_epochs_from(position.epoch)
        self.log.info(
            f"{error.what} not finite in {error.steps}: rewound to {loaded.path} of step {done}; skipping {error.steps}"
        )
        return position


def restore_run(state: TrainState, loader: TrainLoader, timeline: Timeline, run: RunInfo, loaded: Loaded) -> Position:
    """Load a checkpoint into the training state, the loader and the run info, and return its position.

    Args:
        state: Training state to load into.
        loader: Training loader to move to the position.
        timeline: Timeline of the run.
        run: Run info, whose progress and times are replaced.
        loaded: The checkpoint.

    Raises:
        UserError: The checkpoint does not match this run, or its position does not exist in this run.
    """
    source, checkpoint = loaded
    restore_state(state, checkpoint, source)
    if not is_first_rank():
        state.sums.zero_()  # the checkpoint holds the sums over all ranks
    for part in state.parts():
        if part.guard is not None:
            part.guard.start()
    epoch, step = checkpoint["position"]["epoch"], checkpoint["position"]["step"]
    position = Position(epoch, step)
    steps = (*timeline.steps, 0)
    if not (epoch < len(steps) and step <= steps[epoch]):
        raise UserError(
            f"checkpoint {source} is at {position}, outside of {counted(len(timeline.steps), 'epoch')} with these "
            f"numbers of steps: {sorted(set(timeline.steps))}; use another checkpoint"
        )
    if step and step == timeline.steps[epoch]:  # only the evaluation of the epoch is left
        loader.position = Position(epoch + 1)
    else:
        loader.position = Position(epoch, step * state.config.accumulation_steps)
    run.progress = Progress.parse(checkpoint["progress"])
    run.clock.restore(checkpoint.get("times"), position)
    return position
