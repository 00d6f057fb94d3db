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
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import WARM_UP_TIMEOUT_S, Measurement, measure

SIZES = (256, 512, 1024, 2048)  # that `search_fastest` tries
MIN_GAIN = 1.02  # a doubled batch that gives less is not worth its memory


@dataclass(frozen=True)
class Target:
    """A model whose batch sizes are tried; limit_bytes: of a GPU's memory or of the process's, None: all there is."""

    name: str
    config: Config
    synthetic: bool = False  # noise instead of a data set's images
    on_gpu: bool = False
    limit_bytes: int | None = None


@dataclass
class Trial:
    """What one batch size reached: `rates` where it fits, else `error`, which may be another than its memory's."""

    batch_size: int
    rates: list[float] = field(default_factory=list)  # images/s, one per round
    memory_gib: float | None = None  # peak: of torch's tensors on a GPU, resident on the CPU
    reserved_gib: float | None = None  # peak held by torch's allocator, on a GPU
    device_memory_gib: float | None = None  # in use on the GPU altogether
    gpu_memory_gib: float | None = None  # the GPU's whole memory
    error: str | None = None
    origin: str = "doubling"  # or bisection
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


class OutOfTime(Exception):
    """The time given was over before a size was measured."""


def run_trial(
    target: Target, batch: int, seconds: float, rounds: int, deadline: float | None, step_s: float = 0.0
) -> Trial:
    """Train on one batch of this size for some rounds; step_s: about how long a step may take, for patience."""
    config = with_batch(target.config, batch)
    is_watched = target.limit_bytes is not None and not target.on_gpu
    candidate = Candidate(
        f"batch {batch}",
        partial(ours.resident, synthetic=target.synthetic, limit_bytes=target.limit_bytes),
        (config,),
        partial(process_memory.check_limit, target.limit_bytes) if is_watched and target.limit_bytes else None,
    )
    (measurement,) = measure(
        [candidate], seconds, rounds, deadline, WARM_UP_TIMEOUT_S + 10 * step_s, show_progress=False
    )
    if measurement.error is None and not measurement.rates:
        measurement.error = "not measured"
    is_late = deadline is not None and time.monotonic() > deadline
    if is_late and measurement.error is not None and not process_memory.is_out_of_memory(measurement.error):
        raise OutOfTime(measurement.error)
    return _size(batch, measurement, target.limit_bytes if is_watched else None)


def _size(batch: int, measurement: Measurement, limit_bytes: int | None) -> Trial:
    size = Trial(batch, error=measurement.error)
    if measurement.error is not None:
        return size
    size.rates = measurement.rates
    for name in ("memory_gib", "reserved_gib", "device_memory_gib", "gpu_memory_gib"):
        setattr(size, name, measurement.details.get(name))
    if (
        limit_bytes is not None and (size.memory_gib or 0) * process_memory.GIB > limit_bytes
    ):  # since the watch last looked
        size.error = process_memory.limit_error(limit_bytes)
    return size


def with_batch(config: Config, batch: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch})})


def doublings(reach: Callable[[int], Trial], first: int, most: int | None) -> Iterator[Trial]:
    """`first`, twice, four times as many, at last `most` itself; ends after the first that does not fit or fails."""
    batch = first if most is None else min(first, most)
    while True:
        size = reach(batch)
        yield size
        if not size.fits or batch == most:
            return
        batch = 2 * batch if most is None else min(2 * batch, most)


def bisection(reach: Callable[[int], Trial], fits: int, fails: int, tolerance: float) -> Iterator[Trial]:
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
class BatchSizeSearch:
    """All sizes tried of one model; `end` says why there are no more, and is empty while they go on."""

    target: Target
    trials: list[Trial] = field(default_factory=list)
    end: str = ""  # memory, most, time, error, interrupted

    @property
    def fitting(self) -> list[Trial]:
        return sorted((size for size in self.trials if size.fits), key=lambda size: size.batch_size)

    @property
    def largest(self) -> int | None:
        return self.fitting[-1].batch_size if self.fitting else None

    @property
    def reliable(self) -> list[Trial]:
        """Return the fitting sizes but those that have one round of bisection alone, where there are others."""
        fitting = self.fitting
        return [size for size in fitting if size.origin == "doubling" or size.is_repeated] or fitting

    @property
    def best(self) -> Trial | None:
        """Return the fastest of the settled sizes by the median of its rounds."""
        return max(self.reliable, key=lambda size: size.rate, default=None)

    @property
    def too_large(self) -> int | None:
        """The smallest batch that did not fit."""
        return min((size.batch_size for size in self.trials if not size.fits and not size.is_failure), default=None)

    @property
    def failure(self) -> Trial | None:
        """The size that ended by an error other than memory's."""
        return next((size for size in self.trials if size.is_failure), None)


def search(
    result: BatchSizeSearch, reach: Callable[[int, str], Trial], *, first: int, most: int | None, tolerance: float
) -> Iterator[Trial]:
    """Fill `result` size by size; reach(batch, "doubling", "bisection" or "repeat") may raise TimeOver."""

    def noted(sizes: Iterator[Trial]) -> Iterator[Trial]:
        for size in sizes:
            result.trials.append(size)
            yield size

    try:
        yield from noted(doublings(lambda batch: reach(batch, "doubling"), first, most))
        if result.largest is not None and result.too_large is not None:
            between = bisection(lambda batch: reach(batch, "bisection"), result.largest, result.too_large, tolerance)
            yield from noted(between)
    except OutOfTime:
        result.end = "time"
        return
    with suppress(OutOfTime):  # the search itself is complete
        yield from repeats(result, lambda batch: reach(batch, "repeat"))
    result.end = "error" if result.failure else "memory" if result.too_large is not None else "most"


def repeats(result: BatchSizeSearch, reach: Callable[[int], Trial]) -> Iterator[Trial]:
    """Measure the largest batch once more, and the fastest until the fastest of all has been repeated.

    The rounds are added to those of the first time, but for the one round of bisection: a size that was chosen by its
    rate in one round was probably lucky in it.
    """
    while result.fitting:
        fastest = max(result.fitting, key=lambda size: size.rate)
        size = next((one for one in (result.fitting[-1], fastest) if not one.is_repeated), None)
        if size is None:
            return
        again = reach(size.batch_size)
        size.is_repeated, size.error = True, again.error
        size.rates = again.rates if size.origin == "bisection" else size.rates + again.rates
        size.memory_gib = max(filter(None, (size.memory_gib, again.memory_gib)), default=None)
        yield size


def search_fastest(config: Config, seconds: float, rounds: int, deadline: float | None) -> Iterator[Trial]:
    """Try SIZES from the smallest on; ends after the first doubling that does not fit, fails or gains too little."""
    target = Target(config.model.name, config, on_gpu=torch.cuda.is_available())
    best_rate = 0.0
    with suppress(OutOfTime):
        for size in doublings(lambda batch: run_trial(target, batch, seconds, rounds, deadline), SIZES[0], SIZES[-1]):
            yield size
            if not size.fits or size.rate < MIN_GAIN * best_rate:
                return
            best_rate = size.rate
