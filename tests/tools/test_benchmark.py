"""tools/benchmark.py: the real loader and step, interleaved rounds, failures and deadlines. No rates are asserted."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import helpers.benchmarks as fixtures
from configs.load import load_config
from configs.schema import AugConfig, EraseConfig
from configs.utils.errors import UserError
from helpers.benchmarks import empty_record, settings_in
from tools import benchmark, convert
from tools.benchmarks import peers, single_stage
from tools.benchmarks.benchmark_command import build_settings
from tools.benchmarks.engine import ours, process_memory, results, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement, measure, run_in_subprocess
from tools.benchmarks.engine.measured_tables import Case, InterleavedTable, RowTable
from tools.benchmarks.engine.run_file import Run
from tools.benchmarks.peers import PeerTask
from tools.benchmarks.suites import cpu, gpu, programs, progressive, suite
from tools.benchmarks.suites.datasets import check_free_space, image_dataset
from tools.benchmarks.suites.loading import JPEG_VARIANTS, describe
from tools.benchmarks.suites.programs import Program
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.perf import batch_size_search
from tools.perf.batch_size_search import Trial
from train.reporting.metrics_file import MetricsLine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "digits"
    convert.main(["digits", "--out", str(folder)])
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def part_of(*tables: RowTable, name: str = "one") -> Part:
    return Part(name, ("dali",), lambda _: iter(tables), needs_limits=False)


def table_of(title: str, *rows: results.Row) -> RowTable:
    return RowTable(title, "dali", ("value",), lambda found: iter(rows))


def value(number: int) -> results.Row:
    return {"name": "x", "ours": True, "error": None, "value": number}


def titles_and_values(file: Path) -> list[tuple[str, int | None]]:
    return [(one["title"], one["rows"][0].get("value")) for one in json.loads(file.read_text())["groups"]]


@pytest.mark.slow
def test_loader_stage_reports_our_share_of_the_bound(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "run.json"
    quick = ("--seconds", 0.02, "--rounds", 1, "--batch-size", 32, "--scratch", tmp_path)
    result = run("loader", "--data-path", digits, *quick, "--json", file)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    assert {"device", "cores", "versions", "date"} <= set(content["environment"])
    assert [group["stage"] for group in content["groups"]] == ["reading", "loading"]
    for group in content["groups"]:
        ours, *bounds = group["rows"]
        bound = max(bounds, key=lambda row: row["images_per_s"])
        assert ours["name"] == "Model Zhu"
        assert ours["images_per_s"] > 0
        assert ours["share"] == pytest.approx(ours["images_per_s"] / bound["images_per_s"], rel=0.01)
        assert group["title"] in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["new folder"]  # the scratch folder is empty


def test_titles_name_every_augmentation() -> None:
    assert describe(AugConfig(crop="pad", flip=0.5)) == "pad and crop, flip"
    assert describe(AugConfig(flip=0)) == "no augmentation"
    aug = AugConfig(auto="rand-m9-mstd0.5-inc1", color_jitter=0.4, grayscale=0.1, erase=EraseConfig(probability=0.25))  # type: ignore[arg-type]
    assert describe(aug) == "flip, rand-m9-mstd0.5-inc1, colour jitter, greyscale, erasing"


def test_peers_are_compared_with_crop_and_flip_only(digits: Path, tmp_path: Path) -> None:
    more = ["aug.auto=rand-m9-mstd0.5-inc1", "aug.mix.mixup=0.2", "aug.cutout=3", "aug.crop=pad", "aug.padding=2"]
    arguments = ["peers", "--cfg", "configs/digits_lenet.yaml", "--data-path", str(digits), "--opts", *more]
    reading, loading, training = single_stage.stage_tables(benchmark.parse_arguments(arguments), settings_in(tmp_path))
    expected = AugConfig(crop="pad", padding=2, flip=0.0)
    assert reading.stage == "reading"
    assert loading.title.endswith("pad and crop")
    assert training.cases[0].candidate.arguments[0].aug == expected
    sources = [
        argument
        for group in (loading, training)
        for case in group.cases
        for argument in case.candidate.arguments
        if isinstance(argument, PeerTask)
    ]
    assert len(sources) >= 4
    assert {source.aug for source in sources} == {expected}


def test_settings_without_a_config_change_size_and_crop(digits: Path, tmp_path: Path) -> None:
    settings = ["data.image_size=24", "aug.crop=random-resized", "aug.scale=[0.5, 1]"]
    arguments = ["peers", "--data-path", str(digits), "--batch-size", "16", "--workers", "0", "1", "--opts", *settings]
    parsed = benchmark.parse_arguments(arguments)
    reading, loading = single_stage.stage_tables(parsed, build_settings(parsed, tmp_path))
    assert reading.title == "32x32 raw, reading alone"
    assert loading.title == "32 to 24 raw, random-resized crop, flip"
    tasks = [
        argument for case in loading.cases for argument in case.candidate.arguments if isinstance(argument, PeerTask)
    ]
    assert {(task.aug and task.aug.scale, task.batch_size, task.image_size) for task in tasks} == {((0.5, 1), 16, 24)}
    measured = [case.candidate for case in loading.cases if case.candidate.build is peers.loading]
    assert len(measured) == len(tasks) > 2
    assert all((0, 1) in candidate.arguments for candidate in measured)


def test_full_size_jpeg_is_compared_with_augmentation_and_evaluation(digits: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, small=digits, medium=tmp_path / "missing", samples=16)
    tables = list(cpu.full_size(settings))
    assert [table.title for table in tables] == [
        "500x375 to 224 JPEG, random-resized crop, flip",
        "500x375 to 224 JPEG, resize and center crop",
        "1000x750 to 224 JPEG, random-resized crop, flip",
    ]
    for table in tables:
        ours_rows = [case for case in table.cases if case.fields.get("ours")]
        assert [case.candidate.name for case in ours_rows] == [f"Model Zhu, {name}" for name in JPEG_VARIANTS]
        with ours_rows[0].candidate.build(*ours_rows[0].candidate.arguments) as workloads:
            batch = next(workloads[""].items)
            assert batch.images.shape == (4, 3, 224, 224)


@pytest.mark.slow
def test_train_stage_reports_ratio_to_resident_batch(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits)
    result = run("train", *config, "--seconds", 0.05, "--rounds", 2, "--json", file)
    assert result.returncode == 0, result.stderr
    ((resident, end_to_end),) = [group["rows"] for group in json.loads(file.read_text())["groups"]]
    assert end_to_end["of_resident"] == pytest.approx(end_to_end["images_per_s"] / resident["images_per_s"], rel=1e-3)
    assert end_to_end["bound"]["name"] == "matrix multiplication"


@pytest.mark.slow
def test_stage_changes_are_measured_by_pairs_of_epochs(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    stages = "data.stages=[{epoch: 0, image_size: 32}, {epoch: 4, image_size: 34, batch_size: 32}]"
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits, "--opts", stages)
    result = run("stages", *config, "--rounds", 2, "--json", file)
    assert result.returncode == 0, result.stderr
    (group,) = json.loads(file.read_text())["groups"]
    assert [(row["name"], row["changes"]) for row in group["rows"]] == [("32x32, batch 64", 2), ("34x34, batch 32", 2)]
    assert all(row["ratio"] > 0 and row["images_per_s"] > 0 for row in group["rows"])
    assert group["title"] == progressive.title(load_config("configs/digits_lenet.yaml"))
    assert "images/s after a change" in result.stdout
    without = run("stages", "--cfg", "configs/digits_lenet.yaml", "--data-path", digits)
    assert without.returncode == 2
    assert "fewer than two stages" in without.stderr


@pytest.mark.slow
def test_nothing_to_measure_is_a_user_error_without_files(tmp_path: Path) -> None:
    result = run("loader", "--json", tmp_path / "run.json")
    assert not list(tmp_path.iterdir())
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing to measure")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_failing_or_killed_candidate_costs_only_its_row() -> None:
    candidates = [
        Candidate("first", fixtures.steady),
        Candidate("unbuildable", fixtures.cannot_be_built),
        Candidate("half", fixtures.half_broken),
        Candidate("dies in warm-up", fixtures.dies, (1,)),
        Candidate("dies in a round", fixtures.dies, (2,)),  # the warm-up takes two items of 30 ms, a round takes one
        Candidate("last", fixtures.steady),
    ]
    measurements = {(o.candidate, o.workload): o for o in measure(candidates, seconds=0.02, rounds=2)}
    assert measurements["unbuildable", ""].error == "RuntimeError: no such library"
    assert measurements["half", "broken"].error == "MemoryError: out of memory"
    for name in ("dies in warm-up", "dies in a round"):
        assert "SIGKILL" in str(measurements[name, ""].error)
    for key in (("first", ""), ("half", "good"), ("last", "")):
        assert measurements[key].error is None
        assert len(measurements[key].rates) == 2
        assert 0 < measurements[key].rate < fixtures.UNITS / 0.001


def test_candidate_process_is_stopped_between_its_rounds(tmp_path: Path) -> None:
    file = tmp_path / "ticks"
    candidates = [
        Candidate("eager", fixtures.counts_in_a_thread, (str(file),)),
        Candidate("slow", fixtures.steady, (0.01,)),
    ]
    measurements = measure(candidates, seconds=0.3, rounds=2)
    ticks = file.stat().st_size  # from warm-up and two rounds of 0.3 s, not from rounds of the other
    time.sleep(0.05)
    assert file.stat().st_size == ticks
    assert ticks < 1300
    assert len({measurement.details["pid"] for measurement in measurements}) == 2


def test_unbuildable_table_is_a_failed_row(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    def broken() -> Iterator[InterleavedTable]:
        yield InterleavedTable("good", "loading", [Case(Candidate("ours", fixtures.steady), {"ours": True})])
        raise OSError("no space left")

    record = empty_record()
    suite.run_parts([Part("whole part", ("loading",), lambda _: broken(), needs_limits=False)], settings, record)
    good, failed = record.added_tables()
    assert good["rows"][0]["images_per_s"] > 0
    assert failed["rows"][0]["error"] == "OSError: no space left"
    assert results.failure_lines(record.added_tables()) == ["whole part: whole part: OSError: no space left"]


def test_parts_after_the_deadline_are_not_failures(
    tmp_path: Path,
) -> None:
    settings = settings_in(tmp_path, deadline=time.monotonic() - 1, only=("scale",))
    parts = suite.choose(cpu.PARTS, [], settings.only)
    assert [part.name for part in parts] == ["scale"]
    record = empty_record()
    suite.run_parts(parts, settings, record)
    limits_entry, entry = record.added_tables()
    assert [row["note"] for row in limits_entry["rows"]] == [OUT_OF_TIME]
    assert entry["rows"][0]["note"] == OUT_OF_TIME
    assert results.failure_lines(record.added_tables()) == []


@pytest.mark.slow
def test_run_after_the_deadline_exits_with_code_0(digits: Path, tmp_path: Path) -> None:
    late = ("--minutes", 1e-9, "--only", "stages", "--seconds", 0.01, "--rounds", 1, "--json", tmp_path / "run.json")
    result = run("all", "--small", digits, *late)
    assert result.returncode == 0, result.stderr
    groups = json.loads((tmp_path / "run.json").read_text())["groups"]
    assert {group["part"] for group in groups} == {"limits", "stages"}
    assert "failed" not in result.stderr


@pytest.mark.slow
def test_unknown_part_is_a_user_error() -> None:
    result = run("all", "--part", "nonsense")
    assert result.returncode == 2
    assert "--part nonsense is not one of 32x32, LeNet" in result.stderr
    with pytest.raises(UserError, match="--only ramp leaves no part to measure; choose from augment, loading"):
        suite.choose(cpu.PARTS, [], ["ramp"])


@pytest.mark.slow
def test_every_gpu_part_can_be_built(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds data sets, configs and candidates only, since there may be no GPU."""
    settings = settings_in(tmp_path, device="cuda", small=digits, medium=tmp_path / "missing", samples=64)
    monkeypatch.setattr(
        gpu, "search_fastest", lambda *_: iter([Trial(256, [1000.0]), Trial(512, error="out of memory")])
    )
    monkeypatch.setattr(programs, "profile", lambda *_, **__: iter([{"name": "step", "ours": True, "error": None}]))
    titles = []
    for part in gpu.PARTS:
        for one in part.tables(settings):
            titles.append((part.name, one.title))
            assert one.stage in part.stages, one.title
            if isinstance(one, InterleavedTable):
                assert len({case.candidate.name for case in one.cases}) == len(one.cases) >= 1, one.title
            elif one.stage in ("ramp", "profile"):
                assert not results.failure_lines([one.run({roofline.ARITHMETIC: 1e12}, 0.01, 1, None)])
    assert len(set(titles)) == len(titles)
    trained = (
        "timm/resnet50 224x224",
        "ResNet-18 224x224",
        "ResNet-50 96x96",
        "ResNet-18 96x96",
        "ResNet-18 32x32",
        "LeNet 32x32",
        "AlexNet 70x70",
    )
    for title in (
        *trained,
        *(f"{size}x{size} raw" for size in (32, 96, 224)),
        "JPEG 224x224 decoded",
        "Speedrun to 94",
    ):
        assert any(title in found for _, found in titles), title
    assert [part.name for part in gpu.PARTS][:7] == [
        "training",
        "speedrun",
        "loaders",
        "decoding",
        "resnet50",
        "accuracy",
        "dali",
    ]


