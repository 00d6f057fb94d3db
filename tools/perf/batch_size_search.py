"""Search for the fastest and the largest batch size of a model, by doubling and then by bisection.

The largest and the fastest size are measured again, since bisection may use a single round per size, and the fastest of
many short measurements is often an outlier. Each size runs in a separate process, so that running out of memory does
not affect other sizes.
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

SIZES = (256, 512, 1024, 2048)  # tried by `search_fastest`
MIN_GAIN = 1.02  # minimum speed-up for which `search_fastest` doubles the batch size again
TIMEOUT_STEPS = 10  # number of expected step durations added to the timeout


@dataclass(frozen=True)
class Target:
    """A model for which batch sizes are searched."""

    name: str
    config: Config
    synthetic: bool = False  # train on noise instead of images of a data set
    on_gpu: bool = False
    limit_bytes: int | None = None  # memory limit of torch on a GPU or of the process on the CPU, or None


@dataclass
class Trial:
    """Result of one batch size. `error` is set if the batch does not fit or the trial fails for another reason."""

    batch_size: int
    rates: list[float] = field(default_factory=list)  # images/s, one per round
    memory_gib: float | None = None  # peak of torch's tensors on a GPU, peak resident memory on the CPU
    reserved_gib: float | None = None  # peak reserved by torch's allocator on a GPU
    device_memory_gib: float | None = None  # GPU memory in use by all processes
    gpu_memory_gib: float | None = None  # size of the GPU's memory
    error: str | None = None
    origin: str = "doubling"  # doubling, bisection or repeat
    is_repeated: bool = False

    @property
    def fits(self) -> bool:
        return self.error is None

    @property
    def rate(self) -> float:
        """Median per-round rate, in images/s."""
        return median(self.rates)

    @property
    def is_failure(self) -> bool:
        """True if the trial ended with an error other than out of memory."""
        return self.error is not None and not process_memory.is_out_of_memory(self.error)


class OutOfTime(Exception):
    """The deadline passed before a batch size was measured."""


def run_trial(
    target: Target, batch_size: int, seconds: float, rounds: int, deadline: float | None, step_s: float = 0.0
) -> Trial:
    """Train on one resident batch of this size in a separate process and measure the rates and the memory usage.

    Args:
        target: Model to train.
        batch_size: Number of images in the batch.
        seconds: Duration of a round.
        rounds: Number of rounds.
        deadline: Deadline as a time.monotonic() value, or None for no deadline.
        step_s: Expected duration of a step in seconds. It extends the warm-up timeout.

    Raises:
        OutOfTime: The deadline has passed, and the trial is incomplete or failed for a reason other than out of memory.
    """
    config = with_batch_size(target.config, batch_size)
    process_limit = None if target.on_gpu else target.limit_bytes
    candidate = Candidate(
        f"batch {batch_size}",
        partial(ours.resident, synthetic=target.synthetic, limit_bytes=target.limit_bytes),
        (config,),
        partial(process_memory.check_limit, process_limit) if process_limit else None,
    )
    timeout_s = WARM_UP_TIMEOUT_S + TIMEOUT_STEPS * step_s
    (measurement,) = measure([candidate], seconds, rounds, deadline, timeout_s, show_progress=False)
    if measurement.error is None and not measurement.rates:
        measurement.error = "not measured"
    is_late = deadline is not None and time.monotonic() > deadline
    if is_late and measurement.error is not None and not process_memory.is_out_of_memory(measurement.error):
        raise OutOfTime(measurement.error)
    return _trial(batch_size, measurement, process_limit)


def _trial(batch_size: int, measurement: Measurement, limit_bytes: int | None) -> Trial:
    trial = Trial(batch_size, error=measurement.error)
    if measurement.error is not None:
        return trial
    trial.rates = measurement.rates
    for name in ("memory_gib", "reserved_gib", "device_memory_gib", "gpu_memory_gib"):
        setattr(trial, name, measurement.details.get(name))
    if limit_bytes is not None and trial.memory_gib is None:
        trial.error = f"the memory is unknown ({measurement.details.get('details_error')})"
    # the limit may have been exceeded after the last check of the process
    if limit_bytes is not None and (trial.memory_gib or 0) * process_memory.GIB > limit_bytes:
        trial.error = process_memory.limit_error(limit_bytes)
    return trial


def with_batch_size(config: Config, batch_size: int) -> Config:
    """Return a config whose batches have `batch_size` images: samples of one view each, as a step costs the same."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch_size, "views": 1})})


def doublings(measure_size: Callable[[int], Trial], first: int, maximum: int | None) -> Iterator[Trial]:
    """Measure batch sizes from `first` to `maximum`, each twice the previous one, and yield the trials.

    The search stops after the first size that fails or does not fit. The last size is `maximum`, even if that is less
    than twice the previous one. If `maximum` is None, there is no limit.
    """
    batch_size = first if maximum is None else min(first, maximum)
    while True:
        trial = measure_size(batch_size)
        yield trial
        if not trial.fits or batch_size == maximum:
            return
        batch_size = 2 * batch_size if maximum is None else min(2 * batch_size, maximum)


