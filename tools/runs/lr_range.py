"""Analyze a learning-rate range test: smooth the losses, detect divergence and suggest a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIVERGED = 4.0  # ratio of the smoothed loss to its minimum
DELAY_DECADES = 0.25  # lag of the smoothed loss, for any number of steps per decade
SLOPE_WINDOW_DECADES = 0.5  # width of the window in which a slope is fitted
MIN_RELATIVE_FALL = 0.02  # a clear fall is at least this share of the first loss
MIN_FALL_TO_NOISE = 3.0  # and at least this many standard deviations of the noise


@dataclass(frozen=True)
class LossCurve:
    """Losses of a range test, one per optimizer step. The last ones may be non-finite."""

    lr: np.ndarray
    loss: np.ndarray  # mean over the step's samples
    smoothed: np.ndarray


@dataclass(frozen=True)
class Suggestion:
    """A suggested learning rate.

    `lr` is None if too few losses are finite or the loss does not clearly fall. `reason` explains the result.
    """

    lr: float | None
    lr_at_minimum: float | None
    reason: str

    @property
    def tenth_of_minimum(self) -> float | None:
        return None if self.lr_at_minimum is None else self.lr_at_minimum / 10


def smooth_losses(losses: Sequence[float], rates: np.ndarray) -> np.ndarray:
    """Return the bias-corrected exponential moving average of the losses. It lags behind them by DELAY_DECADES.

    `rates` are the learning rates of the test, at least two and geometrically spaced.
    """
    steps = DELAY_DECADES / math.log10(rates[1] / rates[0])
    kept = steps / (1 + steps)  # the mean age of the averaged losses is kept / (1 - kept)
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = kept * average + (1 - kept) * loss
        smoothed.append(average / (1 - kept**number))
    return np.array(smoothed)


def divergence_index(smoothed: np.ndarray) -> int | None:
    """Return the index of the step at which the loss diverges, or None if it does not.

    This is the first step whose smoothed loss is non-finite or above DIVERGED times the minimum so far.
    """
    diverged = ~np.isfinite(smoothed) | (smoothed > DIVERGED * np.fmin.accumulate(smoothed))
    return int(diverged.argmax()) if diverged.any() else None


def suggest_lr(curve: LossCurve) -> Suggestion:
    """Suggest the learning rate at which the smoothed loss falls most steeply per decade, up to its minimum.

    Steps in the first SLOPE_WINDOW_DECADES of learning rates are not suggested. Losses from the first non-finite one on
    are ignored.
    """
    finite = np.isfinite(curve.loss)
    count = len(finite) if finite.all() else int(finite.argmin())
    if count < 10:
        return Suggestion(None, None, f"only the first {count} losses are finite")
    decades, loss, smoothed = np.log10(curve.lr[:count]), curve.loss[:count], curve.smoothed[:count]
    lowest = int(smoothed.argmin())
    start = int(np.searchsorted(decades, decades[0] + SLOPE_WINDOW_DECADES))  # the average has settled
    first = float(np.median(loss[: max(10, start)]))
    noise = float(np.std(loss[: max(10, start)] - smoothed[: max(10, start)]))
    fall = first - float(smoothed[lowest])
    if lowest <= start or fall < max(MIN_RELATIVE_FALL * first, MIN_FALL_TO_NOISE * noise):
        reason = f"the loss falls from {first:.4g} to {smoothed[lowest]:.4g} at best, which is not a clear descent"
        return Suggestion(None, None, reason)
    steepest = min(range(start, lowest + 1), key=lambda middle: slope_around(decades, smoothed, middle))
    return Suggestion(float(curve.lr[steepest]), float(curve.lr[lowest]), "steepest descent of the smoothed loss")


def slope_around(decades: np.ndarray, smoothed: np.ndarray, middle: int) -> float:
    """Return the slope of the smoothed loss around step `middle`, in loss per decade of the learning rate.

    The slope is a least-squares fit over SLOPE_WINDOW_DECADES, or over the neighboring steps if the window is shorter.
    """
    near = np.abs(decades - decades[middle]) <= max(SLOPE_WINDOW_DECADES / 2, 1.01 * (decades[1] - decades[0]))
    return float(np.polyfit(decades[near], smoothed[near], 1)[0])