def test_resnet50_is_profiled_without_measured_batch_size(digits: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, device="cuda", small=digits, medium=tmp_path / "missing", samples=64)
    _, profile, training = gpu.resnet50(settings)  # the first table is not run, as with --only
    assert (profile.stage, training.stage) == ("profile", "training")
    assert isinstance(training, InterleavedTable)
    assert training.cases[0].candidate.arguments[0].data.batch_size == 8  # 64 samples in 8 batches


def test_free_space_is_needed_for_missing_data_sets_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name another folder with --data"):
        check_free_space(tmp_path, 2**60, "--data")
    made = tmp_path / "digits-96"
    made.mkdir()
    (made / "dataset.json").touch()
    with (made / "shard").open("wb") as file:
        file.truncate(2**40)
    check_free_space(tmp_path, 2**40, "--data")


def test_generated_data_sets_are_reused(digits: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, device="cuda", small=digits, medium=tmp_path / "missing", samples=64)
    made = image_dataset(settings, 224, "jpeg")
    assert made.parent == tmp_path
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert image_dataset(settings, 224, "jpeg") == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == times


def test_data_set_is_not_generated_shortly_before_the_deadline(digits: Path, tmp_path: Path) -> None:
    settings = settings_in(
        tmp_path,
        device="cuda",
        small=digits,
        medium=tmp_path / "missing",
        samples=64,
        part_s=170.0,
        deadline=time.monotonic() + 5,
    )
    with pytest.raises(TimeoutError):
        image_dataset(settings, 224)


