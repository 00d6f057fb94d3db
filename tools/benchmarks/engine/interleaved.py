"""Interleaved measurement: candidates take turns in short rounds, each in a separate process.

A candidate's process is stopped while other candidates run. A noisy machine therefore slows all candidates alike, and
the threads and workers of one candidate do not disturb another. If a candidate fails, crashes or runs out of memory,
only its own rows are lost.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from tools.benchmarks.engine.candidate import Candidate, Workload, serve

WARM_UP_TIMEOUT_S = 300.0  # time for one candidate to build, compile and warm up
OUT_OF_TIME = "not measured: the time of the run was over"  # error of workloads without a result by the deadline
GRACE_S = 5.0  # time after the deadline for finishing a started round
MONITOR_INTERVAL_S = 0.02
DETAILS_TIMEOUT_S = 30.0
JOIN_TIMEOUT_S = 10.0
# Modules imported once for all candidates. On a GPU, modules that import DALI are left out, since DALI does not work
# in processes forked after CUDA has started.
PRELOADED = ["torch", "torchvision", "pipelines.build", "train.engine.epoch"]
PRELOADED_ON_GPU = ["torch", "torchvision"]
T = TypeVar("T")


@dataclass
class Measurement:
    """Results of one workload.

    `error` is set if the workload failed or ran out of time. The rates of earlier rounds are kept.
    """

    candidate: str
    workload: str
    rates: list[float] = field(default_factory=list)  # units/s, one per round
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def rate(self) -> float:
        """Median per-round rate, in units/s."""
        return median(self.rates)


def measure(
    candidates: list[Candidate],
    seconds: float,
    rounds: int,
    deadline: float | None = None,
    warm_up_timeout_s: float = WARM_UP_TIMEOUT_S,
    show_progress: bool = True,
    after_round: Callable[[list[Measurement]], None] = lambda measurements: None,
) -> list[Measurement]:
    """Measure candidates in interleaved rounds.

    Args:
        candidates: Programs to measure.
        seconds: Approximate duration of a round.
        rounds: Number of rounds per workload.
        deadline: Deadline as a time.monotonic() value, or None for no deadline. Candidates that are not warm by then
            get the error OUT_OF_TIME. Only the first round may start after the deadline.
        warm_up_timeout_s: Time limit for one candidate to build and warm up.
        show_progress: Whether to show progress bars.
        after_round: Called after each round with the measurements so far.

    Returns:
        The measurements of all workloads, in the order of the candidates.
    """

    def timeout(limit_s: float, grace_s: float = 0.0) -> tuple[float, str | None]:
        """Return how many seconds to wait for a reply, and the error to report if none arrives in time.

        The error is None unless the deadline shortens the wait.
        """
        left_s = math.inf if deadline is None else max(1.0, deadline + grace_s - time.monotonic())
        return (limit_s, None) if limit_s <= left_s else (left_s, OUT_OF_TIME)

    round_timeout_s = max(60 * seconds + 60, warm_up_timeout_s / 5)
    measurements: list[Measurement] = []
    with ExitStack() as stack:
        started: list[tuple[_CandidateProcess, list[Measurement]]] = []
        for candidate in tqdm(candidates, desc="warm-up", leave=False, disable=not show_progress):
            if deadline is not None and time.monotonic() > deadline:
                measurements.append(Measurement(candidate.name, "", error=OUT_OF_TIME))
                continue
            process = stack.enter_context(_CandidateProcess(candidate, seconds))
            workloads = process.warm_up(*timeout(warm_up_timeout_s))
            measurements += workloads
            started.append((process, workloads))
        for number in tqdm(range(rounds), desc="rounds", leave=False, disable=not show_progress):
            if number and deadline is not None and time.monotonic() > deadline:
                break
            for process, workloads in started:
                for measurement in workloads:
                    if measurement.error is None:
                        process.run_round(measurement, *timeout(round_timeout_s, GRACE_S))
            after_round(measurements)
        for process, workloads in started:
            process.fetch_details(workloads)
    return measurements


def run_in_subprocess(function: Callable[..., T], *arguments: object, deadline: float | None = None) -> T:
    """Call a function in a subprocess and return its result.

    The function can use CUDA without initializing it in this process.

    Raises:
        TimeoutError: The function did not return before the deadline.
        RuntimeError: The function failed, crashed or took longer than WARM_UP_TIMEOUT_S, or its result could not be
            sent to this process.
    """
    candidate = Candidate(getattr(function, "__name__", ""), _call_once, (function, arguments))
    (measurement,) = measure([candidate], 0.001, 1, deadline, show_progress=False)
    if measurement.error == OUT_OF_TIME:
        raise TimeoutError(OUT_OF_TIME)
    if measurement.error is not None:
        raise RuntimeError(measurement.error)
    if "result" not in measurement.details:
        raise RuntimeError(f"the result could not be sent: {measurement.details.get('details_error')}")
    result: T = measurement.details["result"]
    return result


@contextmanager
def _call_once(function: Callable[..., object], arguments: tuple[object, ...]) -> Iterator[dict[str, Workload]]:
    result = function(*arguments)
    yield {"": Workload(itertools.repeat(None), 1, lambda: {"result": result}, prefetches=False)}


class _CandidateProcess:
    """Process of one candidate. The process and its workers are stopped (SIGSTOP) between its rounds."""

    def __init__(self, candidate: Candidate, seconds: float) -> None:
        self._candidate, self._seconds = candidate, seconds

    def __enter__(self) -> _CandidateProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED_ON_GPU if torch.cuda.is_available() else PRELOADED)
        self._pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, replace(self._candidate, monitor=None), self._seconds)
        self._process = context.Process(target=serve, args=arguments)
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # only this process handles Ctrl-C
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        self._process.start()
        child_pipe.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        if kind is None:  # after an exception such as Ctrl-C, do not wait for a long step
            self._process.join(JOIN_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # also kills workers that the candidate left behind
        self._process.kill()
        self._process.join()

    def warm_up(self, timeout_s: float, timeout_error: str | None) -> list[Measurement]:
        """Wait until the candidate is warm, and return a measurement without rates for each of its workloads.

        If the warm-up of a workload failed, its measurement has the error. If the candidate cannot be built or does not
        reply in time, a single measurement with the error is returned.
        """
        reply = self._receive(timeout_s, timeout_error)
        if isinstance(reply, str):
            reply = {"": reply}
        else:
            self._signal(signal.SIGSTOP)
        return [Measurement(self._candidate.name, workload, error=error) for workload, error in reply.items()]

    def run_round(self, measurement: Measurement, timeout_s: float, timeout_error: str | None) -> None:
        """Run one round and record its rate or error in the measurement."""
        reply = self._request(measurement.workload, timeout_s, timeout_error)
        if isinstance(reply, str):
            measurement.error = reply
        else:
            measurement.rates.append(reply)

    def fetch_details(self, measurements: list[Measurement]) -> None:
        """Fetch the details of all workloads and store them in the measurements.

        If no workload has a rate, the details are empty. If they cannot be fetched, `details_error` gives the reason.
        """
        has_rates = any(measurement.rates for measurement in measurements)
        details = self._request(None, DETAILS_TIMEOUT_S) if has_rates else {}
        for measurement in measurements:
            failed = isinstance(details, str)
            measurement.details = {"details_error": details} if failed else details.get(measurement.workload, {})

    def _request(self, request: str | None, timeout_s: float, timeout_error: str | None = None) -> Any:
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self._pipe.send(request)
        reply = self._receive(timeout_s, timeout_error)
        self._signal(signal.SIGSTOP)
        return reply

    def _receive(self, timeout_s: float, timeout_error: str | None) -> Any:
        """Return the reply of the process, or an error as text.

        The process is killed if it does not reply within `timeout_s` or if the monitor returns a reason.
        """
        end, monitor, reason = time.monotonic() + timeout_s, self._candidate.monitor, None
        try:
            while reason is None and (left_s := end - time.monotonic()) > 0:
                if self._pipe.poll(left_s if monitor is None else MONITOR_INTERVAL_S):
                    return self._pipe.recv()
                reason = monitor(self._process.pid) if monitor and self._process.pid else None
        except (EOFError, OSError):
            self._process.join(JOIN_TIMEOUT_S)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return f"the process ended with {how}"
        self._signal(signal.SIGKILL)
        return reason or timeout_error or f"no answer within {timeout_s:.0f} s"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self._process.pid is not None:
                os.killpg(self._process.pid, number)
