"""Tests of tools/summary.py: parameters, FLOPs and memory against known values and hand computation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from configs.utils.errors import UserError
from helpers.training import ROOT
from tools import summary
from tools.perf import model_cases
from tools.perf.summary_command import compute_costs
from train.distributed.process_group import Ranks, process_group

SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("sweeps", "base"))


@pytest.fixture(autouse=True)
def _no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_summary_writes_tables_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.main(["lenet", "resnet18", "--layers", "--batch-size", "8", "--optimizer", "sgd", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows["lenet"]["parameters"] == "83126"
    assert "83,126" in printed
    assert {row["memory"] for row in rows.values()} == {"estimated"}
    assert {row["optimizer"] for row in rows.values()} == {"sgd"}
    for name, row in rows.items():
        with (tmp_path / f"layers-{name}.csv").open() as file:
            *layers, total = csv.DictReader(file)
        for key in ("parameters", "forward_flops", "activations_bytes"):
            assert int(total[key]) == int(row[key]) == sum(int(layer[key]) for layer in layers)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_config_sets_activation_options_and_freezing(tmp_path: Path) -> None:
    model = (
        "{name: resnet18, activation: gelu, drop_rate: 0.1, options: {width: 16}, freeze: ['[!f]*'], finetune: gone}"
    )
    (tmp_path / "new.yaml").write_text(f"data: {{path: nowhere, image_size: 32}}\nmodel: {model}\n")
    out = tmp_path / "out"
    summary.main([str(tmp_path / "new.yaml"), "--classes", "10", "--batch-size", "4", "--layers", "--out", str(out)])
    with (out / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["architecture"], row["parameters"], row["trainable"]) == ("resnet18", "701466", "1290")
    assert int(row["gradients_bytes"]) == 4 * 1290
    with (out / "layers-new.csv").open() as file:
        types = {line["type"] for line in csv.DictReader(file)}
    assert "GELU" in types
    assert "ReLU" not in types


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lenet", "--size", "64"], "not supported by lenet"),
        (["lenett"], "not a model, config file or run folder"),
        (["timm/resnet1"], "unknown to timm"),
        (["lenet", "--batch-size", "0"], "--batch-size=0"),
        (["missing.yaml"], "cannot be read"),
    ],
)
def test_bad_input_is_a_one_line_error(arguments: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        summary.main(arguments)


def test_config_without_data_set_needs_classes_option(tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("data: {path: nowhere, image_size: 96}\nmodel: {name: resnet18}\n")
    with pytest.raises(UserError, match=r"number of classes.*give --classes"):
        summary.main([str(tmp_path / "new.yaml")])


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_head_of_a_shipped_config_states_its_costs(path: Path) -> None:
    config = load_config(path)
    classes = 10 if Path(config.data.path).name in ("cifar10", "digits") else 200
    stored = config.data.image_size or model_cases.STORED_SIZE
    gmacs, mib = [], []
    sizes = sorted({stage.image_size or stored for stage in config.data.stages} or {stored})
    for size in (sizes[0], sizes[-1]):
        case = model_cases.ModelCase(path.stem, config.model, size, classes, 2, config.train)
        counted, _ = compute_costs(case, torch.device("cpu"), None)
        gmacs.append(counted.forward_flops / 4e9)
        mib.append(counted.activation_bytes / 2**21)
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Cost"))
    assert line == (
        f"# Cost per image: {span(gmacs)} GMACs, {span(mib)} MiB for training in float32, at {span(sizes)} pixels."
    )


def span(values: Sequence[float]) -> str:
    """Return the first and the last number with three digits, or one if they are equal."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in (values[0], values[-1])))


@pytest.mark.gpu
def test_measured_gpu_memory_is_plausible() -> None:
    case = model_cases.build_case("alexnet", summary.parse_arguments(["x"]))
    with process_group(Ranks()) as device:
        costs, measured = compute_costs(case, device, torch.bfloat16)
    assert measured is not None
    assert costs.weight_bytes + costs.optimizer_bytes < measured < 2 * costs.memory_bytes