@pytest.mark.slow
def test_killed_run_keeps_its_rows_and_can_be_extended(
    tmp_path: Path,
) -> None:
    """Killed during the second table of the second part, after its first row."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from helpers.benchmarks import empty_record, settings_in\n"
        "from tools.benchmarks.suites import suite\n"
        "from tools.benchmarks.engine.measured_tables import RowTable\n"
        "from tools.benchmarks.suites.suite import Part\n"
        "folder = Path(sys.argv[1])\n"
        "def rows(*names):\n"
        "    def make(found):\n"
        "        for name in names:\n"
        "            if name == 'hangs':\n"
        "                print('hangs', flush=True)\n"
        "                time.sleep(600)\n"
        "            yield {'name': name, 'ours': True, 'error': None, 'value': 1}\n"
        "    return make\n"
        "def part(name, *tables):\n"
        "    made = [RowTable(title, 'dali', ('value',), rows(*names)) for title, names in tables]\n"
        "    return Part(name, ('dali',), lambda settings: iter(made), needs_limits=False)\n"
        "parts = [part('one', ('a', ['x', 'y'])), part('two', ('b', ['x']), ('c', ['x', 'hangs']))]\n"
        "suite.run_parts(parts, settings_in(folder), empty_record(folder / 'run.json'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    printed = list(itertools.takewhile(lambda line: line != "hangs\n", process.stdout))
    process.kill()
    process.wait()
    assert "### b\n" in printed  # tables are printed once measured
    left = json.loads((tmp_path / "run.json").read_text())
    assert {name: part["is_complete"] for name, part in left["parts"].items()} == {"one": True, "two": False}
    assert [(one["title"], [row["name"] for row in one["rows"]]) for one in left["groups"]] == [
        ("a", ["x", "y"]),
        ("b", ["x"]),
        ("c", ["x"]),
    ]

    record = empty_record(tmp_path / "run.json", earlier=Run(**left))
    row = {"name": "z", "ours": True, "error": None, "value": 2}
    table = RowTable("d", "dali", ("value",), lambda found: iter([row]))
    suite.run_parts([Part("three", ("dali",), lambda _: iter([table]), False)], settings_in(tmp_path), record)
    both = json.loads((tmp_path / "run.json").read_text())
    assert [one["title"] for one in both["groups"]] == ["a", "b", "c", "d"]
    assert list(both["parts"]) == ["one", "two", "three"]
    assert [one["title"] for one in record.added_tables()] == ["d"]


@pytest.mark.parametrize("note", [OUT_OF_TIME, "not measured: needs --reference"])
def test_unmeasured_table_does_not_replace_a_measured_one(note: str, tmp_path: Path) -> None:
    def part(*tables: tuple[str, str | None]) -> Part:
        made = [RowTable(title, "dali", (), lambda found, note=note: iter([row(note)])) for title, note in tables]  # type: ignore[misc]
        return Part("one", ("dali",), lambda _: iter(made), needs_limits=False)

    def row(note: str | None) -> dict[str, Any]:
        return {"name": "x", "ours": True, "error": None, "date": len(made)} | ({"note": note} if note else {})

    made: list[int] = []
    first = empty_record(tmp_path / "run.json")
    suite.run_parts([part(("a", None), ("b", None), ("gone", None))], settings_in(tmp_path), first)
    made.append(1)
    second = empty_record(tmp_path / "run.json", earlier=first.run)
    suite.run_parts([part(("a", None), ("b", note))], settings_in(tmp_path), second)
    content = json.loads((tmp_path / "run.json").read_text())
    kept = [("a", 1), ("b", 0), *([("gone", 0)] if note == OUT_OF_TIME else [])]  # removed if the part is complete
    assert [(one["title"], one["rows"][0]["date"]) for one in content["groups"]] == kept
    third = empty_record(tmp_path / "run.json", earlier=second.run)
    suite.run_parts([part(("a", None), ("b", None))], settings_in(tmp_path), third)
    assert [one["title"] for one in third.run.groups] == ["a", "b"]


def test_whole_table_has_the_title_of_its_entry(digits: Path, tmp_path: Path) -> None:
    (changes,) = progressive.stage_changes(settings_in(tmp_path, small=digits))
    assert changes.title == "changes of image and batch size, lenet"
    (cost,) = cpu.cost_per_sample(settings_in(tmp_path))
    assert cost.title == "Cost per sample by size of the data set, 96x96 raw"


def test_incomplete_part_removes_no_earlier_table(tmp_path: Path) -> None:
    file = tmp_path / "run.json"

    def measure_again(part: Part, only: tuple[str, ...] = ()) -> tuple[list[tuple[str, int | None]], bool]:
        record = empty_record(file, earlier=Run(**json.loads(file.read_text())) if file.exists() else None)
        suite.run_parts([part], settings_in(tmp_path, only=only), record)
        return titles_and_values(file), record.run.parts["one"]["is_complete"]

    def ends_with(error: Exception) -> Part:
        def make(settings: Settings) -> Iterator[RowTable]:
            yield table_of("a", value(2))
            raise error

        return Part("one", ("dali",), make, needs_limits=False)

    assert measure_again(part_of(table_of("a", value(1)), table_of("b", value(1)))) == ([("a", 1), ("b", 1)], True)
    left_out = RowTable("b", "profile", ("value",), lambda found: iter([value(2)]))
    assert measure_again(part_of(table_of("a", value(2)), left_out), only=("dali",)) == ([("a", 2), ("b", 1)], False)
    remains = ("one, what remains", None)
    assert measure_again(ends_with(TimeoutError())) == ([("a", 2), ("b", 1), remains], False)
    assert measure_again(ends_with(OSError("full"))) == ([("a", 2), ("b", 1), remains, ("one", None)], False)
    assert measure_again(part_of(table_of("a", value(3)))) == ([("a", 3)], True)


def test_crashed_program_is_a_failed_row_and_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(found: roofline.Limits) -> Iterator[results.Row]:
        program = Program([sys.executable, "-c", "raise SystemExit('no such set')"], tmp_path / "log", None)
        return (program.row("crashes", {}) for _ in program.run())

    monkeypatch.setattr(cpu, "PARTS", (part_of(RowTable("a", "dali", ("value",), rows)),))
    monkeypatch.setattr(gpu, "PARTS", cpu.PARTS)
    file = tmp_path / "run.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "all", "--json", str(file), "--data", str(tmp_path / "data")])
    assert benchmark.main() == 1
    ((row,),) = [group["rows"] for group in json.loads(file.read_text())["groups"]]
    assert row["error"] == "exit code 1: no such set"


def test_failure_is_reported_although_earlier_table_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    first = empty_record(file)
    suite.run_parts([part_of(table_of("a", value(1)))], settings_in(tmp_path), first)
    second = empty_record(file, earlier=first.run)
    rows = (
        results.skipped_row("x", results.RUNNING),
        results.skipped_row("x", results.RUNNING),
        results.new_row("x", error="crash"),
    )
    suite.run_parts([part_of(table_of("a", *rows))], settings_in(tmp_path), second)
    assert titles_and_values(file) == [("a", 1)]
    assert results.failure_lines(second.added_tables()) == ["a: x: crash"]


def test_figures_of_a_running_program_are_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    seen = []

    def rows(found: roofline.Limits) -> Iterator[results.Row]:
        for figures in ({}, {"value": 1}, {"value": 2}):
            yield results.skipped_row("x", results.RUNNING) | figures
            seen.append(titles_and_values(file))  # as after a kill

    suite.run_parts([part_of(RowTable("a", "dali", ("value",), rows))], settings_in(tmp_path), empty_record(file))
    assert seen == [[("a", None)], [("a", 1)], [("a", 2)]]


def test_call_ended_by_the_deadline_is_not_a_failure(tmp_path: Path) -> None:
    def rows(found: roofline.Limits) -> Iterator[results.Row]:
        yield value(1)
        run_in_subprocess(time.sleep, 60, deadline=time.monotonic())

    def whole(found: roofline.Limits) -> Iterator[results.Row]:
        yield from run_in_subprocess(time.sleep, 60, deadline=time.monotonic())

    for part in (
        part_of(RowTable("a", "dali", ("value",), rows)),
        Part("one", ("stages",), lambda _: iter([RowTable("a", "stages", None, whole)]), needs_limits=False),
    ):
        record = empty_record()
        suite.run_parts([part], settings_in(tmp_path), record)
        assert record.added_tables()[-1]["rows"][-1]["note"] == OUT_OF_TIME
        assert results.failure_lines(record.added_tables()) == []
        assert not record.run.parts["one"]["is_complete"]


def test_table_is_kept_after_every_round(tmp_path: Path) -> None:
    kept: list[int] = []
    group = InterleavedTable("a", "loading", [Case(Candidate("ours", fixtures.steady), {"ours": True})])
    group.run({}, 0.02, 3, None, lambda entry: kept.append(len(entry["rows"])))
    assert kept == [1, 1, 1]


def test_limits_of_the_same_day_are_reused(tmp_path: Path) -> None:
    found = {"memory copy": 6e9, "matrix multiplication": 2e12}
    rows = roofline.limit_rows([Measurement("limits", name, [rate]) for name, rate in found.items()])
    record = empty_record()
    with record.part(suite.LIMITS):
        record.add({"title": "Limits of the machine", "stage": "limits", "rows": rows})
        record.complete()
    assert suite.machine_limits(settings_in(tmp_path), record) == pytest.approx(found)
    late = settings_in(tmp_path, deadline=time.monotonic() - 1)
    record.run.parts[suite.LIMITS]["date"] = "2026-11-22"
    assert suite.machine_limits(late, record) == {}  # of another day: measured again, but out of time
    record.run.parts[suite.LIMITS]["date"] = "2026-11-23"
    assert suite.machine_limits(late, record) == {}  # incomplete: measured again


def test_fastest_batch_size_that_fits_is_found(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("configs/digits_lenet.yaml", **{"data.path": str(digits)})

    def reaches(**rates: float) -> tuple[int, list[int]]:
        def one(candidates: list[Candidate], *_: object, **__: object) -> list[Measurement]:
            rate = rates.get(candidates[0].name.replace(" ", "_"))
            error = None if rate else "OutOfMemoryError: too large"
            return [Measurement(candidates[0].name, "", [rate] if rate else [], error=error)]

        monkeypatch.setattr(batch_size_search, "measure", one)
        sizes = list(batch_size_search.search_fastest(config, 0.01, 1, None))
        best = max((size for size in sizes if size.fits), key=lambda size: size.rate, default=None)
        return best.batch_size if best else 0, [size.batch_size for size in sizes]

    assert reaches(batch_256=100, batch_512=180, batch_1024=170, batch_2048=900) == (512, [256, 512, 1024])
    assert reaches(batch_256=100, batch_512=180) == (512, [256, 512, 1024])  # the third does not fit
    assert reaches() == (0, [256])


@pytest.mark.slow
def test_broken_placement_costs_only_its_row(digits: Path, tmp_path: Path) -> None:
    config = load_config("configs/digits_lenet.yaml", **{"data.path": str(digits)})
    variants = {"host": {"placement": "host"}, "missing": {"path": str(tmp_path / "missing")}}
    resident, host, missing = measure([Candidate("ours", ours.training, (config, variants))], 0.05, 1)
    assert resident.rate > 0
    assert host.rate > 0
    assert host.details["batch_size"] == config.data.batch_size
    assert "does not exist" in str(missing.error)


def test_no_candidate_is_started_after_the_deadline() -> None:
    (measurement,) = measure([Candidate("late", fixtures.steady)], 0.02, 1, deadline=time.monotonic() - 1)
    assert measurement.error == OUT_OF_TIME


def test_candidate_ended_at_the_deadline_is_not_a_failure() -> None:
    begin = time.monotonic()
    measurements = measure([Candidate("slow", fixtures.sleeps)], 0.02, 1, deadline=begin + 2)
    assert time.monotonic() - begin < 10
    row = results.measurement_row(measurements[0], ours=True)
    assert (row["error"], row["note"]) == (None, OUT_OF_TIME)


def test_reason_for_missing_details_is_kept() -> None:
    (measurement,) = measure([Candidate("dies", fixtures.dies_before_details)], 0.02, 1)
    row = results.measurement_row(measurement)
    assert (row["images_per_s"] > 0, row["error"]) == (True, None)
    assert row["note"] == "without details: the process ended with SIGKILL"
    trial = batch_size_search._trial(7, measurement, process_memory.GIB)
    assert trial.error == "the memory is unknown (the process ended with SIGKILL)"
    assert batch_size_search._trial(7, measurement, None).fits


def test_items_of_training_are_optimizer_steps(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # replayed steps call no hooks
    changes = {"data.path": str(npy_data), "data.batch_size": 8, "train.accumulation_steps": 3}
    config = load_config("configs/digits_lenet.yaml", [], **changes)
    with ours.training(config, {"end to end": {}}) as workloads:
        for workload in workloads.values():
            assert workload.units_per_item == 3 * 8
        updates = []
        hook = register_optimizer_step_post_hook(lambda *_: updates.append(1))
        for count, workload in enumerate(workloads.values(), 1):
            next(workload.items)
            assert len(updates) == count
        hook.remove()


def test_call_in_subprocess_returns_result_or_raises() -> None:
    assert run_in_subprocess(int, "7") == 7
    with pytest.raises(TimeoutError):
        run_in_subprocess(int, "7", deadline=time.monotonic() - 1)
    with pytest.raises(RuntimeError, match="invalid literal"):
        run_in_subprocess(int, "seven")
    with pytest.raises(RuntimeError, match=r"the result could not be sent: .*Lock.* objects should only be shared"):
        run_in_subprocess(multiprocessing.Lock)  # cannot be pickled


def test_program_is_read_while_running_and_stopped_at_deadline(tmp_path: Path) -> None:
    file, log = tmp_path / "count", tmp_path / "log"
    script = f"import time\nfor n in range(10**6): open({str(file)!r}, 'w').write(str(n)); time.sleep(0.01)"
    program = Program([sys.executable, "-c", script], log, time.monotonic() + 3)
    rows = [program.row("counts", {"n": 1} if file.exists() else {}) for _ in program.run()]
    assert {row.get("note") for row in rows[:-1]} == {results.RUNNING}
    assert rows[-1]["note"] == results.STOPPED
    assert not results.failure_lines([{"title": "", "rows": rows}])
    count = file.read_text()
    time.sleep(0.1)
    assert file.read_text() == count
    program = Program([sys.executable, "-c", "raise SystemExit('no such set')"], log, None)
    assert [program.row("fails", {}) for _ in program.run()][-1]["error"] == "exit code 1: no such set"


def test_reference_runs_on_the_same_pixels_if_present(digits: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, small=digits, seeds=2)
    (missing,) = programs.reference(settings, None)
    assert not missing["error"]
    assert "--reference FOLDER" in missing["note"]
    (missing,) = programs.reference(replace(settings, reference=tmp_path), None)
    assert "does not exist" in missing["note"]
    (tmp_path / programs.REFERENCE).write_text(
        "import torch, time\n"
        "data = torch.load('cifar10/train.pt')\n"
        "assert data['images'].shape[1:] == (32, 32, 3) and len(data['labels']) == len(data['images'])\n"
        "for run in ('warmup', *range(200)):\n"
        "    print('|  %6s  |     0  |     0.7  |   0.6  |       |       0.5  |' % run)\n"
        "    print('|          |  eval  |     0.9  |   0.93  |   0.94  |     2.5  |')\n"
        "    time.sleep(0.2)\n"
    )
    settings = replace(settings, reference=tmp_path, data=tmp_path / "out")
    *_, row = programs.reference(settings, 2.0)
    assert (row["runs"], row["top1_mean"], row["time_s_mean"], row["ratio"]) == (2, 0.94, 2.5, 1.25)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reference"]  # no file in a set named cifar10


def test_run_reports_best_accuracy_and_time_to_target() -> None:
    lines = [
        MetricsLine({"epoch": n, "val_top1": top1, "epoch_time_s": 2.0, "images_per_s": 100.0, "memory_gib": 1.0})
        for n, top1 in enumerate((0.5, None, 0.8, 0.7))
    ]
    found = programs.accuracy_fields(lines, 0.75)
    assert (found["top1"], found["epochs"], found["epochs_per_s"], found["target_reached_s"]) == (0.8, 4, 0.5, 6.0)
    assert programs.accuracy_fields(lines, 0.9)["target_reached_s"] is None
    assert programs.accuracy_fields([], 0.9) == {}
    lines[1] |= {"epoch_time_s": None, "images_per_s": None}  # as written by an older version
    found = programs.accuracy_fields(lines, 0.75)
    assert (found["images_per_s"], found["training_s"], found["target_reached_s"]) == (100.0, None, None)