def bisection(measure_size: Callable[[int], Trial], fits: int, too_large: int, tolerance: float) -> Iterator[Trial]:
    """Bisect between a size that fits and one that does not, and yield the trials.

    The bisection ends when the two sizes differ by at most 1, or by at most `tolerance` times the size that fits. It
    stops early after an error other than out of memory.
    """
    while too_large - fits > max(1, int(fits * tolerance)):
        middle = (fits + too_large) // 2
        trial = measure_size(middle)
        yield trial
        if trial.is_failure:
            return
        fits, too_large = (middle, too_large) if trial.fits else (fits, middle)


@dataclass
class BatchSizeSearch:
    """Search for batch sizes of one model. `end` is the reason why the search ended, or empty while it runs."""

    target: Target
    trials: list[Trial] = field(default_factory=list)
    end: str = ""  # memory, most, time, error, interrupted

    @property
    def by_size(self) -> list[Trial]:
        return sorted(self.trials, key=lambda trial: trial.batch_size)

    @property
    def fitting(self) -> list[Trial]:
        return [trial for trial in self.by_size if trial.fits]

    @property
    def largest(self) -> int | None:
        return self.fitting[-1].batch_size if self.fitting else None

    @property
    def reliable(self) -> list[Trial]:
        """Fitting trials by ascending batch size, without bisection trials that have not been repeated.

        Bisection trials may have a single round until they are repeated. They are included if no other trial fits.
        """
        fitting = self.fitting
        return [trial for trial in fitting if trial.origin == "doubling" or trial.is_repeated] or fitting

    @property
    def best(self) -> Trial | None:
        """The fastest of the reliable trials, or None if no trial fits."""
        return max(self.reliable, key=lambda trial: trial.rate, default=None)

    @property
    def too_large(self) -> int | None:
        """The smallest batch size that did not fit, or None if there is none."""
        sizes = (trial.batch_size for trial in self.trials if not trial.fits and not trial.is_failure)
        return min(sizes, default=None)

    @property
    def failure(self) -> Trial | None:
        """The first trial that ended with an error other than out of memory, or None if there is none."""
        return next((trial for trial in self.trials if trial.is_failure), None)

    def run(
        self, measure_size: Callable[[int, str], Trial], *, first: int, maximum: int | None, tolerance: float
    ) -> Iterator[Trial]:
        """Run the search and yield each trial after it is measured.

        Args:
            measure_size: Called with a batch size and the origin of the trial: "doubling", "bisection" or "repeat". It
                may raise OutOfTime to end the search.
            first: Batch size to start with.
            maximum: Maximum batch size, or None for no limit.
            tolerance: See `bisection`.
        """
        try:
            yield from self._recorded(doublings(lambda size: measure_size(size, "doubling"), first, maximum))
            if self.largest is not None and self.too_large is not None:
                between = bisection(
                    lambda size: measure_size(size, "bisection"), self.largest, self.too_large, tolerance
                )
                yield from self._recorded(between)
        except OutOfTime:
            self.end = "time"
            return
        with suppress(OutOfTime):  # the search is complete
            yield from self._repeats(lambda size: measure_size(size, "repeat"))
        self.end = "error" if self.failure else "memory" if self.too_large is not None else "most"

    def _recorded(self, trials: Iterator[Trial]) -> Iterator[Trial]:
        for trial in trials:
            self.trials.append(trial)
            yield trial

    def _repeats(self, measure_size: Callable[[int], Trial]) -> Iterator[Trial]:
        """Measure the largest and the fastest size again, and yield the updated trials.

        This continues until both have been repeated, since new results may change which sizes are the largest and the
        fastest. The new rounds are added to the earlier ones. For a bisection trial, they replace the earlier ones,
        since a size that is the fastest in a single round is probably an outlier.
        """
        while self.fitting:
            fastest = max(self.fitting, key=lambda trial: trial.rate)
            trial = next((trial for trial in (self.fitting[-1], fastest) if not trial.is_repeated), None)
            if trial is None:
                return
            repeat = measure_size(trial.batch_size)
            trial.is_repeated, trial.error = True, repeat.error
            trial.rates = repeat.rates if trial.origin == "bisection" else trial.rates + repeat.rates
            for name in ("memory_gib", "reserved_gib", "device_memory_gib"):
                peaks = filter(None, (getattr(trial, name), getattr(repeat, name)))
                setattr(trial, name, max(peaks, default=None))
            yield trial


def search_fastest(config: Config, seconds: float, rounds: int, deadline: float | None) -> Iterator[Trial]:
    """Measure the batch sizes in SIZES in ascending order and yield the trials.

    The search stops after the first size that does not fit, fails, or is less than MIN_GAIN times as fast as the
    previous one. It also stops at the deadline.
    """
    target = Target(config.model.name, config, on_gpu=torch.cuda.is_available())
    measure_size = partial(run_trial, target, seconds=seconds, rounds=rounds, deadline=deadline)
    best_rate = 0.0
    with suppress(OutOfTime):
        for trial in doublings(measure_size, SIZES[0], SIZES[-1]):
            yield trial
            if not trial.fits or trial.rate < MIN_GAIN * best_rate:
                return
            best_rate = trial.rate
