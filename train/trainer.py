"""The epochs of a run: what follows each optimizer update and each epoch, and how a run ends early or goes back.

Steps are optimizer updates of the whole run, counted from 1. The loop over batches is `loop`'s. What was trained on
files that changed under the run is not saved: each rank looks at its files before all of them add up their sums.
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

RESULTS = ("loss", "top1", "top5")  # of an evaluation, in metrics
MAX_REWINDS = 5  # in one run; what comes again and again is not chance
MAX_SKIPPED_STEPS = 10  # updates in a row, without a single good one


@dataclass
class Trainer:
    """The parts of a run, as train/ddp.py puts them together."""

    config: Config
    state: TrainState
    train_loader: TrainLoader
    val_loader: Loader
    val_samples: int
    timeline: Timeline
    progress: dict[str, Any]  # what the run has achieved, changed here: best_top1, plateau, passed_over
    saving: CheckpointWriter
    log: RunLog
    ranks: Ranks
    clock: RunTimer
    prepare: Callable[[], object]  # compiles and captures the step again after the optimizer's state was loaded


def fit(run: Trainer, position: dict[str, int], pending: PendingSignal) -> None:
    """Epochs from `position` on, with the checkpoints that train.save_every_* ask for.

    position: epoch, and steps done in it. Raises Stopped, after a checkpoint, when a signal asks for it.
    """
    config, loader = run.config.train, run.train_loader
    is_due = run.saving.is_due if config.save_every_steps is None else lambda: False
    health, agreement = FiniteCheck(run.state), StopConsensus(lambda: pending.number, is_due)
    epoch, step = position["epoch"], position["step"]
    if config.on_nonfinite == "rewind" and not run.saving.has_own_checkpoint:
        done = run.timeline.first(epoch) + step
        run.saving.save((LAST,), position, health.sums(done), done)
    stage = None
    while epoch < config.epochs:
        if len(loader.stages) > 1 and loader.at(epoch) is not stage:
            stage = loader.at(epoch)
            run.log.info(f"epoch {epoch}: images of {stage.image_size} x {stage.image_size} pixels, "
                        f"{run.timeline.updates[epoch]} steps at global batch {_global_batch(run, epoch)}")  # fmt: skip
        done = run.timeline.first(epoch) + step
        health.begin(done)
        agreement.reset(done)
        try:
            _train_epoch(run, epoch, step, health, agreement)
            _finish_epoch(run, epoch, pending, health, agreement)
        except NonFiniteError as found:
            epoch, step = _rewind(run, found)
        else:
            epoch, step = epoch + 1, 0
    collectives.from_first_rank(run.saving.wait)


def _train_epoch(run: Trainer, epoch: int, step: int, health: FiniteCheck, agreement: StopConsensus) -> None:
    """Train the rest of an epoch of which `step` steps are done."""
    config, state, loader, timeline, log = run.config, run.state, run.train_loader, run.timeline, run.log
    first, steps, save_every = timeline.first(epoch), timeline.updates[epoch], config.train.save_every_steps
    bar = tqdm(total=steps, initial=step, desc=f"epoch {epoch + 1}/{config.train.epochs}", unit="step", leave=False,
               disable=log.is_disabled or not sys.stderr.isatty(), file=sys.stderr)  # fmt: skip
    meter = ThroughputMeter(loader)
    loss, _, seen = health.sums(first + step).tolist() if step else (0.0, 0.0, 0.0)
    meter.begin(first + step, loss, seen, images_per_step=_global_batch(run, epoch))

    def after_step(update: int, lr: float) -> None:
        bar.update()
        done = update + 1
        run.saving.check()
        signal, saves = agreement.poll(done)
        saves = saves or signal != 0 or (save_every is not None and done % save_every == 0)
        logs = done % config.log.every_steps == 0
        if not (saves or logs):
            return
        if saves:
            loader.check_unchanged()
        sums = health.sums(done)  # synchronises, once per log interval
        if logs:
            loss, _, seen = sums.tolist()
            measured = {**meter.read(done, loss, seen), "lr": lr, **memory_usage(state.device)}
            bar.set_postfix(loss=f"{measured['step_loss']:.3f}", lr=f"{lr:.2g}")
            log.log_step(measured, done)
            _report_skipped(run, health, done)
        if saves:
            run.clock.count(done)
            run.saving.save((LAST,), {"epoch": epoch, "step": done - first}, sums, done)
        if signal:
            _stop(run, signal, done)

    if step == steps:  # the run had been stopped in the evaluation
        return
    skip_steps = {update for begin, end in run.progress.get("passed_over", []) for update in range(begin - 1, end)}
    run.clock.begin(first + step, loader, images_per_step=_global_batch(run, epoch))
    with bar:
        train_epoch(state, loader, seed=config.seed, rank=run.ranks.rank, after_step=after_step,
                    timeline=timeline, decays=_decays(run), skip_steps=skip_steps)  # fmt: skip
    run.clock.count(first + steps)


def _global_batch(run: Trainer, epoch: int) -> int:
    """Images of an optimizer update."""
    batch_size = run.train_loader.at(epoch).plan.batch_size
    return batch_size * run.ranks.world_size * run.config.train.accumulation_steps


def _decays(run: Trainer) -> int:
    """Of schedule plateau so far."""
    return int(run.progress.get("plateau", {}).get("decays", 0))


def _finish_epoch(
    run: Trainer, epoch: int, pending: PendingSignal, health: FiniteCheck, agreement: StopConsensus
) -> None:
    """Evaluate, write metrics and checkpoints."""
    config, state, progress = run.config, run.state, run.progress
    done, is_last = run.timeline.first(epoch + 1), epoch + 1 == config.train.epochs
    run.train_loader.check_unchanged()
    sums = health.sums(done)
    loss, correct, seen = sums.tolist()
    _report_skipped(run, health, done)
    weights = ("",) if state.ema is None else ("", "ema_")
    metrics = {
        "epoch": epoch,
        "step": done,
        "train_loss": loss / seen if seen else nan,
        "train_top1": correct / seen if seen else nan,
        **dict.fromkeys(f"{which}val_{result}" for which in weights for result in RESULTS),
        "lr": learning_rate(done - 1, run.timeline, state.config, _decays(run)),
        **run.clock.rates(),
        **memory_usage(state.device),
    }
    improved = False
    if is_last or (epoch + 1) % config.train.eval_every_epochs == 0:
        try:
            with run.clock if is_last else nullcontext():
                results, top1 = _validate(run, pending)
        except EvaluationInterrupted:
            run.saving.save((LAST,), {"epoch": epoch, "step": run.timeline.updates[epoch]}, sums, done)
            _stop(run, agreement.poll_now(), done)
        metrics |= results
        improved = top1 > progress["best_top1"]
        progress["best_top1"] = max(progress["best_top1"], top1)
    if config.train.schedule == "plateau":
        progress["plateau"] = update_plateau(progress.get("plateau", {}), metrics, config.train.schedule_options)
    run.log.log_epoch(metrics)
    if (report := report_bad_samples(run.train_loader)) is not None:
        run.log.info(report)
    state.sums.zero_()
    run.clock.end_epoch()
    names = (BEST,) if improved else ()
    if is_last or (epoch + 1) % config.train.save_every_epochs == 0:
        names = (*names, LAST)
    if names:
        run.saving.save(names, {"epoch": epoch + 1, "step": 0}, torch.zeros_like(sums), done)


def _validate(run: Trainer, pending: PendingSignal) -> tuple[dict[str, float], float]:
    """Results of the weights, and of their moving average where one is kept; and the accuracy of those that count."""
    state, tta = run.state, run.config.eval.tta
    what = run.val_loader, run.val_samples, tta, lambda: pending.number != 0
    evaluations = {"": evaluate(state, *what)}
    if state.ema is not None:
        with state.ema.swapped_in():
            evaluations["ema_"] = evaluate(state, *what)
    results = {f"{which}val_{result}": getattr(one, result) for which, one in evaluations.items() for result in RESULTS}
    return results, evaluations["ema_" if uses_ema(state.ema, run.config.eval.weights) else ""].top1


def _stop(run: Trainer, signal: int, done: int) -> None:
    """Raise Stopped once the checkpoint stands."""
    collectives.from_first_rank(run.saving.wait)
    stopped = Preempted(signal)
    run.log.info(f"{stopped} after step {done} of {run.timeline.total}, which {run.saving.folder / LAST} holds; "
                "--resume auto goes on from there")  # fmt: skip
    raise stopped


def _report_skipped(run: Trainer, health: FiniteCheck, done: int) -> None:
    """What train.on_nonfinite=skip has done since the last report; raises UserError where it helps nothing."""
    count, since = health.skipped()
    if count:
        run.progress["left_out"] = run.progress.get("left_out", 0) + count
        run.log.info(
            f"step {done}: {count} of the last {since} updates left out, since their gradients were not finite"
        )
    if count == since >= MAX_SKIPPED_STEPS:
        raise UserError(
            f"the gradients of all updates from step {done - since + 1} to {done} are not finite, and "
            f"train.on_nonfinite=skip left out all of them; {_last_good(run)}; lower train.lr={run.config.train.lr}, "
            "clip gradients (train.clip_grad_norm), or use train.amp=off"
        )


def _last_good(run: Trainer) -> str:
    newest, steps = run.saving.newest, run.saving.steps
    return f"the last good checkpoint is {newest} of step {steps}" if newest else "no checkpoint had been written yet"


def _rewind(run: Trainer, found: NonFiniteError) -> tuple[int, int]:
    """To the last checkpoint, where train.on_nonfinite says so; (epoch, steps done in it) to go on from."""
    train, skip_steps = run.config.train, run.progress.get("passed_over", [])
    collectives.from_first_rank(run.saving.wait)  # so that the checkpoint that is named stands
    sentence = f"{found.what} not finite in {found.steps}; {_last_good(run)}"
    if train.on_nonfinite != "rewind":
        goes_on = "go on from there with --resume auto and" if run.saving.newest else "start again with"
        raise UserError(
            f"{sentence}; lower train.lr={train.lr}, clip gradients (train.clip_grad_norm) or use train.amp=off, or "
            f"{goes_on} train.on_nonfinite=rewind, which passes over these steps"
        )
    if len(skip_steps) >= MAX_REWINDS:
        raise UserError(
            f"{sentence}, and the run has gone back {MAX_REWINDS} times already; lower train.lr={train.lr}, clip "
            "gradients (train.clip_grad_norm) or use train.amp=off"
        )
    source, content = load_newest_on_all_ranks(latest_checkpoints(run.saving.folder))
    position = restore_run(run.state, run.train_loader, run.timeline, content, source)
    run.progress.clear()
    run.progress |= content["progress"]
    run.clock.restore(content)
    run.progress["passed_over"] = [*skip_steps, [found.first, found.last]]
    run.saving.mark_saved(source, run.timeline.first(position["epoch"]) + position["step"])
    run.prepare()
    run.log.drop_epochs_from(position["epoch"])
    run.log.info(f"{found.what} not finite in {found.steps}: went back to {source} of step {run.saving.steps}, and "
                f"from there passes over {found.steps}")  # fmt: skip
    return position["epoch"], position["step"]


def restore_run(
    state: TrainState, loader: TrainLoader, timeline: Timeline, content: dict[str, Any], source: Path
) -> dict[str, int]:
    """Put all that a step changes, and the loader, where a checkpoint has them; its position."""
    restore_state(state, content, source)
    if not is_first_rank():
        state.sums.zero_()  # the checkpoint holds the sums over all ranks
    for one in state.parts():
        if one.guard is not None:
            one.guard.begin()
    position: dict[str, int] = content["position"]
    epoch, step = position["epoch"], position["step"]
    steps = (*timeline.updates, 0)
    if not (0 <= epoch < len(steps) and 0 <= step <= steps[epoch]):
        raise UserError(
            f"checkpoint {source} stands at {position}, outside of {len(timeline.updates)} epochs of these steps: "
            f"{sorted(set(timeline.updates))}; take another one"
        )
    if step and step == timeline.updates[epoch]:  # all of the epoch but its evaluation
        loader.state = {"epoch": epoch + 1, "step": 0}
    else:
        loader.state = {"epoch": epoch, "step": step * state.config.accumulation_steps}
    return position
