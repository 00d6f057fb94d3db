"""Learning rates as pure functions of the update, to be plotted and tested; plateau's state is three numbers.

Knows the settings and how many updates each epoch has, but neither optimizers nor loaders.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from configs.schema import ScheduleConfig, TrainConfig

OWN_RATES = ("norm_bias_lr", "bias_lr", "linear_lr")  # learning rates in the optimizer's section
MIN_TIME_CONSTANTS = 4.0  # time constants of the moving average, after which 2 % of the initial weights are left
ROUNDING = 1e-9  # epochs: positions are quotients of updates, which lie further apart than that


@dataclass(frozen=True)
class Timeline:
    """How many optimizer updates each epoch of a run has, and what its learning rates are multiplied by.

    They differ from epoch to epoch where the batch size does; factors: empty where all are 1.
    """

    updates: tuple[int, ...]
    factors: tuple[float, ...] = ()

    @classmethod
    def even(cls, epochs: int, updates_per_epoch: int) -> Timeline:
        return cls((updates_per_epoch,) * epochs)

    @cached_property
    def _firsts(self) -> list[int]:
        return list(accumulate(self.updates, initial=0))

    @property
    def total(self) -> int:
        return self._firsts[-1]

    def first(self, epoch: int) -> int:
        """The epoch's first update, which is the number of updates before it; epoch: up to and with their number."""
        return self._firsts[epoch]

    def epoch_of(self, update: int) -> int:
        """The epoch that the update belongs to; from the end on, the number of epochs."""
        return bisect_right(self._firsts, update) - 1

    def factor(self, update: int) -> float:
        """Of the epoch that the update belongs to."""
        return self.factors[min(self.epoch_of(update), len(self.factors) - 1)] if self.factors else 1.0

    def position(self, update: int) -> float:
        """Epochs done before the update, a begun one as the share of its updates."""
        epoch = self.epoch_of(update)
        if epoch >= len(self.updates):
            return float(len(self.updates))
        return epoch + (update - self.first(epoch)) / self.updates[epoch]

    def updates_until(self, position: float) -> float:
        """Updates before this position in epochs, with their fraction; past the end, as the last epoch goes on."""
        epoch = min(int(position), len(self.updates) - 1)
        each = self.updates[epoch]
        return position * each + (self.first(epoch) - epoch * each)


def learning_rate(update: int, timeline: Timeline, config: TrainConfig, decays: int = 0) -> float:
    """The learning rate of optimizer update `update` (from 0): linear warm-up, then what `schedule` says.

    step and multistep count epochs from the start of training; cosine, linear, polynomial and exponential begin at the
    end of the warm-up, with lr. With schedule_options.per_epoch all updates of an epoch have the rate of its first one,
    or of the first one after the warm-up. decays: plateau's so far.
    """
    return timeline.factor(update) * _scheduled(update, timeline, config, decays)


def _scheduled(update: int, timeline: Timeline, config: TrainConfig, decays: int) -> float:
    """At the global batch that `config` is meant for."""
    if config.schedule == "one-cycle":
        return max(config.min_lr, one_cycle(update, timeline.total, config))
    warmup = round(timeline.updates_until(config.warmup_epochs))
    if update < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (update + 1) / warmup
    options = config.schedule_options
    if options.per_epoch and update < timeline.total:
        update = max(warmup, timeline.first(timeline.epoch_of(update)))
    progress = min(1.0, (update - warmup) / max(1, timeline.total - warmup))
    if config.schedule in ("cosine", "linear", "polynomial"):
        share = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "polynomial": (1 - progress) ** options.power,
        }[config.schedule]
        return config.min_lr + (config.lr - config.min_lr) * share
    position = timeline.position(update)
    exponent = {
        "constant": 0,
        "step": math.floor(position / options.epochs + ROUNDING),
        "multistep": sum(milestone <= position + ROUNDING for milestone in options.milestones),
        "exponential": position - timeline.position(warmup),
        "plateau": decays,
    }[config.schedule]
    return max(config.min_lr, config.lr * options.rate**exponent)


