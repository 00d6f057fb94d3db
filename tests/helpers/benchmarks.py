"""Benchmark candidates that run, fail or die, and a run in the format of tools/benchmark.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.benchmarks.engine import results
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.engine.run_file import Run, RunFile
from tools.benchmarks.suites.settings import Settings

UNITS = 7


def settings_in(folder: Path, **settings: Any) -> Settings:
    return Settings(**{"device": "cpu", "scratch": folder, "data": folder, "seconds": 0.02, "rounds": 1, **settings})


def empty_record(*files: Path, earlier: Run | None = None) -> RunFile:
    environment = {"device": "Test", "date": "2026-11-23", "versions": {}}
    return RunFile(Run(environment=environment, missing_peers=[]), files, earlier)


@contextmanager
def steady(seconds: float = 0.001) -> Iterator[dict[str, Workload]]:
    """Yield items that take `seconds` each."""

    def items() -> Iterator[None]:
        while True:
            time.sleep(seconds)
            yield

    yield {"": Workload(items(), UNITS, lambda: {"pid": os.getpid()})}


@contextmanager
def dies_before_details() -> Iterator[dict[str, Workload]]:
    """Yield items, and end the process when the details are requested."""

    def die() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    yield {"": Workload(iter(lambda: time.sleep(0.001), 0), UNITS, die)}


@contextmanager
def sleeps() -> Iterator[dict[str, Workload]]:
    """Never finish building."""
    time.sleep(600)
    yield {}


@contextmanager
def cannot_be_built() -> Iterator[dict[str, Workload]]:
    raise RuntimeError("no such\nlibrary")
    yield {}


@contextmanager
def half_broken() -> Iterator[dict[str, Workload]]:
    """Build a valid workload and one that fails at its first item."""

    def broken() -> Iterator[None]:
        raise MemoryError("out of memory")
        yield

    with steady() as workloads:
        yield {"broken": Workload(broken(), UNITS), "good": workloads[""]}


@contextmanager
def dies(after: int) -> Iterator[dict[str, Workload]]:
    """Kill the process after some items of at least 30 ms."""

    def items() -> Iterator[None]:
        for _ in range(after):
            time.sleep(0.03)
            yield
        os.kill(os.getpid(), signal.SIGKILL)

    yield {"": Workload(items(), UNITS, prefetches=False)}


@contextmanager
def grows() -> Iterator[dict[str, Workload]]:
    """Allocate 512 MiB more with every item."""

    def items() -> Iterator[None]:
        held = []
        while True:
            held.append(b"x" * 2**29)
            time.sleep(0.001)
            yield

    yield {"": Workload(items(), UNITS)}


@contextmanager
def counts_in_a_thread(path: str) -> Iterator[dict[str, Workload]]:
    """Append a byte to a file every millisecond in a thread, like a prefetcher."""
    import threading

    def work() -> None:
        with open(path, "ab", buffering=0) as file:
            while True:
                file.write(b".")
                time.sleep(0.001)

    threading.Thread(target=work, daemon=True).start()
    with steady() as workloads:
        yield workloads


DISK = {"name": "disk", "ours": False, "error": None, "unit": "GB/s", "value": 2.0}
SPEEDRUN = {"name": "94", "ours": True, "error": None, "runs": 10, "time_s_mean": 2.5}


def a_run(device: str = "Test Processor", **environment: Any) -> Run:
    """Return a small run that contains a failure."""
    common = {"device": "cpu", "batch_size": 512, "error": None}

    def row(name: str, rate: float, ours: bool = False, **facts: Any) -> dict[str, Any]:
        figures = {"images_per_s": rate, "lowest": rate * 0.9, "highest": rate * 1.1}
        return {"name": name, "ours": ours, **common, **figures, **facts}

    bound = {"bound": {"name": "one copy of the bytes", "images_per_s": 4e6}, "share": 0.5, "binds": "latency"}
    loading = [
        row("Model Zhu", 2e6, True, encoding="npy", **bound),
        row("FFCV", 1e6, encoding="npy", ratio=2.0),
        results.new_row("webdataset", ours=False, error="OSError: no | space"),
    ]
    training = [
        row("Model Zhu, resident batch", 6000.0, True, share=0.1, bound=bound["bound"], binds="the step"),
        row("Model Zhu, end to end", 5900.0, True, of_resident=0.9833),
        row("timm's loop", 3000.0, ratio=1.97),
    ]
    scale = [
        {
            "name": "10,000 samples",
            "ours": True,
            "error": None,
            "samples": 10_000,
            "total_us": 3.2,
            "loader_us": 3.0,
            "order_us": 0.1,
            "draws_us": 0.1,
            "first_batch_s": 0.02,
            "memory_mib": 30.0,
        }
    ]
    facts = {
        "device": device,
        "processor": device,
        "cores": 2,
        "python": "3.11",
        "date": "2026-11-23",
        "versions": {"torch": "2.15"},
        **environment,
    }
    return Run(
        command="python tools/benchmark.py all",
        duration_s=60.0,
        environment=facts,
        missing_peers=["FFCV"],
        groups=[
            {"title": "32x32 raw, reading alone", "stage": "reading", "rows": loading},
            {"title": "LeNet", "stage": "training", "rows": training},
            {"title": "Limits", "stage": "limits", "rows": [DISK]},
            {"title": "Scale", "stage": "scale", "rows": scale},
            {"title": "Speedruns", "stage": "speedrun", "columns": ["runs", "time_s_mean"], "rows": [SPEEDRUN]},
        ],
    )
