"""Learning rates as pure functions of the optimizer step.

Only the plateau schedule has state, the three fields of `Plateau`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from configs.schema import ScheduleConfig, TrainConfig
from pipelines.interfaces import Position

OWN_RATES = ("norm_bias_lr", "bias_lr", "linear_lr")  # further learning rates in train.optimizer
MIN_TIME_CONSTANTS = 4.0  # of the moving average in a run; the initial weights then have a share of 2 %
ROUNDING = 1e-9  # tolerance in epochs for comparing fractional epochs; smaller than one step


@dataclass(frozen=True)
class Timeline:
    """Number of optimizer steps and learning rate factor of each epoch of a run.

    Both may differ between epochs with different batch sizes. `factors` is empty if all factors are 1.
    """

    steps: tuple[int, ...]
    factors: tuple[float, ...] = ()

    @classmethod
    def even(cls, epochs: int, steps_per_epoch: int) -> Timeline:
        return cls((steps_per_epoch,) * epochs)

    @cached_property
    def _firsts(self) -> list[int]:
        """The first step of each epoch, followed by the total number of steps in the run."""
        return list(accumulate(self.steps, initial=0))

    @property
    def total(self) -> int:
        return self._firsts[-1]

    def first_step(self, epoch: int) -> int:
        """Return the first step of an epoch, counted from 0.

        If `epoch` is the number of epochs, return the total number of steps in the run.
        """
        return self._firsts[epoch]

    def done(self, position: Position) -> int:
        """Return the number of optimizer steps of the run before a position."""
        return self.first_step(position.epoch) + position.step

    def epoch_at(self, step: int) -> int:
        """Return the epoch of a step. For steps past the end of the run, return the number of epochs."""
        return bisect_right(self._firsts, step) - 1

    def factor(self, step: int) -> float:
        """Return the learning rate factor of the epoch that contains a step."""
        return self.factors[min(self.epoch_at(step), len(self.factors) - 1)] if self.factors else 1.0

    def epochs_before(self, step: int) -> float:
        """Return the number of epochs before a step, including the finished fraction of the step's epoch."""
        epoch = self.epoch_at(step)
        if epoch >= len(self.steps):
            return float(len(self.steps))
        return epoch + (step - self.first_step(epoch)) / self.steps[epoch]

    def steps_until(self, position: float) -> float:
        """Return the number of steps before a fractional epoch.

        The result may be fractional. Past the end of the run, every epoch has as many steps as the last one.
        """
        epoch = min(int(position), len(self.steps) - 1)
        each = self.steps[epoch]
        return position * each + (self.first_step(epoch) - epoch * each)


def learning_rate(step: int, timeline: Timeline, config: TrainConfig, decays: int = 0) -> float:
    """Return the learning rate of an optimizer step.

    The learning rate rises linearly in the warm-up and then follows the schedule. The step and multistep schedules
    count epochs from the start of training. The cosine, linear, polynomial and exponential schedules start at lr after
    the warm-up. The one-cycle schedule has its own warm-up. With schedule_options.per_epoch, all schedules except
    one-cycle keep the rate constant within an epoch after the warm-up. The result includes the epoch's factor.

    Args:
        step: Optimizer step of the run, counted from 0.
        timeline: Number of steps and learning rate factor of each epoch.
        config: Config section `train`, with learning rates already scaled to the global batch size (see
            `scale_learning_rates`).
        decays: Number of decays of the plateau schedule so far.
    """
    return timeline.factor(step) * _scheduled(step, timeline, config, decays)


def _scheduled(step: int, timeline: Timeline, config: TrainConfig, decays: int) -> float:
    """Return the learning rate of an optimizer step, without the learning rate factor of its epoch."""
    if config.schedule == "one-cycle":
        return max(config.min_lr, one_cycle(step, timeline.total, config))
    warmup = round(timeline.steps_until(config.warmup_epochs))
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    options = config.schedule_options
    if options.per_epoch and step < timeline.total:
        step = max(warmup, timeline.first_step(timeline.epoch_at(step)))
    progress = min(1.0, (step - warmup) / max(1, timeline.total - warmup))
    if config.schedule in ("cosine", "linear", "polynomial"):
        share = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "polynomial": (1 - progress) ** options.power,
        }[config.schedule]
        return config.min_lr + (config.lr - config.min_lr) * share
    position = timeline.epochs_before(step)
    exponent = {
        "constant": 0,
        "step": math.floor(position / options.epochs + ROUNDING),
        "multistep": sum(milestone <= position + ROUNDING for milestone in options.milestones),
        "exponential": position - timeline.epochs_before(warmup),
        "plateau": decays,
    }[config.schedule]
    return max(config.min_lr, config.lr * options.rate**exponent)


