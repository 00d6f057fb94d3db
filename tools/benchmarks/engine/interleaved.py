"""Contestants take turns in short rounds, each in a process of its own that is stopped while the others run.

A noisy machine then slows all alike, no thread pool or worker of one disturbs another, and one that fails, crashes or
runs out of memory costs its own row and nothing else. Streams of any unit take part, not of images alone.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from tools.benchmarks.engine.candidate import Candidate, Workload, serve

WARM_UP_TIMEOUT_S = 300.0  # for one contestant to build, compile and warm up
OUT_OF_TIME = "not measured: the time of the run was over"  # the error of what a deadline left out or cut off
GRACE_S = 5.0  # after the deadline, for a round that has begun
MONITOR_INTERVAL_S = 0.02  # between two looks of a contestant's watch
# imported once for all contestants; beside a GPU not DALI, since a process forked after CUDA started could not use it
PRELOADED, PRELOADED_ON_GPU = (
    ["torch", "torchvision", "pipelines.build", "train.engine.epoch"],
    ["torch", "torchvision"],
)


@dataclass
class Measurement:
    """What one stream reached; `error` where it failed, possibly after some rounds."""

    candidate: str
    workload: str
    rates: list[float] = field(default_factory=list)  # units/s, one per round
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def rate(self) -> float:
        """The median round."""
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
    """Outcomes of all streams in the order of the contestants; rounds last `seconds` each.

    deadline, of time.monotonic(): what is not warm by then has the error TIME_OVER; rounds after it are left out.
    patience_s: for one contestant to build and warm up. after_round: called with what has been measured so far.
    """

    def timeout(longest: float, grace: float = 0.0) -> tuple[float, str | None]:
        """How long to wait for an answer, and what none means where it is the deadline that ends the wait."""
        left = math.inf if deadline is None else max(1.0, deadline + grace - time.monotonic())
        return (longest, None) if longest <= left else (left, OUT_OF_TIME)

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
                        process.turn(measurement, *timeout(max(60 * seconds + 60, warm_up_timeout_s / 5), GRACE_S))
            after_round(measurements)
        for process, workloads in started:
            process.finish(workloads)
    return measurements


def run_in_subprocess(function: Callable[..., Any], *arguments: Any, deadline: float | None = None) -> Any:
    """Call a function in a process of its own and return its result.

    The calling process stays without a CUDA context. Raises TimeoutError where the deadline ends the call, and
    RuntimeError with the sentence of what failed.
    """
    candidate = Candidate(getattr(function, "__name__", ""), _called_once, (function, arguments))
    (measurement,) = measure([candidate], 0.001, 1, deadline, show_progress=False)
    if measurement.error == OUT_OF_TIME:
        raise TimeoutError(OUT_OF_TIME)
    if measurement.error is not None:
        raise RuntimeError(measurement.error)
    return measurement.details["result"]


@contextmanager
def _called_once(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[dict[str, Workload]]:
    result = function(*arguments)
    yield {"": Workload(itertools.repeat(None), 1, lambda: {"result": result}, prefetches=False)}


class _CandidateProcess:
    """One contestant's process, stopped (SIGSTOP, with its workers) whenever it is not its turn."""

    def __init__(self, candidate: Candidate, seconds: float) -> None:
        self._candidate, self._seconds = candidate, seconds

    def __enter__(self) -> _CandidateProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED_ON_GPU if torch.cuda.is_available() else PRELOADED)
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, replace(self._candidate, monitor=None), self._seconds)
        self._process = context.Process(target=serve, args=arguments)
        with _no_interrupt():
            forkserver.ensure_running()
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        if kind is None:  # else the user wants an end, and this may be in the midst of a long step
            self._process.join(10)
        self._signal(signal.SIGKILL)  # also what it left behind
        self._process.kill()
        self._process.join()

    def warm_up(self, timeout: float, timeout_error: str | None) -> list[Measurement]:
        name = self._candidate.name
        reply = self._reply(timeout, timeout_error)
        if isinstance(reply, str):
            return [Measurement(name, "", error=reply)]
        self._signal(signal.SIGSTOP)
        return [Measurement(name, workload, error=error) for workload, error in reply.items()]

    def turn(self, measurement: Measurement, timeout: float, timeout_error: str | None) -> None:
        result = self._ask(measurement.workload, timeout, timeout_error)
        if isinstance(result, str):
            measurement.error = result
        else:
            measurement.rates.append(result)

    def finish(self, measurements: list[Measurement]) -> None:
        details = self._ask(None, 30.0) if any(measurement.rates for measurement in measurements) else {}
        for measurement in measurements:
            if isinstance(details, dict):
                measurement.details = details.get(measurement.workload, {})

    def _ask(self, question: str | None, timeout: float, timeout_error: str | None = None) -> Any:
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self._pipe.send(question)
        reply = self._reply(timeout, timeout_error)
        self._signal(signal.SIGSTOP)
        return reply

    def _reply(self, timeout: float, timeout_error: str | None) -> Any:
        """What the process sends; a sentence where it sends nothing, `silence` if that is given."""
        end, watch = time.monotonic() + timeout, self._candidate.monitor
        try:
            while not self._pipe.poll(timeout if watch is None else MONITOR_INTERVAL_S):
                objection = watch(self._process.pid) if watch and self._process.pid else None
                if objection is not None:
                    self._signal(signal.SIGKILL)
                    return objection
                if time.monotonic() >= end:
                    break
            else:
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return f"the process ended with {how}"
        self._signal(signal.SIGKILL)
        return timeout_error or f"no answer within {timeout:.0f} s"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self._process.pid is not None:
                os.killpg(self._process.pid, number)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started inside never sees a Ctrl-C, which is for this process to act upon."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
