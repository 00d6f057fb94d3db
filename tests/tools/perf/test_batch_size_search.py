"""tools/benchmark.py ramp: the search, memory errors, and that results are kept and no processes remain."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers.benchmarks as fixtures
from configs.load import load_config
from helpers.training import CLEAN, ROOT, Run, restore_signal_handlers
from tools import benchmark
from tools.benchmarks.engine import charts, process_memory, run_file
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import measure
from tools.perf import batch_size_command, batch_size_search, plots
from tools.perf.batch_size_search import BatchSizeSearch, OutOfTime, Target, Trial
from tools.perf.step_report import StepReport
from tools.perf.step_trace import Operator, Phase, StepProfile
from train.reporting.figures import render

ANY_CONFIG: Any = None


def command(*arguments: object) -> list[str]:
    return [sys.executable, "tools/benchmark.py", "ramp", *map(str, arguments)]


def processes_with(mark: str) -> list[str]:
    """Return the command lines of processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and "Z (" not in (folder / "status").read_text():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def wait_for(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def fake(largest: int, *, broken_from: int | None = None, late_from: int | None = None) -> Callable[..., Trial]:
    """Return a trial function that runs nothing. Up to `largest` images fit."""

    def attempt(target: Target, batch: int, *_: object) -> Trial:
        if late_from is not None and batch >= late_from:
            raise OutOfTime
        if broken_from is not None and batch >= broken_from:
            return Trial(batch, error="ValueError: the kernel does not like this size")
        if batch > largest:
            return Trial(batch, error=process_memory.limit_error(2 * process_memory.GIB))
        return Trial(batch, rates=[100.0 * batch, 90.0 * batch, 110.0 * batch], memory_gib=0.5 + 1.5 * batch / largest)

    return attempt


def ramp_with(
    attempt: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str
) -> tuple[int, dict[str, Any]]:
    """Run the stage with this trial function. Return the exit code and ramp.json."""
    monkeypatch.setattr(batch_size_search, "run_trial", attempt)
    parsed = benchmark.parse_arguments(["ramp", "--model", "lenet", "--out", str(out), *arguments])
    return batch_size_command.run(parsed), json.loads((out / "ramp.json").read_text())


def climbed(largest: int, first: int, most: int | None, tolerance: float) -> BatchSizeSearch:
    result = BatchSizeSearch(Target("fake", ANY_CONFIG))
    reach = fake(largest)
    measure_size = lambda batch_size, _: reach(result.target, batch_size)  # noqa: E731
    for _ in result.run(measure_size, first=first, maximum=most, tolerance=tolerance):
        pass
    return result


@given(st.integers(1, 10**6), st.integers(1, 300), st.sampled_from([0.0, 1 / 32, 0.5]))
def test_search_finds_largest_batch_within_tolerance(largest: int, first: int, tolerance: float) -> None:
    result = climbed(largest, first, None, tolerance)
    tried = [size.batch_size for size in result.trials]
    assert len(tried) == len(set(tried))
    if first > largest:
        assert (result.largest, tried) == (None, [first])
        return
    assert result.largest is not None
    assert result.too_large is not None
    assert result.largest <= largest < result.too_large
    assert result.too_large - result.largest <= max(1, tolerance * result.largest)
    assert result.end == "memory"
    if tolerance == 0:
        assert result.largest == largest


@given(st.integers(1, 10**5), st.integers(1, 10**5))
def test_search_ends_at_the_maximum_batch_size(largest: int, most: int) -> None:
    result = climbed(largest, 1, most, 0.0)
    assert result.largest == min(largest, most)
    assert result.end == ("most" if most <= largest else "memory")
    assert max(size.batch_size for size in result.trials) <= most


def test_search_up_to_a_limit_writes_all_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content = ramp_with(fake(100), monkeypatch, tmp_path, "--memory-limit", "2", "--exact")
    assert code == 0
    (found,) = content["models"]
    assert (found["largest_batch"], found["too_large_batch"], found["end"]) == (100, 101, "memory")
    assert (found["best_batch"], found["best_images_per_s"]) == (100, 10_000)
    assert (
        "lenet 32x32: largest batch 100 (101 does not fit into 2 GiB); best 10,000 images/s (9,000 to 11,000)"
        in capsys.readouterr().out
    )
    with (tmp_path / "ramp.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["batch"]) for row in rows] == sorted({1, 2, 4, 8, 16, 32, 64, 96, 100, 101, 102, 104, 112, 128})
    assert {row["fits"] for row in rows} == {"True", "False"}
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")


def test_outlier_round_does_not_make_a_size_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def attempt(target: Target, batch: int, *rest: object) -> Trial:
        tried.append(batch)
        size = fake(100)(target, batch, *rest)
        if size.fits:  # smaller is faster, except in one round of bisection at batch 96
            size.rates = [20_000.0] if batch == 96 and tried.count(96) == 1 else [9_000.0 - batch, 9_200.0 - batch]
        return size

    drawn: list[BatchSizeSearch] = []
    draw = plots.plot_batch_sizes
    monkeypatch.setattr(
        plots, "plot_batch_sizes", lambda searches, *rest: (drawn.extend(searches), draw(searches, *rest))[1]
    )
    code, content = ramp_with(attempt, monkeypatch, tmp_path, "--memory-limit", "2", "--exact", "--rounds", "2")
    (found,) = content["models"]
    assert (code, found["largest_batch"]) == (0, 100)
    assert (found["best_batch"], found["best_images_per_s"]) == (1, 9_099)
    assert (found["best_lowest"], found["best_highest"]) == (8_999, 9_199)
    assert {batch for batch in tried if tried.count(batch) > 1} == {1, 96, 100}
    rounds = {row["batch"]: row["rounds"] for row in content["sizes"]}
    assert (rounds[1], rounds[64], rounds[96], rounds[100]) == (4, 2, 2, 2)
    figure = draw(drawn, None, "test")
    rates = figure.axes[0]
    (star,) = (line for line in rates.lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([1], [9_099])


def test_plots_show_names_literally(tmp_path: Path) -> None:
    odd = "_$\\frac$"  # an invalid formula, with a prefix that matplotlib omits from legends
    one = climbed(100, 1, None, 0.0)
    one.target = Target(odd, ANY_CONFIG)
    figure = plots.plot_batch_sizes([one], (2.0, "limit"), odd)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"{odd}: 100 images fit, 100 are fastest", "limit, 2 GiB"]
    config = load_config("configs/digits_lenet.yaml").model_copy(update={"name": odd})
    profile = StepProfile(1, 2.0, [Phase("data", 2.0, 1.0)], [Operator(odd, 1.0, 1)])
    report = StepReport(config, 1, None, {"device": odd}, profile, {"step": 8e3, odd: 8e3})
    row = {"name": odd, "ours": True, "images_per_s": 2.0, "lowest": 1.0, "highest": 3.0}
    environment = {"device": odd, "cores": 2, "date": "today"}
    run = run_file.Run(environment=environment, missing_peers=[], groups=[{"title": odd, "rows": [row]}])
    for each in (figure, plots.plot_profile(report)):
        render(each)
    assert charts.draw_chart(run, tmp_path / "chart.png") is not None


def test_size_that_fails_its_repeat_is_not_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def attempt(target: Target, batch: int, *rest: object) -> Trial:
        tried.append(batch)
        return fake(99 if tried.count(batch) > 1 else 100)(target, batch, *rest)

    code, content = ramp_with(attempt, monkeypatch, tmp_path, "--memory-limit", "2", "--exact")
    (found,) = content["models"]
    assert (code, found["end"], found["too_large_batch"]) == (0, "memory", 100)
    assert found["largest_batch"] == found["best_batch"] < 100


def test_cached_file_pages_of_the_container_count_as_available(tmp_path: Path) -> None:
    unlimited = process_memory.available_bytes(tmp_path)
    for name, content in {
        "memory.max": "1000",
        "memory.current": "900",
        "memory.stat": "anon 700\ninactive_file 150\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert process_memory.available_bytes(tmp_path) == 250
    (tmp_path / "memory.max").write_text("max")
    assert process_memory.available_bytes(tmp_path) == pytest.approx(unlimited, rel=0.2)


def test_repeated_size_has_the_highest_memory_of_both_measurements() -> None:
    tried: list[int] = []

    def measure_size(batch: int, _: str) -> Trial:
        tried.append(batch)
        memory = 3.0 if tried.count(batch) > 1 else 2.0
        return Trial(batch, [float(batch)], memory_gib=memory, reserved_gib=memory, device_memory_gib=5 - memory)

    search = BatchSizeSearch(Target("fake", ANY_CONFIG))
    *_, repeated = search.run(measure_size, first=1, maximum=4, tolerance=0.0)
    assert repeated.is_repeated
    assert (repeated.memory_gib, repeated.reserved_gib, repeated.device_memory_gib) == (3.0, 3.0, 3.0)


def test_other_error_fails_only_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(target: Target, batch: int, *rest: object) -> Trial:
        return fake(100, broken_from=32 if "lenet" in target.name else None)(target, batch, *rest)

    code, content = ramp_with(attempt, monkeypatch, tmp_path, "--model", "lenet", "resnet18")
    assert code == 1
    broken, good = content["models"]
    assert (broken["end"], broken["largest_batch"]) == ("error", 16)
    assert (good["end"], good["too_large_batch"]) == ("memory", 102)
    printed = capsys.readouterr()
    assert "at least 16 (a larger one failed)" in printed.out
    assert "failed: lenet 32x32: batch 32: ValueError: the kernel" in printed.err


@pytest.mark.parametrize(("how", "end"), [({"late_from": 64}, "time"), ({}, "most")])
def test_search_ended_early_reports_a_lower_bound(
    how: dict[str, int], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content = ramp_with(fake(10**6, **how), monkeypatch, tmp_path, "--max-batch", "48" if not how else "10000")
    assert code == 0
    assert content["models"][0]["end"] == end
    assert f"at least {32 if how else 48}" in capsys.readouterr().out


def test_model_that_never_fits_is_reported_not_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content = ramp_with(fake(0), monkeypatch, tmp_path, "--memory-limit", "2")
    assert (code, content["models"][0]["largest_batch"]) == (0, None)
    assert "no batch was measured (1 does not fit into 2 GiB)" in capsys.readouterr().out
    assert not (tmp_path / "ramp.png").exists()


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (libraries raise different errors)
        call()
    return f"{caught.type.__name__}: {caught.value}"


def test_allocator_errors_and_kernel_kill_count_as_memory() -> None:
    (killed,) = measure([Candidate("dies", fixtures.dies, (1,))], 0.02, 1)
    texts = [
        str(killed.error),
        message_of(lambda: torch.empty(2**55, dtype=torch.uint8)),
        message_of(lambda: np.empty(2**55, np.uint8)),
        message_of(lambda: bytearray(2**60)),
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "OSError: [Errno 12] Cannot allocate memory",
        process_memory.limit_error(process_memory.GIB),
    ]
    for text in texts:
        assert process_memory.is_out_of_memory(text), text
    for text in (
        "ValueError: Expected more than 1 value per channel",
        "the process ended with SIGSEGV",
        "no answer within 300 s",
        "the process ended with exit code 1",
    ):
        assert not process_memory.is_out_of_memory(text), text


@pytest.mark.slow
def test_candidate_over_its_memory_limit_is_killed() -> None:
    limit = 3 * 2**30  # between the initial memory of a candidate and eleven items of a growing one
    candidates = [
        Candidate("grows", fixtures.grows, (), partial(process_memory.check_limit, limit)),
        Candidate("steady", fixtures.steady, (), partial(process_memory.check_limit, limit)),
    ]
    grows, steady = measure(candidates, 0.05, 2)
    assert grows.error == process_memory.limit_error(limit)
    assert steady.error is None
    assert len(steady.rates) == 2


RESTRICTED = """
import os, resource
from configs.load import load_config
from tools.perf import batch_size_search
from tools.benchmarks.engine.process_memory import peak_rss_bytes

def main():
    block = bytearray(2**29)
    del block
    if os.fork() == 0:
        print("own", peak_rss_bytes() < 2**29 and peak_rss_bytes() > 2**20, flush=True)
        os._exit(0)
    os.wait()
    size = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30,) * 2)  # as `ulimit -v`
    config = load_config("configs/digits_lenet.yaml", **{"model.num_classes": 10, "data.image_size": 32})
    target = batch_size_search.Target("lenet", config, synthetic=True)
    for batch in (8, 300_000):
        tried = batch_size_search.run_trial(target, batch, 0.02, 1, None)
        print(batch, tried.fits, tried.is_failure, tried.error, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_batch_beyond_the_ulimit_does_not_fit(tmp_path: Path) -> None:
    script = tmp_path / "restricted.py"
    script.write_text(RESTRICTED)
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    own, small, large = done.stdout.splitlines()
    assert own == "own True"  # the peak of a forked process excludes its parent's
    assert small == "8 True False None"
    assert large.startswith("300000 False False")


@pytest.mark.slow
def test_real_search_exceeds_data_set_and_leaves_no_process(digits_run: Run, tmp_path: Path) -> None:
    mark = f"ZHU_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    environment = {**CLEAN, **dict([mark.split("=")])}
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits_run.data, "--out", tmp_path)
    quick = ("--seconds", 0.01, "--rounds", 1, "--min-batch", 1500)
    done = subprocess.run(
        command(*config, *quick, "--memory-limit", 1.3),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "ramp.json").read_text())
    (found,) = content["models"]
    assert found["end"] == "memory"
    assert found["largest_batch"] > 1437  # the images of the train split
    assert "does not fit into 1.3 GiB" in done.stdout
    fitting = [row for row in content["sizes"] if row["fits"]]
    assert all(0.1 < row["memory_gib"] <= 1.3 for row in fitting)
    assert {row["error"] for row in content["sizes"] if not row["fits"]} == {
        process_memory.limit_error(int(1.3 * process_memory.GIB))
    }
    assert {path.name for path in tmp_path.iterdir()} == {"ramp.csv", "ramp.json", "ramp.png"}
    assert wait_for(lambda: not processes_with(mark), 10), processes_with(mark)


@pytest.mark.gpu
def test_gpu_memory_limit_bounds_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an empty cache: the buffers for compiling and tuning must not count as memory of the training
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    config = load_config("configs/digits_lenet.yaml", **{"model.num_classes": 10, "data.image_size": 32})
    target = Target("lenet", config, synthetic=True, on_gpu=True, limit_bytes=process_memory.GIB)
    small, large = (batch_size_search.run_trial(target, batch, 0.02, 1, None) for batch in (64, 200_000))
    assert small.fits
    assert 0 < (small.memory_gib or 0) <= (small.reserved_gib or 0) <= 1
    assert (small.gpu_memory_gib or 0) > (small.device_memory_gib or 0) >= (small.reserved_gib or 0)
    assert not large.fits
    assert not large.is_failure, large.error


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_interrupted_search_keeps_results_and_leaves_no_process(
    kill: Callable[[int, int], None], number: int, tmp_path: Path
) -> None:
    mark = f"ZHU_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    environment = {**CLEAN, **dict([mark.split("=")])}
    process = subprocess.Popen(
        command("--model", "lenet", "--seconds", 0.01, "--rounds", 1, "--out", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=restore_signal_handlers,
    )
    file = tmp_path / "ramp.csv"
    assert wait_for(lambda: file.exists() and len(file.read_text().splitlines()) >= 3, 90)
    assert len(processes_with(mark)) >= 2  # so that there are processes to end
    kill(process.pid, number)  # Ctrl-C reaches the whole foreground group
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "at least" in out
    content = json.loads((tmp_path / "ramp.json").read_text())
    assert content["models"][0]["end"] == "interrupted"
    assert len(content["sizes"]) >= 2
    assert (tmp_path / "ramp.png").exists()
    assert wait_for(lambda: not processes_with(mark), 10), processes_with(mark)


@pytest.mark.slow
def test_candidate_in_a_long_step_dies_with_its_parent() -> None:
    mark = f"ZHU_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    script = (
        "from helpers import benchmarks as fixtures\n"
        "from tools.benchmarks.engine.candidate import Candidate\n"
        "from tools.benchmarks.engine.interleaved import measure\n"
        "measure([Candidate('slow', fixtures.steady, (60.0,))], 1.0, 1, show_progress=False)"
    )
    environment = {**CLEAN, **dict([mark.split("=")]), "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment)
    assert wait_for(lambda: len(processes_with(mark)) >= 4, 60)  # this process, two helpers and the candidate
    process.kill()
    process.wait()
    assert wait_for(lambda: not processes_with(mark), 10), processes_with(mark)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "nothing to measure"),
        (("--model", "lenet", "--memory-limit", "0"), "--memory-limit 0.0 must be positive"),
        (("--model", "lenet", "--memory-limit", "inf"), "--memory-limit inf must be positive and finite"),
        (("--model", "lenet", "--min-batch", "8", "--max-batch", "4"), "--max-batch 4 is below"),
    ],
)
def test_invalid_arguments_are_user_errors(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(benchmark.UserError, match=sentence):
        batch_size_command.run(benchmark.parse_arguments(["ramp", *arguments]))
