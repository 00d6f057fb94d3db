"""Where the time of training steps goes: phases named from outside of the step, and their times read from the trace.

A moment belongs to one phase, so that the phases add up to the wall time. On the CPU it is the phase that the training
thread is in. On a GPU it is the phase that launched what the device is computing, since the host runs ahead; while the
device rests, it is `data` if the host waits for a batch. Of the all-reduce only that counts as `reduce` during which
nothing else is computed: what hides behind backward costs nothing. The rest is `host`.
"""

from __future__ import annotations

import bisect
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from train.engine.state import TrainState
from train.engine.step import run_step
from train.optim.freeze import set_training_mode
from train.throughput import endless_batches

DATA, FORWARD, BACKWARD, OPTIMIZER, REDUCE, HOST = "data", "forward", "backward", "optimizer", "reduce", "host"
PROXY = "proxy"  # the choice of samples, where train.proxy is on
PHASES = (DATA, HOST, PROXY, FORWARD, BACKWARD, REDUCE, OPTIMIZER)
PREFIX = "step: "  # of the ranges' names in the trace
WINDOW = f"{PREFIX}all of them"
WARM_STEPS = 3
TOP = 10
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
Interval = tuple[float, float]
Event = dict[str, Any]


@dataclass(frozen=True)
class StepProfile:
    """Of `steps` steps: ms per step by phase, which add up to step_ms; the operators or kernels that took most."""

    steps: int
    step_ms: float
    phases: dict[str, float]
    operators: list[dict[str, Any]]  # name, ms (its own, per step), calls (per step)


