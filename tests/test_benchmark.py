"""tools/benchmark.py: that it measures the real loader and step, in turns, and survives what fails. No figure is
asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import benchmark_fixtures as fixtures
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from configs.load import load_config
from tools import convert
from tools.benchmarks import augmentations, ours, ramp, suite
from tools.benchmarks.groups import Group
from tools.benchmarks.peers import from_torch
from tools.benchmarks.turns import Contestant, Outcome, measure


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "digits"
    convert.main(["digits", "--out", str(folder)])
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/benchmark.py", *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def test_loader_stage_writes_ours_and_the_bound_beside_it(digits: Path, tmp_path: Path) -> None:
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
    assert [path.name for path in tmp_path.iterdir()] == ["new folder"]  # nothing is left in the scratch folder


def test_train_stage_gives_the_ratio_of_end_to_end_to_the_resident_batch(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits)
    result = run("train", *config, "--seconds", 0.05, "--rounds", 2, "--json", file)
    assert result.returncode == 0, result.stderr
    ((resident, end_to_end),) = [group["rows"] for group in json.loads(file.read_text())["groups"]]
    assert end_to_end["of_resident"] == pytest.approx(end_to_end["images_per_s"] / resident["images_per_s"], rel=1e-3)
    assert end_to_end["bound"]["name"] == "matrix multiplication"


def test_every_kind_of_augmentation_is_measured_and_compared_with_flips_alone(digits: Path, tmp_path: Path) -> None:
    kinds = {name: augmentations.KINDS[name] for name in (augmentations.PLAIN, "RandAugment", "cutout")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentations, "KINDS", kinds)
        group = augmentations.group(digits, batch_size=32, device="cpu", scratch=tmp_path)
    names = [contestant.name for contestant in group.contestants]
    assert names == ["Model Zhu, flip alone", "torchvision v2 + DataLoader, flip alone", "Model Zhu, RandAugment",
                     "torchvision v2 + DataLoader, RandAugment", "Model Zhu, cutout"]  # fmt: skip
    rates = {name: 1000.0 * (number + 1) for number, name in enumerate(names)}
    outcomes = [Outcome(name, "", [rate]) for name, rate in rates.items()]
    rows = group.entry(outcomes, {})["rows"]
    assert [row.get("of_plain", row.get("ratio")) for row in rows] == [1.0, 0.5, 3.0, 0.75, 5.0]
    lines = augmentations.table(rows).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["flip alone", "1,000", "1.00", "2,000", "0.5"],
        ["RandAugment", "3,000", "3.00", "4,000", "0.8"],
        ["cutout", "5,000", "5.00", "", ""],
    ]


def test_torchvisions_transforms_exist_for_what_they_are_compared_with() -> None:
    for aug in augmentations.KINDS.values():
        if augmentations._torchvision_has(aug):
            steps = [*from_torch._colors(aug), v2.PILToTensor(), *from_torch._erasing(aug)]
            picture = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
            assert v2.Compose(steps)(picture).shape == (3, 32, 32)


def test_changes_of_stages_are_measured_by_pairs_of_epochs(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    stages = "data.stages=[{epoch: 0, image_size: 32}, {epoch: 4, image_size: 34, batch_size: 32}]"
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits, "--opts", stages)
    result = run("stages", *config, "--rounds", 2, "--json", file)
    assert result.returncode == 0, result.stderr
    (group,) = json.loads(file.read_text())["groups"]
    assert [(row["name"], row["changes"]) for row in group["rows"]] == [("32x32, batch 64", 2), ("34x34, batch 32", 2)]
    assert all(row["ratio"] > 0 and row["images_per_s"] > 0 for row in group["rows"])
    assert "images/s after a change" in result.stdout
    without = run("stages", "--cfg", "configs/digits_lenet.yaml", "--data-path", digits)
    assert without.returncode == 2
    assert "fewer than two stages" in without.stderr


def test_nothing_to_measure_is_a_user_error() -> None:
    result = run("loader")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing to measure")
    assert "Traceback" not in result.stderr


def test_what_fails_crashes_or_dies_costs_only_its_own_row() -> None:
    contestants = [
        Contestant("first", fixtures.steady),
        Contestant("unbuildable", fixtures.cannot_be_built),
        Contestant("half", fixtures.half_broken),
        Contestant("dies in warm-up", fixtures.dies, (1,)),
        Contestant("dies in a round", fixtures.dies, (20,)),
        Contestant("last", fixtures.steady),
    ]
    outcomes = {(o.contestant, o.stream): o for o in measure(contestants, seconds=0.02, rounds=2)}
    assert outcomes["unbuildable", ""].error == "RuntimeError: no such library"
    assert outcomes["half", "broken"].error == "MemoryError: out of memory"
    for name in ("dies in warm-up", "dies in a round"):
        assert "SIGKILL" in str(outcomes[name, ""].error)
    for key in (("first", ""), ("half", "good"), ("last", "")):
        assert outcomes[key].error is None
        assert len(outcomes[key].rates) == 2
        assert 0 < outcomes[key].rate < fixtures.UNITS / 0.001


def test_each_contestant_has_a_process_of_its_own_which_rests_outside_of_its_turns(tmp_path: Path) -> None:
    file = tmp_path / "ticks"
    contestants = [
        Contestant("eager", fixtures.counts_in_a_thread, (str(file),)),
        Contestant("slow", fixtures.steady, (0.01,)),
    ]
    outcomes = measure(contestants, seconds=0.3, rounds=2)
    ticks = file.stat().st_size  # warm-up and two rounds of 0.3 s, but not the other's turns
    time.sleep(0.05)
    assert file.stat().st_size == ticks
    assert ticks < 1300
    assert len({outcome.facts["pid"] for outcome in outcomes}) == 2


def test_a_part_that_cannot_be_made_is_a_failed_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    settings = suite.Settings(tmp_path, seconds=0.02, rounds=1)

    def broken() -> Iterator[Group]:
        yield Group("good", "loading", [Contestant("ours", fixtures.steady)], [{"ours": True}])
        raise OSError("no space left")

    good, failed = suite.run_part("whole part", broken, {}, settings)
    assert good["rows"][0]["images_per_s"] > 0
    assert failed["rows"][0]["error"] == "OSError: no space left"
    (late,) = suite.run_part("late", broken, {}, suite.Settings(tmp_path, deadline=time.monotonic() - 1))
    assert "the time of the whole run was over" in late["rows"][0]["error"]


def test_every_part_of_the_run_on_a_gpu_can_be_made(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a machine without one shows: data sets, configs and contestants; nothing is run."""
    settings = suite.Settings(tmp_path, small=digits, medium=tmp_path / "missing", samples=64)
    monkeypatch.setattr(suite, "best_batch", lambda config, *_: (config, {"256": 1.0}))
    titles = []
    for name, make in suite.gpu_parts(settings):
        for group in make():
            titles.append(group.title)
            assert len(group.contestants) == len(group.rows) >= 1, name
            assert len({contestant.name for contestant in group.contestants}) == len(group.contestants), name
    trained = ("ResNet-50 224x224", "ResNet-18 224x224", "ResNet-50 96x96", "ResNet-18 96x96", "ResNet-18 32x32",
               "LeNet 32x32", "AlexNet 70x70")  # fmt: skip
    for title in (*trained, *(f"{size}x{size} raw and JPEG" for size in (32, 96, 224))):
        assert any(title in found for found in titles), title


