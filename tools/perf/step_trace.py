"""Measure the time of training steps by phase with a profiler trace.

Each moment belongs to one phase, so that the phases add up to the wall time. On the CPU, a moment belongs to the phase
of the training thread. On a GPU, it belongs to the phase that launched the device's current work, since the host runs
ahead of the device. While the device is idle, a moment belongs to `data` if the host waits for a batch. `reduce` is the
part of the all-reduce during which nothing else is computed, since an all-reduce that overlaps with backward does not
take extra time. The rest is `host`.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from pipelines.loader.batches import Batch
from pipelines.loader.train_loader import TrainLoader
from train.engine.state import TrainState
from train.optim.freeze import set_training_mode
from train.throughput import endless_batches, full_step

DATA, FORWARD, BACKWARD, OPTIMIZER, REDUCE, HOST = "data", "forward", "backward", "optimizer", "reduce", "host"
PROXY = "proxy"  # sample selection by train.proxy
PHASES = (DATA, HOST, PROXY, FORWARD, BACKWARD, REDUCE, OPTIMIZER)
PREFIX = "step: "  # of range names in the trace
WINDOW = f"{PREFIX}all of them"
WARM_STEPS = 3
MAX_OPERATORS = 10
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
Interval = tuple[float, float]
Claim = tuple[str, Sequence[Interval]]  # a phase, and the intervals that it claims
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Event(TypedDict, total=False):
    """Event of a Chrome trace. Times are in µs."""

    ph: str  # "X" for complete events, which have a duration
    name: str
    cat: str
    ts: float  # start
    dur: float
    tid: int | str
    args: dict[str, object]


@dataclass(frozen=True)
class Phase:
    """Time of a phase, and its share of the step."""

    phase: str
    ms: float
    share: float


@dataclass(frozen=True)
class Operator:
    """Time of an operator, without called operators, or of a kind of kernel."""

    name: str
    ms: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """Mean time of a micro-step by phase, and the operators or kernels that took the most time."""

    steps: int
    step_ms: float
    phases: list[Phase]  # their times add up to step_ms
    operators: list[Operator]  # per step


def profile_steps(state: TrainState, loader: TrainLoader, steps: int, trace: Path) -> StepProfile:
    """Profile `steps` micro-steps and write the trace in Chrome's format (.json.gz).

    `steps` is rounded up to whole optimizer steps. WARM_STEPS micro-steps run first and are not counted. All other
    ranks must call `run_alongside` at the same time.
    """
    accumulation = state.config.accumulation_steps
    steps = -(-steps // accumulation) * accumulation
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without a GPU, Kineto logs an error
    on_gpu = state.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    batches = endless_batches(loader)
    with annotate_phases(state):
        with torch.profiler.profile(activities=activities):
            _run(state, batches, WARM_STEPS)  # the first use of the profiler is slow
        with torch.profiler.profile(activities=activities) as profiler, record_function(WINDOW):
            _run(state, batches, steps)
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events: list[Event] = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    times = phase_times(events)
    total = sum(times.values())
    operators = top_kernels(events) if on_gpu else top_operators(profiler)
    return StepProfile(
        steps=steps,
        step_ms=total / 1e3 / steps,
        phases=[Phase(name, time / 1e3 / steps, time / total) for name, time in times.items()],
        operators=[Operator(each.name, each.ms / steps, each.calls / steps) for each in operators],
    )


def run_alongside(state: TrainState, loader: TrainLoader, steps: int) -> None:
    """Run the same steps as `profile_steps`, on a rank that does not profile."""
    batches = endless_batches(loader)
    _run(state, batches, WARM_STEPS)
    _run(state, batches, steps)


def _run(state: TrainState, batches: Iterator[Batch], count: int) -> None:
    """Run `count` micro-steps, rounded up to whole optimizer steps, and wait for the device."""
    set_training_mode(state.forward)
    for step in range(-(-count // state.config.accumulation_steps)):
        full_step(state, _annotated(batches), step)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)


def _annotated(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, and mark the time to get each of them as phase DATA."""
    while True:
        with record_function(PREFIX + DATA):
            batch = next(batches)
        yield batch


@contextmanager
def annotate_phases(state: TrainState) -> Iterator[None]:
    """Mark the phases of `run_step` in this context as named ranges in the profiler's trace.

    The functions that a step calls are wrapped temporarily, so the code of the step contains no annotations.
    """
    inside = False

    def annotated(function: Callable[Parameters, Result], phase: str) -> Callable[Parameters, Result]:
        def call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            nonlocal inside
            if inside:  # a nested call, such as the backward pass of the proxy
                return function(*arguments, **keywords)
            inside = True
            try:
                with record_function(PREFIX + phase):
                    return function(*arguments, **keywords)
            finally:
                inside = False

        return call

    functions: list[tuple[object, str, str]] = [
        (state, "loss_and_counts", FORWARD),
        (torch.Tensor, "backward", BACKWARD),
        (state.scaler, "unscale_", OPTIMIZER),
        (nn.utils, "clip_grad_norm_", OPTIMIZER),
        (state.scaler, "step", OPTIMIZER),
        (state.scaler, "update", OPTIMIZER),
        (state.optimizer, "zero_grad", OPTIMIZER),
    ]
    averages = [average for average in (state.lookahead, state.ema) if average is not None]
    functions += [(average, "update", OPTIMIZER) for average in averages]
    if state.proxy is not None:
        functions.append((state.proxy, "select", PROXY))
    with ExitStack() as stack:
        for owner, name, phase in functions:
            stack.enter_context(mock.patch.object(owner, name, annotated(getattr(owner, name), phase)))
        yield


