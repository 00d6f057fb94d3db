"""tools/benchmark.py profile: phases add up to the step, on a real CPU run and for a GPU trace."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_config
from helpers.training import CLEAN, ROOT, Run, alone, lenet, make_state, random_batch
from pipelines import build_train_loader
from pipelines.storage.dataset import load_dataset
from tools.benchmarks.engine import gpu_specs
from tools.perf import step_trace
from tools.perf.step_trace import WINDOW
from train.build import build_all
from train.distributed.process_group import Ranks, process_group
from train.engine.warm_up import warm_up

MOMENTS = range(40)
intervals = st.lists(
    st.tuples(st.integers(0, 39), st.integers(0, 39)).map(lambda pair: (min(pair), max(pair))), max_size=8
)


def moments(spans: list[tuple[float, float]]) -> set[int]:
    return {moment for moment in MOMENTS if any(begin <= moment < end for begin, end in spans)}


@given(st.lists(st.tuples(st.sampled_from("abc"), intervals), max_size=5))
def test_every_moment_belongs_to_its_first_claim(claims: Any) -> None:
    times = step_trace.exclusive_times(claims, (5, 30))
    owner = dict.fromkeys(range(5, 30), step_trace.HOST)
    for name, spans in reversed(claims):
        owner.update({moment: name for moment in moments(spans) if 5 <= moment < 30})
    expected = {name: list(owner.values()).count(name) for name in {*times, *owner.values()}}
    assert {name: time for name, time in times.items() if time} == {name: t for name, t in expected.items() if t}
    assert sum(times.values()) == 25


def event(cat: str, name: str, begin: float, end: float, tid: int = 1, correlation: int | None = None) -> Any:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


def test_cpu_time_belongs_to_the_training_thread() -> None:
    """Other threads reduce while it computes or waits. Nothing but the backward pass reduces."""
    events = [
        event("user_annotation", WINDOW, 0, 100),
        event("user_annotation", "step: data", 0, 10),
        event("user_annotation", "step: forward", 10, 30),
        event("user_annotation", "step: backward", 35, 80),
        event("user_annotation", "step: optimizer", 85, 95),
        event("cpu_op", "aten::conv2d", 12, 28),
        event("cpu_op", "aten::convolution_backward", 36, 50),
        event("cpu_op", "c10d::allreduce_", 48, 52),
        event("cpu_op", "aten::zeros", 82, 84),  # between two phases
        event("cpu_op", "gloo:all_reduce", 40, 70, tid=2),  # hidden until 50
        event("cpu_op", "gloo:all_reduce", 75, 90, tid=2),  # ends in the optimizer
    ]
    expected = {"data": 10, "host": 15, "forward": 20, "backward": 18, "reduce": 27, "optimizer": 10}
    # backward: 35-48, 70-75; reduce: 48-70, 75-80; host: 30-35, 80-85, 95-100
    assert step_trace.phase_times(events) == expected


def test_gpu_time_belongs_to_the_launching_phase() -> None:
    """The host runs ahead: forward kernels run while it is in backward or waits for the next batch."""
    events = [
        event("user_annotation", WINDOW, 0, 200),
        event("user_annotation", "step: data", 0, 20),
        event("user_annotation", "step: forward", 20, 30),
        event("user_annotation", "step: backward", 30, 50),
        event("user_annotation", "step: optimizer", 50, 60),
        event("user_annotation", "step: data", 60, 170),
        event("user_annotation", "step: forward", 20, 100, tid=7),  # the device's own row of the same range
        event("cpu_op", "autograd::engine::evaluate_function: ConvolutionBackward0", 31, 49, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 22, 23, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 35, 36, tid=2, correlation=2),  # autograd's thread
        event("cuda_driver", "cuLaunchKernelEx", 55, 56, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 40, 41, tid=3, correlation=4),  # the loader's thread
        event("kernel", "conv", 25, 65, tid=7, correlation=1),
        event("kernel", "conv_backward", 65, 100, tid=7, correlation=2),
        event("kernel", "ncclDevKernel_AllReduce", 90, 110, tid=8, correlation=9),  # hidden until 100
        event("kernel", "adam", 110, 130, tid=7, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD", 95, 140, tid=9, correlation=4),  # hidden until 130
    ]
    times = step_trace.phase_times(events)
    expected = {"data": 60, "host": 35, "forward": 40, "backward": 35, "reduce": 10, "optimizer": 20}
    # data: 0-20 and 130-170, while the device has nothing else to do; host: 20-25, 170-200
    assert times == expected
    assert step_trace.top_kernels(events)[0] == step_trace.Operator("Memcpy HtoD", 0.045, 1)


@pytest.mark.parametrize(
    ("options", "optimizer_ranges"),
    [
        ((), 6 * 3),  # step, update, zero_grad
        (("train.clip_grad_norm=1", "train.accumulation_steps=2", "train.compile=off"), 3 * 5),  # unscale_, clip
        (("train.ema.decay=0.5", "train.lookahead.every_steps=2"), 6 * 5),
    ],
)
def test_phases_add_up_and_annotations_are_removed(
    options: tuple[str, ...], optimizer_ranges: int, digits_run: Run, tmp_path: Path
) -> None:
    config = load_config("configs/digits_lenet.yaml", options, **{"data.path": str(digits_run.data)})
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    with alone() as device:
        accumulation = config.train.accumulation_steps
        loader = build_train_loader(config.data, config.aug, device=device, accumulation_steps=accumulation)
        training = build_all(config, load_dataset(config.data.path), loader.image_size, device)
        loss, own = training.loss_and_counts, set(vars(training.scaler)) | set(vars(training.optimizer))
        found = step_trace.profile_steps(training, loader, 6, tmp_path / "trace.json.gz")
        assert training.loss_and_counts is loss
        assert set(vars(training.scaler)) | set(vars(training.optimizer)) == own
    assert (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_) == (backward, clip)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    (window,) = [event for event in events if event["name"] == WINDOW]
    phases = {phase.phase: phase.ms for phase in found.phases}
    assert sum(phases.values()) == pytest.approx(found.step_ms)
    assert found.step_ms == pytest.approx(window["dur"] / 6e3)
    assert all(phases[name] > 0 for name in ("data", "host", "forward", "backward", "optimizer"))
    assert phases["reduce"] == 0
    assert phases["backward"] > phases["optimizer"]
    ranges = [event["name"] for event in events if str(event["name"]).startswith(step_trace.PREFIX)]
    assert ranges.count("step: forward") == ranges.count("step: backward") == ranges.count("step: data") == 6
    assert ranges.count("step: optimizer") == optimizer_ranges
    assert len(found.operators) == 10
    assert sum(each.ms for each in found.operators) <= found.step_ms
    assert any("convolution_backward" in each.name and each.calls == 2 for each in found.operators)


def test_nested_calls_belong_to_the_outer_phase() -> None:
    """For example the backward pass of the proxy, which is not a part of the model's."""

    def with_backward(*_: object) -> None:
        torch.ones(3, requires_grad=True).sum().backward()

    with alone():
        training = make_state(lenet())
    training.loss_and_counts = with_backward  # type: ignore[assignment]
    with step_trace.annotate_phases(training), torch.profiler.profile() as profiler:
        training.loss_and_counts(training.forward, random_batch(1), 0.0)
        torch.ones(3, requires_grad=True).sum().backward()
    ranges = [e.name for e in profiler.events() or () if e.name.startswith(step_trace.PREFIX)]
    assert ranges == ["step: forward", "step: backward"]


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("options", [(), ("train.compile=off",)])
def test_gpu_phases_add_up(options: tuple[str, ...], digits_run: Run, tmp_path: Path) -> None:
    graph = ("train.cuda_graph=off", *options)
    config = load_config("configs/digits_lenet.yaml", graph, **{"data.path": str(digits_run.data)})
    with process_group(Ranks()) as device:
        loader = build_train_loader(config.data, config.aug, device=device)
        training = build_all(config, load_dataset(config.data.path), loader.image_size, device)
        warm_up(training, loader)
        found = step_trace.profile_steps(training, loader, 6, tmp_path / "trace.json.gz")
    phases = {phase.phase: phase.ms for phase in found.phases}
    assert sum(phases.values()) == pytest.approx(found.step_ms)
    assert all(phases[name] > 0 for name in ("forward", "backward", "optimizer"))
    assert phases["reduce"] == 0
    assert found.operators