def profile_steps(training: TrainState, loader: Loader, steps: int, trace: Path) -> StepProfile:
    """Profile so many steps with data of the loader, and write their Chrome trace (.json.gz).

    Other ranks must `run_alongside` meanwhile.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # quiet: else it calls it an error that there is no GPU
    on_gpu = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    batches = endless_batches(loader)
    with annotate_phases(training):
        with torch.profiler.profile(activities=activities):
            _run(training, batches, WARM_STEPS)  # the first use of the profiler takes its time
        with torch.profiler.profile(activities=activities) as profiler, record_function(WINDOW):
            _run(training, batches, steps)
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events: list[Event] = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    times = phase_times(events)
    total = sum(times.values())
    operators = top_kernels(events) if on_gpu else top_operators(profiler)
    per_step = [{**each, "ms": each["ms"] / steps, "calls": each["calls"] / steps} for each in operators]
    return StepProfile(steps, total / 1e3 / steps, {name: time / 1e3 / steps for name, time in times.items()}, per_step)


def run_alongside(training: TrainState, loader: Loader, steps: int) -> None:
    """The steps of another rank that profiles."""
    batches = endless_batches(loader)
    _run(training, batches, WARM_STEPS)
    _run(training, batches, steps)


def _run(training: TrainState, batches: Iterator[Batch], count: int) -> None:
    """So many steps, and the wait until the device has done them."""
    set_training_mode(training.forward)
    for number in range(1, count + 1):
        with record_function(PREFIX + DATA):
            batch = next(batches)
        run_step(training, batch, number, optimizer_step=number % training.config.accumulation_steps == 0)
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)


@contextmanager
def annotate_phases(training: TrainState) -> Iterator[None]:
    """Inside, the phases of a step are ranges in a profile. They are put around what the step calls, for this time
    only: the step itself knows nothing of it."""
    inside = False

    def ranged(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            if inside:  # the proxy's backward is the proxy's
                return function(*arguments, **named)
            inside = True
            try:
                with record_function(PREFIX + phase):
                    return function(*arguments, **named)
            finally:
                inside = False

        return call

    places: list[tuple[Any, str, str]] = [
        (training, "loss_and_counts", FORWARD),
        (torch.Tensor, "backward", BACKWARD),
        (training.scaler, "unscale_", OPTIMIZER),
        (nn.utils, "clip_grad_norm_", OPTIMIZER),
        (training.scaler, "step", OPTIMIZER),
        (training.scaler, "update", OPTIMIZER),
        (training.optimizer, "zero_grad", OPTIMIZER),
    ]
    if training.proxy is not None:
        places.append((training.proxy, "select", PROXY))
    with ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(_replaced(owner, name, ranged(getattr(owner, name), phase)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)  # a method of its class shows again


def phase_times(events: Sequence[Event]) -> dict[str, float]:
    """Microseconds of the whole window by phase; events: the complete ones ("ph": "X") of a Chrome trace."""
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


def _host_claims(
    events: Sequence[Event], ranges: dict[str, list[Interval]], thread: Any
) -> list[tuple[str, list[Interval]]]:
    """In backward the thread computes, or waits for the all-reduces that other threads do, or sees to autograd."""
    here = [event for event in events if event["cat"] == "cpu_op" and event["tid"] == thread]
    asked = [_span(event) for event in here if event["name"].startswith("c10d::")]
    computed = [_span(event) for event in here]
    reduced = [_span(event) for event in events if "all_reduce" in event["name"] and event["tid"] != thread]
    whole = [(phase, ranges[phase]) for phase in (DATA, PROXY, FORWARD, OPTIMIZER)]
    within = [
        (phase, intersect(spans, ranges[BACKWARD]))
        for phase, spans in ((REDUCE, asked), (BACKWARD, computed), (REDUCE, reduced))
    ]
    return [*whole, *within, (BACKWARD, ranges[BACKWARD])]


def _device_claims(
    events: Sequence[Event], ranges: dict[str, list[Interval]], thread: Any
) -> list[tuple[str, list[Interval]]]:
    """What the device does belongs to the phase in which the training thread, or autograd's, launched it.

    Other threads than these are the loader's.
    """
    ours = {thread} | {event["tid"] for event in events if event["name"].startswith("autograd::engine::evaluate")}
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event["cat"] in LAUNCHES and "correlation" in event.get("args", {})
    }
    spans = sorted(
        (begin, end, phase)
        for phase, intervals in ranges.items()
        if f"{PREFIX}{phase}" != WINDOW
        for begin, end in intervals
    )
    work: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event["cat"] not in DEVICE_WORK:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if "nccl" in event["name"].lower():
            work[REDUCE].append(_span(event))
        elif launch is not None:
            work[_phase_at(launch["ts"], spans) if launch["tid"] in ours else DATA].append(_span(event))
    computed = [(phase, work[phase]) for phase in (FORWARD, BACKWARD, OPTIMIZER, PROXY, HOST)]
    return [*computed, (REDUCE, work[REDUCE]), (DATA, work[DATA] + ranges[DATA])]


def _phase_at(moment: float, spans: list[tuple[float, float, str]]) -> str:
    """The phase whose range holds the moment; ranges do not overlap."""
    position = bisect.bisect_right(spans, moment, key=lambda span: span[0]) - 1
    return spans[position][2] if position >= 0 and moment <= spans[position][1] else HOST


def exclusive_times(claims: Sequence[tuple[str, list[Interval]]], window: Interval) -> dict[str, float]:
    """Time of the window by name: a moment belongs to the first that claims it, what nobody claims to HOST."""
    times: dict[str, float] = defaultdict(float)
    taken: list[Interval] = []
    for name, intervals in claims:
        before = _length(taken)
        taken = merge([*taken, *intersect(intervals, [window])])
        times[name] += _length(taken) - before
    times[HOST] += window[1] - window[0] - _length(taken)
    return dict(times)


def merge(intervals: list[Interval]) -> list[Interval]:
    """The same moments as sorted intervals that do not touch."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def intersect(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """The moments that lie in both."""
    result, first, second = [], merge(left), merge(right)
    i = j = 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            result.append((begin, end))
        i, j = (i + 1, j) if first[i][1] < second[j][1] else (i, j + 1)
    return result


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _span(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def top_operators(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    """The operators that took most of the CPU's time themselves, in ms, all calls together."""
    entries = [entry for entry in profiler.key_averages() if not entry.is_user_annotation]
    entries.sort(key=lambda entry: entry.self_cpu_time_total, reverse=True)
    return [{"name": e.key, "ms": e.self_cpu_time_total / 1e3, "calls": e.count} for e in entries[:TOP]]


def top_kernels(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The kernels and copies that took most of the GPU's time, in ms, all calls together."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] in DEVICE_WORK:
            times[event["name"]].append(event["dur"])
    longest = sorted(times.items(), key=lambda item: sum(item[1]), reverse=True)
    return [{"name": name, "ms": sum(spans) / 1e3, "calls": len(spans)} for name, spans in longest[:TOP]]
