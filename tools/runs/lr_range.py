"""The curve of a learning-rate range test: smoothing, its end, and what it suggests. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIVERGED = 4.0  # times the minimum, of the smoothed loss
DELAY_DECADES = 0.25  # decades by which the smoothed loss lags behind, however many updates a decade has
SLOPE_WINDOW_DECADES = 0.5  # decades over which a slope is fitted
MIN_RELATIVE_FALL = 0.02  # a clear fall: at least this share of the first loss,
MIN_FALL_TO_NOISE = 3.0  # and this many standard deviations of the noise


@dataclass(frozen=True)
class LossCurve:
    """One entry per update; the losses of the last ones may be not finite."""

    lr: np.ndarray
    loss: np.ndarray  # mean of the update's samples
    smoothed: np.ndarray


@dataclass(frozen=True)
class Suggestion:
    """lr: None where the loss has no clear descent, and `reason` says so."""

    lr: float | None
    lr_at_minimum: float | None
    reason: str

    @property
    def tenth_of_minimum(self) -> float | None:
        return None if self.lr_at_minimum is None else self.lr_at_minimum / 10


def smooth_losses(losses: Sequence[float], rates: np.ndarray) -> np.ndarray:
    """The exponential moving average, corrected for its start at zero; it lags DELAY decades of the rate behind.

    rates: geometrically spaced, at least two.
    """
    updates = DELAY_DECADES / math.log10(rates[1] / rates[0])
    kept = updates / (1 + updates)  # the mean age of what an average holds is kept / (1 - kept)
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = kept * average + (1 - kept) * loss
        smoothed.append(average / (1 - kept**number))
    return np.array(smoothed)


def divergence_index(smoothed: np.ndarray) -> int | None:
    """The first update at which the smoothed loss is not finite or DIVERGED times the minimum before it."""
    with np.errstate(invalid="ignore"):
        diverged = ~(smoothed <= DIVERGED * np.minimum.accumulate(smoothed))
    return int(diverged.argmax()) if diverged.any() else None


def suggest_lr(curve: LossCurve) -> Suggestion:
    """The rate at which the smoothed loss falls most steeply per decade, on its way to its minimum."""
    finite = np.isfinite(curve.loss)
    count = len(finite) if finite.all() else int(finite.argmin())
    if count < 10:
        return Suggestion(None, None, f"only the first {count} losses are finite")
    decades, loss, smoothed = np.log10(curve.lr[:count]), curve.loss[:count], curve.smoothed[:count]
    lowest = int(smoothed.argmin())
    start = int(np.searchsorted(decades, decades[0] + SLOPE_WINDOW_DECADES))  # where the average has settled
    first = float(np.median(loss[: max(10, start)]))
    noise = float(np.std(loss[: max(10, start)] - smoothed[: max(10, start)]))
    fall = first - float(smoothed[lowest])
    if lowest <= start or fall < max(MIN_RELATIVE_FALL * first, MIN_FALL_TO_NOISE * noise):
        reason = f"the loss falls from {first:.4g} to {smoothed[lowest]:.4g} at best, which is no clear descent"
        return Suggestion(None, None, reason)
    steepest = min(range(start, lowest + 1), key=lambda middle: slope_around(decades, smoothed, middle))
    return Suggestion(float(curve.lr[steepest]), float(curve.lr[lowest]), "steepest descent of the smoothed loss")


def slope_around(decades: np.ndarray, smoothed: np.ndarray, middle: int) -> float:
    """Loss per decade of the rate: the least-squares line through SLOPE_WINDOW decades around one update."""
    near = np.abs(decades - decades[middle]) <= max(SLOPE_WINDOW_DECADES / 2, 1.01 * (decades[1] - decades[0]))
    return float(np.polyfit(decades[near], smoothed[near], 1)[0])
