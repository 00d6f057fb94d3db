"""Runs that start from the weights of another run or a file, and freeze some of them."""

from __future__ import annotations

import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.load import load_config, parse_config, to_yaml
from configs.utils.errors import UserError, run_main
from helpers.memory_source import CLASSES, MemoryRows, memory_source, write
from helpers.training import DIGITS, ROOT, alone, broken_after
from models import build_model
from pipelines.convert.source import Source
from pipelines.storage.dataset import ModelDataset
from train import ddp
from train.build import build_all
from train.checkpoint import format, store
from train.checkpoint.finetune import load_finetune, without_pretrained
from train.trained_model import load_trained_model

OPTS = [
    "data.batch_size=16",
    "train.epochs=2",
    "train.lr=3e-3",
    "model.name=resnet18",
    "model.activation=gelu",
    "model.options={width: 16}",
]
FROZEN = ("network.conv1.", "network.bn1.", "network.layer1.")
FREEZE = 'model.freeze=["conv1.*", "bn1.*", "network.layer1.*"]'


def rows(samples: int, classes: int) -> MemoryRows:
    split = MemoryRows(samples)
    assert split.labels is not None
    split.labels %= classes
    return split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two data sets of 48 and 16 images, by number of classes."""
    folder = tmp_path_factory.mktemp("data")
    write(memory_source(train=rows(48, 12), val=rows(16, 12)), folder / "12")
    five = Source("few", "tests", CLASSES[3:8], "1" * 64, {"train": rows(48, 5), "val": rows(16, 5)})
    write(five, folder / "5")
    return {12: folder / "12", 5: folder / "5"}


@dataclass(frozen=True)
class Result:
    code: int
    folder: Path
    out: str
    err: str

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of last.pt."""
        model: dict[str, Tensor] = torch.load(self.folder / "last.pt", weights_only=True)["model"]
        return model


