"""Memory in metrics and benchmarks: values and names."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.benchmarks.engine import process_memory as benchmark_memory
from tools.runs.records import summarize_metrics
from train.engine.metrics import GIB, memory_usage


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of 80 GiB: torch uses 3 GiB and reserves 4; DALI's pools and the context use 2 more."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (74 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    return torch.device("cuda", 0)


def test_gpu_memory_is_tensor_peak_and_device_use(gpu: torch.device) -> None:
    assert memory_usage(gpu) == {"memory_gib": 3.0, "device_memory_gib": 6.0}


def test_benchmarks_report_the_same_memory_by_the_same_names(gpu: torch.device) -> None:
    assert benchmark_memory.memory_usage(gpu) == memory_usage(gpu) | {"reserved_gib": 4.0, "gpu_memory_gib": 80.0}


def test_cpu_memory_is_the_resident_set_only() -> None:
    (name,) = found = memory_usage(torch.device("cpu"))
    assert name == "memory_gib"
    assert 0.05 < found[name] < 64
    assert set(benchmark_memory.memory_usage(torch.device("cpu"))) == {"memory_gib"}


def test_cpu_memory_excludes_memory_before_exec(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2**27))  # KiB, as after exec
    assert memory_usage(torch.device("cpu"))["memory_gib"] == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tpython\n")  # a system without /proc
    assert memory_usage(torch.device("cpu"))["memory_gib"] == 128


def test_result_of_run_is_peak_memory_over_epochs() -> None:
    lines = [{"epoch": 0, "memory_gib": 3.0, "device_memory_gib": 6.0}, {"epoch": 1, "memory_gib": 2.0}]
    assert summarize_metrics(lines)["device_memory_gib"] == 6.0
    assert summarize_metrics(lines)["memory_gib"] == 3.0
    assert "device_memory_gib" not in summarize_metrics(lines[1:])
