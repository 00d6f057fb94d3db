"""Measure which batch sizes train how fast, and find the largest that memory holds: powers of two, then bisection.

The largest and the fastest are measured again, since the fastest of many short measurements is often a lucky one.

Each size has a process of its own, so that one that does not fit ends nothing else and leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from configs.schema import Config
from tools.benchmarks.engine import ours, process_memory
from tools.benchmarks.engine.interleaved import PATIENCE_S, Contestant, Outcome, measure

SIZES = (256, 512, 1024, 2048)  # that `worthwhile` tries
GAIN = 1.02  # a doubled batch that gives less is not worth its memory


@dataclass(frozen=True)
class Subject:
    """A model whose batch sizes are tried; limit_bytes: of a GPU's memory or of the process's, None: all there is."""

    name: str
    config: Config
    synthetic: bool = False  # noise instead of a data set's images
    on_gpu: bool = False
    limit_bytes: int | None = None


@dataclass
class Size:
    """What one batch size reached: `rates` where it fits, else `error`, which may be another than its memory's."""

    batch: int
    rates: list[float] = field(default_factory=list)  # images/s, one per round
    memory_gib: float | None = None  # peak: of torch's tensors on a GPU, resident on the CPU
    reserved_gib: float | None = None  # peak held by torch's allocator, on a GPU
    device_memory_gib: float | None = None  # in use on the GPU altogether
    gpu_memory_gib: float | None = None  # the GPU's whole memory
    error: str | None = None
    step: str = "doubling"  # or bisection
    is_repeated: bool = False

    @property
    def fits(self) -> bool:
        return self.error is None

    @property
    def rate(self) -> float:
        """The median round."""
        return median(self.rates)

    @property
    def is_failure(self) -> bool:
        """Whether it ended by an error that has nothing to do with memory."""
        return self.error is not None and not process_memory.is_out_of_memory(self.error)


class TimeOver(Exception):
    """The time given was over before a size was measured."""


def attempt(
    subject: Subject, batch: int, seconds: float, rounds: int, deadline: float | None, step_s: float = 0.0
) -> Size:
    """Train on one batch of this size for some rounds; step_s: about how long a step may take, for patience."""
    config = with_batch(subject.config, batch)
    is_watched = subject.limit_bytes is not None and not subject.on_gpu
    contestant = Contestant(
        f"batch {batch}",
        partial(ours.resident, synthetic=subject.synthetic, limit_bytes=subject.limit_bytes),
        (config,),
        partial(process_memory.watch, subject.limit_bytes) if is_watched and subject.limit_bytes else None,
    )
    (outcome,) = measure([contestant], seconds, rounds, deadline, PATIENCE_S + 10 * step_s, show_progress=False)
    if outcome.error is None and not outcome.rates:
        outcome.error = "not measured"
    is_late = deadline is not None and time.monotonic() > deadline
    if is_late and outcome.error is not None and not process_memory.is_out_of_memory(outcome.error):
        raise TimeOver(outcome.error)
    return _size(batch, outcome, subject.limit_bytes if is_watched else None)


def _size(batch: int, outcome: Outcome, limit_bytes: int | None) -> Size:
    size = Size(batch, error=outcome.error)
    if outcome.error is not None:
        return size
    size.rates = outcome.rates
    for name in ("memory_gib", "reserved_gib", "device_memory_gib", "gpu_memory_gib"):
        setattr(size, name, outcome.facts.get(name))
    if (
        limit_bytes is not None and (size.memory_gib or 0) * process_memory.GIB > limit_bytes
    ):  # since the watch last looked
        size.error = process_memory.over(limit_bytes)
    return size


def with_batch(config: Config, batch: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch})})


def doublings(reach: Callable[[int], Size], first: int, most: int | None) -> Iterator[Size]:
    """`first`, twice, four times as many, at last `most` itself; ends after the first that does not fit or fails."""
    batch = first if most is None else min(first, most)
    while True:
        size = reach(batch)
        yield size
        if not size.fits or batch == most:
            return
        batch = 2 * batch if most is None else min(2 * batch, most)