def run(data: Path, folder: Path, *opts: str, flags: tuple[str, ...] = ()) -> Result:
    """Run train/ddp.py in this process. folder: the run folder."""
    command = [
        "--cfg",
        ROOT / "configs" / "digits_lenet.yaml",
        "--data-path",
        data,
        "--output",
        folder.parent,
        *flags,
        "--opts",
        f"name={folder.name}",
        *OPTS,
        *opts,
    ]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", ["train/ddp.py", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            run_main(ddp.main)
    return Result(int(stopped.value.code or 0), folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def source(data: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run on 12 classes. Do not modify."""
    result = run(data[12], tmp_path_factory.mktemp("source") / "source")
    assert (result.code, result.err) == (0, "")
    return result


@pytest.fixture(scope="module")
def tuned(source: Result, data: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run on 5 classes from the weights of `source`, with its first layers frozen. Do not modify."""
    result = run(data[5], tmp_path_factory.mktemp("tuned") / "tuned", f"model.finetune={source.folder}", FREEZE)
    assert (result.code, result.err) == (0, "")
    return result


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


# Whole runs


@pytest.mark.slow
def test_frozen_parts_stay_bitwise_and_the_rest_trains(source: Result, tuned: Result) -> None:
    start = torch.load(source.folder / "best.pt", weights_only=True)["model"]
    end = tuned.weights
    assert end["network.fc.weight"].shape == (5, 128)
    kept = {name for name in end if name not in differing(end, start)}
    assert kept == {name for name in end if name.startswith((*FROZEN, "normalize."))}
    assert "network.layer1.0.bn1.running_mean" in kept


def test_log_names_loaded_new_and_frozen_parts(source: Result, tuned: Result) -> None:
    log = (tuned.folder / "log.txt").read_text()
    tensors = len(tuned.weights)
    expected = f"loaded {tensors - 2} tensors from {source.folder / 'best.pt'}; new: network.fc.weight, network.fc.bias"
    assert log.count(expected) == 1
    assert "frozen: 15 of 62 tensors" in log


def test_fine_tuned_run_resumes_bitwise_without_its_source(
    source: Result, tuned: Result, data: dict[int, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source.folder, tmp_path / "source"))
    options = (f"model.finetune={copy}", FREEZE)
    folder = tmp_path / "tuned"
    with broken_after(lambda name, _: name == "last.pt"):
        run(data[5], folder, *options)
    shutil.rmtree(copy)
    assert torch.load(folder / "last.pt", weights_only=True)["position"] == {"epoch": 1, "step": 0}
    result = run(data[5], folder, *options, flags=("--resume", "auto"))
    assert (result.code, result.err) == (0, "")
    assert "resumed from" in result.out
    assert "fine-tunes" not in result.out
    assert differing(result.weights, tuned.weights) == set()


def test_tools_need_neither_source_nor_data_set(tuned: Result, tmp_path: Path) -> None:
    content = torch.load(tuned.folder / "last.pt", weights_only=True)
    lines = [
        f"  finetune: {tmp_path / 'gone'}" if line.startswith("  finetune:") else line
        for line in content["config"].splitlines()
    ]
    content["config"] = "\n".join(lines)
    assert str(tmp_path / "gone") in content["config"]
    resaved(content, tmp_path / "last.pt")
    with alone() as device:
        trained = load_trained_model(tmp_path / "last.pt", device)
    assert trained.dataset.classes == CLASSES[3:8]
    assert differing(trained.state.network.state_dict(), content["model"]) == set()


@pytest.mark.parametrize(
    ("opt", "refusal"),
    [
        ("model.freeze=[]", 'model.freeze: ["conv1.*", "bn1.*", "network.layer1.*"] then, [] now'),
        ("model.activation=relu", 'model.activation: "gelu" then, "relu" now'),
        ("model.name=resnet34", 'model.name: "resnet18" then, "resnet34" now'),
        ("model.options={zero_init_residual: true}", 'model.options: {"width": 16} then, {"width": 16, "zero'),
        ("model.finetune=null", "model.finetune: "),
        ("model.drop_rate=0.1", "model.drop_rate: null then, 0.1 now"),
    ],
)
def test_run_does_not_resume_as_another_model(
    opt: str, refusal: str, tuned: Result, data: dict[int, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tuned.folder, tmp_path / "tuned"))
    content = torch.load(folder / "last.pt", weights_only=True)
    finetune = parse_config(content["config"], "the checkpoint").model.finetune
    options = [f"model.finetune={finetune}", FREEZE, opt]
    result = run(data[5], folder, *options, flags=("--resume", "auto"))
    assert result.code == 2
    assert refusal in result.err
    assert len(result.err.splitlines()) == 1


def test_weights_file_is_needed_only_for_the_start(data: dict[int, Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs: nn.Module = timm.create_model("test_resnet", num_classes=9)
    file = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), file)
    options = (
        "model.name=timm/test_resnet",
        "model.options.width=null",
        f"model.pretrained={file}",
        'model.freeze=["layer1.*"]',
    )
    result = run(data[5], tmp_path / "run", *options)
    assert (result.code, result.err) == (0, "")
    assert "new: fc.weight, fc.bias" in result.out
    weights = result.weights
    assert torch.equal(weights["network.layer1.0.conv1.weight"], theirs.layer1[0].conv1.weight)
    published = timm.get_pretrained_cfg("test_resnet")
    torch.testing.assert_close(weights["normalize.mean"], torch.tensor(published.mean))
    file.unlink()
    assert run(data[5], tmp_path / "run", *options, flags=("--resume", "auto")).code == 0
    assert "top1" in run(data[5], tmp_path / "run", *options, flags=("--resume", "auto", "--eval")).out
    with alone() as device:
        trained = load_trained_model(tmp_path / "run", device)
    assert torch.equal(trained.state.network.normalize.mean, weights["normalize.mean"])
    assert run(data[5], tmp_path / "new", *options).err.startswith(f"error: weights {file} do not exist")


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("model.finetune=/nowhere/last.pt", "checkpoint /nowhere/last.pt does not exist"),
        ("model.freeze=[layer7.*]", "'layer7.*' matches no parameter"),
        ("model.pretrained=true", "but model 'resnet18' has none;"),
        ("model.options={widht: 4}", "widht=4 is not an option"),
        ("model.options={width: wide}", "width='wide' has the wrong type"),
        ("model.activation=swish", "model.activation"),
    ],
)
def test_invalid_finetune_is_one_error_and_leaves_no_folder(
    opt: str, message: str, data: dict[int, Path], tmp_path: Path
) -> None:
    result = run(data[5], tmp_path / "output" / "run", opt)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "output").exists()