def one_cycle(update: int, updates: int, config: TrainConfig) -> float:
    """A cosine up to lr in the share `peak` of the updates, and one down: torch's OneCycleLR, arXiv:1708.07120."""
    options = config.schedule_options
    lowest = config.lr / options.div_factor
    top = options.peak * updates - 1
    if update < top:
        begin, end, progress = lowest, config.lr, update / top
    else:
        begin, end = config.lr, lowest / options.final_div_factor
        progress = min(1.0, (update - top) / (updates - 1 - top))
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * progress))


def whitening_learning_rate(update: int, timeline: Timeline, config: TrainConfig, decays: int = 0) -> float:
    """The same for the bias of a whitening layer, which is trained for the first `whiten_bias_epochs` only."""
    if config.whiten_bias_epochs is None:
        return learning_rate(update, timeline, config, decays)
    updates = timeline.updates_until(config.whiten_bias_epochs)
    if update >= updates:
        return 0.0
    if config.whiten_bias_anneal:
        return timeline.factor(update) * config.lr * (1 - update / updates)
    return learning_rate(update, timeline, config, decays)


@dataclass(frozen=True)
class Plateau:
    """What schedule plateau knows at the end of an epoch, as torch's ReduceLROnPlateau with an absolute threshold."""

    best: float | None = None
    bad_epochs: int = 0
    decays: int = 0

    def after(self, value: float, options: ScheduleConfig) -> Plateau:
        """One epoch later; value: of `options.metric`, where nan is no improvement."""
        sign = -1.0 if options.metric == "val_top1" else 1.0  # the smaller, the better
        best = math.inf if self.best is None else sign * self.best
        if sign * value < best - options.threshold:
            return Plateau(value, 0, self.decays)
        if self.bad_epochs < options.patience:
            return Plateau(self.best, self.bad_epochs + 1, self.decays)
        return Plateau(self.best, 0, self.decays + 1)


def update_plateau(state: dict[str, Any], metrics: Mapping[str, Any], options: ScheduleConfig) -> dict[str, Any]:
    """The plateau's fields after an epoch with these metrics; epochs without the metric change nothing.

    state: its fields before; empty at the start.
    """
    value = metrics[options.metric]
    return state if value is None else asdict(Plateau(**state).after(value, options))


def config_warnings(config: TrainConfig, timeline: Timeline) -> list[str]:
    """What of the settings has no effect, or an unwanted one, in a run of this length."""
    found = []
    options, decay = config.schedule_options, config.ema.decay
    first = {"step": options.epochs, "multistep": min(options.milestones, default=0)}.get(config.schedule, 0)
    if first >= config.epochs:
        found.append(f"schedule {config.schedule} first decays at epoch {first:g}, which train.epochs={config.epochs} "
                     "does not reach: the learning rate stays as it is")  # fmt: skip
    averages = timeline.total // config.ema.every_steps
    if decay is not None and not config.ema.warmup and averages * (1 - decay) < MIN_TIME_CONSTANTS:
        found.append(
            f"train.ema.decay={decay:g} looks back over {1 / (1 - decay):,.0f} updates, but the run has {averages:,}: "
            "the average keeps much of the initial weights; use a smaller decay or train.ema.warmup=true"
        )
    return found


def lr_factor(config: TrainConfig, global_batch: int) -> float:
    """What the learning rates of the config are multiplied by at this global batch.

    Linear: Goyal and others, arXiv:1706.02677; square root: Krizhevsky, arXiv:1404.5997.
    """
    if config.lr_batch_size is None:
        return 1.0
    ratio = global_batch / config.lr_batch_size
    return ratio if config.lr_scaling == "linear" else math.sqrt(ratio)


def scale_learning_rates(config: TrainConfig, global_batch: int) -> TrainConfig:
    """The config with all its learning rates as they are at this global batch."""
    factor = lr_factor(config, global_batch)
    own = {name: rate * factor for name in OWN_RATES if (rate := getattr(config.optimizer, name)) is not None}
    rates = {name: getattr(config, name) * factor for name in ("lr", "min_lr", "warmup_lr")}
    # the batch as well, so that scaling once more changes nothing
    batch = {"lr_batch_size": global_batch} if config.lr_batch_size is not None else {}
    return config.model_copy(update={**rates, **batch, "optimizer": config.optimizer.model_copy(update=own)})