def bisection(reach: Callable[[int], Size], fits: int, fails: int, tolerance: float) -> Iterator[Size]:
    """Sizes between one that fits and one that does not, until these two are within `tolerance` of the smaller.

    tolerance 0: until they are neighbours. Ends after an error that is not memory's.
    """
    while fails - fits > max(1, int(fits * tolerance)):
        middle = (fits + fails) // 2
        size = reach(middle)
        yield size
        if size.is_failure:
            return
        fits, fails = (middle, fails) if size.fits else (fits, middle)


@dataclass
class Climb:
    """All sizes tried of one model; `end` says why there are no more, and is empty while they go on."""

    subject: Subject
    sizes: list[Size] = field(default_factory=list)
    end: str = ""  # memory, most, time, error, interrupted

    @property
    def fitting(self) -> list[Size]:
        return sorted((size for size in self.sizes if size.fits), key=lambda size: size.batch)

    @property
    def largest(self) -> int | None:
        return self.fitting[-1].batch if self.fitting else None

    @property
    def settled(self) -> list[Size]:
        """Return the fitting sizes but those that have one round of bisection alone, where there are others."""
        fitting = self.fitting
        return [size for size in fitting if size.step == "doubling" or size.is_repeated] or fitting

    @property
    def best(self) -> Size | None:
        """Return the fastest of the settled sizes by the median of its rounds."""
        return max(self.settled, key=lambda size: size.rate, default=None)

    @property
    def too_large(self) -> int | None:
        """The smallest batch that did not fit."""
        return min((size.batch for size in self.sizes if not size.fits and not size.is_failure), default=None)

    @property
    def failure(self) -> Size | None:
        """The size that ended by an error other than memory's."""
        return next((size for size in self.sizes if size.is_failure), None)


def climb(
    result: Climb, reach: Callable[[int, str], Size], *, first: int, most: int | None, tolerance: float
) -> Iterator[Size]:
    """Fill `result` size by size; reach(batch, "doubling", "bisection" or "repeat") may raise TimeOver."""

    def noted(sizes: Iterator[Size]) -> Iterator[Size]:
        for size in sizes:
            result.sizes.append(size)
            yield size

    try:
        yield from noted(doublings(lambda batch: reach(batch, "doubling"), first, most))
        if result.largest is not None and result.too_large is not None:
            between = bisection(lambda batch: reach(batch, "bisection"), result.largest, result.too_large, tolerance)
            yield from noted(between)
    except TimeOver:
        result.end = "time"
        return
    with suppress(TimeOver):  # the search itself is complete
        yield from repeats(result, lambda batch: reach(batch, "repeat"))
    result.end = "error" if result.failure else "memory" if result.too_large is not None else "most"


def repeats(result: Climb, reach: Callable[[int], Size]) -> Iterator[Size]:
    """Measure the largest batch once more, and the fastest until the fastest of all has been repeated.

    The rounds are added to those of the first time, but for the one round of bisection: a size that was chosen by its
    rate in one round was probably lucky in it.
    """
    while result.fitting:
        fastest = max(result.fitting, key=lambda size: size.rate)
        size = next((one for one in (result.fitting[-1], fastest) if not one.is_repeated), None)
        if size is None:
            return
        again = reach(size.batch)
        size.is_repeated, size.error = True, again.error
        size.rates = again.rates if size.step == "bisection" else size.rates + again.rates
        size.memory_gib = max(filter(None, (size.memory_gib, again.memory_gib)), default=None)
        yield size


def worthwhile(config: Config, seconds: float, rounds: int, deadline: float | None) -> Iterator[Size]:
    """Try SIZES from the smallest on; ends after the first doubling that does not fit, fails or gains too little."""
    subject = Subject(config.model.name, config, on_gpu=torch.cuda.is_available())
    best_rate = 0.0
    with suppress(TimeOver):
        for size in doublings(lambda batch: attempt(subject, batch, seconds, rounds, deadline), SIZES[0], SIZES[-1]):
            yield size
            if not size.fits or size.rate < GAIN * best_rate:
                return
            best_rate = size.rate