def phase_times(events: Sequence[Event]) -> dict[str, float]:
    """Return the time in µs of each phase within the profiled window.

    `events` are the complete events ("ph": "X") of a Chrome trace. The window is the event named WINDOW. PROXY
    is included only if it occurs.
    """
    (window,) = (event for event in events if event["name"] == WINDOW and event["cat"] == "user_annotation")
    thread = window["tid"]
    ranges: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event["cat"] == "user_annotation" and event["tid"] == thread and event["name"].startswith(PREFIX):
            ranges[event["name"].removeprefix(PREFIX)].append(_span(event))
    is_on_gpu = any(event["cat"] in DEVICE_WORK for event in events)
    claims = _device_claims(events, ranges, thread) if is_on_gpu else _host_claims(events, ranges, thread)
    times = exclusive_times(claims, _span(window))
    return {phase: times.get(phase, 0.0) for phase in PHASES if phase != PROXY or ranges[PROXY]}


def _host_claims(events: Sequence[Event], ranges: dict[str, list[Interval]], thread: int | str) -> list[Claim]:
    """Return phases and the intervals they claim on the CPU, in order of precedence. A phase may occur several times.

    During backward the training thread issues all-reduces, computes, or waits while other threads reduce.
    """
    own = [event for event in events if event["cat"] == "cpu_op" and event["tid"] == thread]
    requested = [_span(event) for event in own if event["name"].startswith("c10d::")]
    computed = [_span(event) for event in own]
    reduced = [_span(event) for event in events if "all_reduce" in event["name"] and event["tid"] != thread]
    edges = [-math.inf, *itertools.chain(*sorted(ranges[BACKWARD])), math.inf]
    between = list(zip(edges[::2], edges[1::2], strict=True))  # backward passes
    return [
        *((phase, ranges[phase]) for phase in (DATA, PROXY, FORWARD, OPTIMIZER)),
        (HOST, between),
        (REDUCE, requested),
        (BACKWARD, computed),
        (REDUCE, reduced),
        (BACKWARD, ranges[BACKWARD]),
    ]


def _device_claims(events: Sequence[Event], ranges: dict[str, list[Interval]], thread: int | str) -> list[Claim]:
    """Return phases and the intervals they claim on a GPU, in order of precedence.

    GPU work belongs to the phase that launched it, except for NCCL kernels, which belong to `reduce`. Work launched by
    threads other than the training and autograd threads belongs to `data`, since the loader launched it. `data` has the
    lowest precedence, and also claims the time in which the host waits for a batch.
    """
    training_threads = {thread} | {
        event["tid"] for event in events if event["name"].startswith("autograd::engine::evaluate")
    }
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event["cat"] in LAUNCHES and "correlation" in event.get("args", {})
    }
    spans = sorted(
        (start, end, phase)
        for phase, intervals in ranges.items()
        if f"{PREFIX}{phase}" != WINDOW
        for start, end in intervals
    )
    work: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event["cat"] not in DEVICE_WORK:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if "nccl" in event["name"].lower():
            work[REDUCE].append(_span(event))
        elif launch is not None:
            work[_phase_at(launch["ts"], spans) if launch["tid"] in training_threads else DATA].append(_span(event))
    computed = [(phase, work[phase]) for phase in (FORWARD, BACKWARD, OPTIMIZER, PROXY, HOST)]
    return [*computed, (REDUCE, work[REDUCE]), (DATA, work[DATA] + ranges[DATA])]


def _phase_at(moment: float, spans: list[tuple[float, float, str]]) -> str:
    """Return the phase whose span contains the moment, or HOST if none does.

    `spans` are (start, end, phase), sorted by start and without overlaps.
    """
    position = bisect.bisect_right(spans, moment, key=lambda span: span[0]) - 1
    return spans[position][2] if position >= 0 and moment <= spans[position][1] else HOST


def exclusive_times(claims: Sequence[Claim], window: Interval) -> dict[str, float]:
    """Return how much of the window's time belongs to each phase, without counting any moment twice.

    A moment belongs to the first claim that contains it, or to HOST if none does.
    """
    claims = [*claims, (HOST, [window])]
    spans = [np.reshape(intervals, (-1, 2)).clip(*window) for _, intervals in claims]
    edges = np.unique(np.concatenate(spans))
    owners = np.zeros(len(edges) - 1, np.int64)  # number of the claim that the time between two edges belongs to
    for number, span in reversed(list(enumerate(spans))):
        for first, last in np.searchsorted(edges, span):
            owners[first:last] = number
    times: dict[str, float] = defaultdict(float)
    for (name, _), duration in zip(claims, np.bincount(owners, np.diff(edges), len(claims)).tolist(), strict=True):
        times[name] += duration
    return dict(times)


def _span(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def top_operators(profiler: torch.profiler.profile) -> list[Operator]:
    """Return the (at most MAX_OPERATORS) operators that took the most CPU time, with their totals."""
    entries = [entry for entry in profiler.key_averages() if not entry.is_user_annotation]
    entries.sort(key=lambda entry: entry.self_cpu_time_total, reverse=True)
    return [Operator(entry.key, entry.self_cpu_time_total / 1e3, entry.count) for entry in entries[:MAX_OPERATORS]]


def top_kernels(events: Sequence[Event]) -> list[Operator]:
    """Return the (at most MAX_OPERATORS) kernels, memcpys and memsets that took the most time, with their totals."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] in DEVICE_WORK:
            times[event["name"]].append(event["dur"])
    longest = sorted(times.items(), key=lambda item: sum(item[1]), reverse=True)
    return [Operator(name, sum(spans) / 1e3, len(spans)) for name, spans in longest[:MAX_OPERATORS]]