def extension_note(done: int, timelines: tuple[Timeline, Timeline], configs: tuple[TrainConfig, TrainConfig]) -> str:
    """Return a sentence on what the learning rate does from now on in a run that --extend makes longer.

    Args:
        done: Optimizer steps of the run so far.
        timelines: Timeline before and after the extension.
        configs: Config section `train` before and after, with learning rates scaled to the global batch size.
    """
    (before, after), schedule = (config.epochs for config in configs), configs[1].schedule
    rates = [
        learning_rate(step, timeline, config)
        for step, timeline, config in zip((max(0, done - 1), done), timelines, configs, strict=True)
    ]
    meaning = {
        "constant": "stays constant",
        "plateau": "keeps its best value, patience and decays",
        **dict.fromkeys(
            ("step", "multistep", "exponential"), "continues as before, since it depends only on the epoch"
        ),
    }.get(
        schedule,
        f"had come to lr {rates[0]:.4g} and from step {done + 1}, epoch {timelines[1].epoch_at(done) + 1}, on follows "
        f"that of {after} epochs, which is there at lr {rates[1]:.4g}",
    )
    warmups = [config.warmup_epochs for config in configs]
    cut = f"; the warm-up lasts {warmups[1]:g} epochs instead of {warmups[0]:g}" if warmups[0] != warmups[1] else ""
    return f"extended from {before} to {after} epochs: the {schedule} schedule {meaning}{cut}"


def one_cycle(step: int, steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step. It rises to lr and then falls, both along a cosine, like torch's OneCycleLR.

    `schedule_options.peak` is the fraction of the steps in which the learning rate rises. Source: arXiv:1708.07120.
    """
    options = config.schedule_options
    lowest = config.lr / options.div_factor
    top = options.peak * steps - 1
    if step < top:
        start, end, progress = lowest, config.lr, step / top
    else:
        start, end = config.lr, lowest / options.final_div_factor
        progress = min(1.0, (step - top) / (steps - 1 - top))
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def whitening_learning_rate(step: int, timeline: Timeline, config: TrainConfig, decays: int = 0) -> float:
    """Return the learning rate for the bias of a whitening layer.

    By default, it follows the schedule. If train.whiten_bias_epochs is set, it drops to 0 after that many epochs. If
    train.whiten_bias_anneal is set as well, it decays linearly from lr to 0 over those epochs instead of following the
    schedule, and is multiplied by the learning rate factor of the epoch.
    """
    if config.whiten_bias_epochs is None:
        return learning_rate(step, timeline, config, decays)
    steps = timeline.steps_until(config.whiten_bias_epochs)
    if step >= steps:
        return 0.0
    if config.whiten_bias_anneal:
        return timeline.factor(step) * config.lr * (1 - step / steps)
    return learning_rate(step, timeline, config, decays)


@dataclass(frozen=True)
class Plateau:
    """State of the plateau schedule, which behaves like torch's ReduceLROnPlateau with an absolute threshold."""

    best: float | None = None
    bad_epochs: int = 0
    decays: int = 0

    def after(self, value: float | None, options: ScheduleConfig) -> Plateau:
        """Return the state after an epoch.

        Args:
            value: The monitored metric of the epoch. None, without an evaluation, leaves the state unchanged. nan does
                not count as an improvement.
            options: Settings of the schedule.
        """
        if value is None:
            return self
        sign = -1.0 if options.metric == "val_top1" else 1.0  # smaller is better
        best = math.inf if self.best is None else sign * self.best
        if sign * value < best - options.threshold:
            return Plateau(value, 0, self.decays)
        if self.bad_epochs < options.patience:
            return Plateau(self.best, self.bad_epochs + 1, self.decays)
        return Plateau(self.best, 0, self.decays + 1)


def config_warnings(config: TrainConfig, timeline: Timeline) -> list[str]:
    """Return warnings about settings that have no effect or an undesirable effect in a run of this length."""
    warnings = []
    options, decay = config.schedule_options, config.ema.decay
    first = {"step": options.epochs, "multistep": min(options.milestones, default=0)}.get(config.schedule, 0)
    if first >= config.epochs:
        warnings.append(
            f"schedule {config.schedule} first decays after {first:g} epochs, which train.epochs={config.epochs} "
            "does not reach: the learning rate stays constant"
        )
    averages = timeline.total // config.ema.every_steps
    if decay is not None and not config.ema.warmup and averages * (1 - decay) < MIN_TIME_CONSTANTS:
        warnings.append(
            f"train.ema.decay={decay:g} looks back over {1 / (1 - decay):,.0f} steps, but the run has {averages:,}: "
            "the average keeps much of the initial weights; use a smaller decay or train.ema.warmup=true"
        )
    return warnings


def lr_factor(config: TrainConfig, global_batch: int) -> float:
    """Return the factor that scales learning rates from train.lr_batch_size to the global batch size.

    The factor is 1 if train.lr_batch_size is not set. Sources: Goyal et al., arXiv:1706.02677 (linear scaling),
    Krizhevsky, arXiv:1404.5997 (square-root scaling).
    """
    if config.lr_batch_size is None:
        return 1.0
    ratio = global_batch / config.lr_batch_size
    return ratio if config.lr_scaling == "linear" else math.sqrt(ratio)


def scale_learning_rates(config: TrainConfig, global_batch: int) -> TrainConfig:
    """Return the config with all learning rates scaled by `lr_factor` to this global batch size."""
    factor = lr_factor(config, global_batch)
    own = {name: rate * factor for name in OWN_RATES if (rate := getattr(config.optimizer, name)) is not None}
    rates = {name: getattr(config, name) * factor for name in ("lr", "min_lr", "warmup_lr")}
    # also set the batch, so that scaling again changes nothing
    batch = {"lr_batch_size": global_batch} if config.lr_batch_size is not None else {}
    return config.model_copy(update={**rates, **batch, "optimizer": config.optimizer.model_copy(update=own)})