def test_the_ramp_takes_the_fastest_batch_that_fits(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("configs/digits_lenet.yaml", **{"data.path": str(digits)})

    def reaches(**rates: float) -> tuple[int, list[str]]:
        def one(contestants: list[Contestant], *_: object, **__: object) -> list[Outcome]:
            rate = rates.get(contestants[0].name.replace(" ", "_"))
            error = None if rate else "OutOfMemoryError: too large"
            return [Outcome(contestants[0].name, "", [rate] if rate else [], error=error)]

        monkeypatch.setattr(ramp, "measure", one)
        best, reached = ramp.best_batch(config, 0.01, 1, None)
        return best.data.batch_size, list(reached)

    assert reaches(batch_256=100, batch_512=180, batch_1024=170, batch_2048=900) == (512, ["256", "512", "1024"])
    assert reaches(batch_256=100, batch_512=180) == (512, ["256", "512", "1024"])  # the third does not fit
    with pytest.raises(RuntimeError, match="batch 256: OutOfMemoryError"):
        reaches()


def test_placements_share_one_network_and_a_broken_one_costs_its_own_row(digits: Path, tmp_path: Path) -> None:
    config = load_config("configs/digits_lenet.yaml", **{"data.path": str(digits)})
    variants = {"host": {"placement": "host"}, "missing": {"path": str(tmp_path / "missing")}}
    resident, host, missing = measure([Contestant("ours", ours.training, (config, variants))], 0.05, 1)
    assert resident.rate > 0
    assert host.rate > 0
    assert host.facts["batch_size"] == config.data.batch_size
    assert "does not exist" in str(missing.error)


def test_after_the_deadline_nothing_new_is_started() -> None:
    (outcome,) = measure([Contestant("late", fixtures.steady)], 0.02, 1, deadline=time.monotonic() - 1)
    assert "the time of the whole run was over" in str(outcome.error)