def test_loaded_whitening_layer_is_not_fitted_again(data: dict[int, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = build_model("speedrun96_proxy", 4, mean=[0.5] * 3, std=[0.5] * 3)
    path = saved(tmp_path / "last.pt", theirs)
    speedrun = (
        "model.name=speedrun96_proxy",
        "model.activation=null",
        "model.options.width=null",
        "train.epochs=1",
        "train.warmup_epochs=0",
    )
    results = [
        run(data[5], tmp_path / f"run-{bool(more)}", *speedrun, *more) for more in ((), (f"model.finetune={path}",))
    ]
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    fresh, tuned = (result.weights["network.whitening.weight"] for result in results)
    assert torch.equal(tuned, theirs.network.whitening.weight)
    assert not torch.equal(fresh, tuned)


def test_evaluation_uses_the_model_of_the_checkpoint(source: Result, data: dict[int, Path]) -> None:
    best = ("--eval", "--resume", str(source.folder / "best.pt"))
    (as_trained, other) = (
        run(data[12], source.folder, *more, flags=best)
        for more in ((), ("model.activation=silu", "model.options={width: 32}"))
    )
    assert as_trained.code == other.code == 0
    assert as_trained.out == other.out
    assert "top1" in other.out
    refused = run(data[5], source.folder, flags=best)
    assert refused.code == 2
    assert "was trained on the classes" in refused.err
    assert "(12)" in refused.err
    assert "(5)" in refused.err


def test_weights_of_another_activation_are_refused(source: Result, data: dict[int, Path], tmp_path: Path) -> None:
    refused = run(data[5], tmp_path / "run", f"model.finetune={source.folder}", "model.activation=relu")
    assert refused.code == 2
    assert "was trained with model.activation=gelu, this config has relu; set model.activation=gelu" in refused.err


# Loading weights


def resaved(content: dict[str, Any], path: Path) -> None:
    store.write(path, {"format": format.FORMAT, **content})


def saved(path: Path, network: nn.Module, **more: Any) -> Path:
    resaved({"model": network.state_dict(), "sums": torch.zeros(3), **more}, path)
    return path


def lenet(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("lenet", classes, mean=[seed / 10] * 3, std=[0.5] * 3)


def test_finetune_uses_the_average_if_it_counts(tmp_path: Path) -> None:
    raw, average, ours = (lenet(4, seed) for seed in (1, 2, 3))
    config = {weights: to_yaml(load_config(DIGITS, [f"eval.weights={weights}"])) for weights in ("auto", "raw")}
    path = tmp_path / "last.pt"
    for ema, weights, expected in (
        (average.state_dict(), "auto", average),
        (average.state_dict(), "raw", raw),
        ({}, "auto", raw),
    ):
        load_finetune(ours, str(saved(path, raw, ema=ema, config=config[weights])), "abcd")
        assert differing(ours.state_dict(), expected.state_dict()) == set()


@pytest.mark.parametrize(("classes", "is_new"), [("abcd", False), ("abce", True), (None, False)])
def test_head_is_new_for_other_classes_of_equal_number(classes: str | None, is_new: bool, tmp_path: Path) -> None:
    theirs, ours = lenet(4, 1), lenet(4, 2)
    drawn = ours.network.fc3.weight.clone()
    about = {"dataset": {"classes": list(classes)}} if classes else {}
    note = load_finetune(ours, str(saved(tmp_path / "last.pt", theirs, **about)), "abcd")
    assert torch.equal(ours.network.fc3.weight, drawn if is_new else theirs.network.fc3.weight)
    assert torch.equal(ours.network.fc2.weight, theirs.network.fc2.weight)
    assert ("new: network.fc3.weight, network.fc3.bias" in note) is is_new


def test_head_of_timm_model_is_its_classifier(tmp_path: Path) -> None:
    for name, head in (("test_vit", "network.head"), ("test_convnext", "network.head.fc")):
        theirs, ours = (
            build_model(f"timm/{name}", classes, image_size=32, mean=[0.5] * 3, std=[0.5] * 3) for classes in (4, 6)
        )
        note = load_finetune(ours, str(saved(tmp_path / "last.pt", theirs)), "abcdef")
        assert note.endswith(f"; new: {head}.weight, {head}.bias")


def test_misfits_outside_the_head_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    theirs, ours = (build_model("resnet18", 4, width=width, mean=[0.5] * 3, std=[0.5] * 3) for width in (16, 32))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError, match=r"network.conv1.weight is \[16, 3, 3, 3\] there and \[32, 3, 3, 3\] here"):
        load_finetune(ours, str(saved(tmp_path / "last.pt", theirs)), "abcd")
    with pytest.raises(UserError, match=r"missing: network.bn1.weight, .*; unexpected: network.conv1.bias, "):
        load_finetune(ours, str(saved(tmp_path / "last.pt", lenet(4, 0))), "abcd")
    assert differing(before, ours.state_dict()) == set()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_finetune(ours, str(tmp_path / "empty"), "abcd")


def test_without_pretrained_builds_random_weights(data: dict[int, Path], tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "digits_lenet.yaml", ["model.finetune=/nowhere", "model.drop_rate=0.1"])
    dataset = ModelDataset("two", ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    with alone() as device:
        state = build_all(without_pretrained(config), dataset, 32, device)
        assert state.notes == ()
        with pytest.raises(UserError, match="/nowhere does not exist"):
            build_all(config, dataset, 32, device)
    assert state.network.network.drop_rate == 0.1