@pytest.mark.slow
def test_two_ranks_write_one_profile_with_reduce(digits_run: Run, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tools/benchmark.py"),
        *("profile", "--cfg", "configs/digits_lenet.yaml", "--data-path", digits_run.data),
        *("--steps", 4, "--seconds", 0.1, "--out", tmp_path / "out"),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=CLEAN, check=False)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"profile.json", "profile.csv", "profile.png", "trace.json.gz"}
    content = json.loads((tmp_path / "out" / "profile.json").read_text())
    times = {each["phase"]: each["ms"] for each in content["phases"]}
    assert times["reduce"] > 0
    assert sum(times.values()) == pytest.approx(content["step_ms"])
    assert sum(each["share"] for each in content["phases"]) == pytest.approx(1)
    use = content["arithmetic"]
    assert use["mfu"] == pytest.approx(use["reached_tflop_per_s"] / use["measured_peak_tflop_per_s"], rel=1e-3)
    per_rank = content["images_per_s"]["uncaptured"] / 2
    assert use["reached_tflop_per_s"] * 1e3 == pytest.approx(use["training_gflop_per_image"] * per_rank, rel=1e-3)
    assert done.stdout.count("| backward") == 1
    assert "Model FLOPs utilisation" in done.stdout


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.float16, 756.5),
        ("NVIDIA L40S", torch.float32, 183),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla T4", torch.bfloat16, None),  # it has none
        ("NVIDIA A10G", torch.float16, None),  # no A10
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),  # another chip
    ],
)
def test_peak_flops_match_the_exact_device(device: str, dtype: torch.dtype, teraflops: float | None) -> None:
    found = gpu_specs.peak_flops(device, dtype)
    assert (found and found[0]) == (teraflops and teraflops * 1e12)
