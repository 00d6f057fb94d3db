"""Checkpoints of the homework's code, ckpt_best.pth: dictionaries with a state dict as `model`."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from configs.schema import DataConfig, EvalConfig
from configs.utils.code import load_object
from configs.utils.errors import UserError
from helpers.config_files import Write, writer
from helpers.own_code import write_own_code
from helpers.training import alone, make_state
from models import build_model
from models.weights import copy_weights, read_weights
from pipelines import build_eval_loader
from pipelines.storage.dataset import SourceInfo, load_dataset
from train.checkpoint.finetune import load_finetune
from train.checkpoint.store import is_foreign, load, load_newest, save
from train.trained_model import load_trained_model

Call = Callable[..., tuple[int, str, str]]
OUTPUTS = 200  # of the homework's LeNet, for any data set
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the homework's, of CIFAR-10


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config file in the homework's keys."""
    return writer(tmp_path, "MODEL: {NAME: lenet, NUM_CLASSES: 200}\nDATA: {DATASET: cifar10, IMG_SIZE: 32}\n")


@contextmanager
def settings_class(name: str = "yacs.config") -> Iterator[type]:
    """Return a class CfgNode of a module with this name, which cannot be imported afterwards."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = name, "CfgNode"
    modules = {part: ModuleType(part) for part in (name.split(".")[0], name)}
    modules[name].CfgNode = CfgNode  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for part, module in modules.items():
            patch.setitem(sys.modules, part, module)
        yield CfgNode


def homework_checkpoint(path: Path, network: nn.Module, **more: Any) -> Path:
    """Write what the homework's code saves: weights, optimizer, schedule, and settings as a CfgNode."""
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    with settings_class() as kind:
        content = {
            "model": network.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(),
            "max_accuracy": np.float64(0.61), "epoch": 49,
            "config": kind({"MODEL": kind({"NAME": "lenet"}), "LIST": [1, 2]}),
        }  # fmt: skip
        torch.save(content | more, path)
    return path


def lenet_of_200() -> nn.Module:
    torch.manual_seed(5)
    return build_model("lenet", OUTPUTS)


def test_homework_checkpoint_evaluates_like_its_network(
    write: Write, call: Call, npy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = lenet_of_200().eval()
    path = homework_checkpoint(tmp_path / "ckpt_best.pth", network)
    as_cifar = replace(load_dataset(str(npy_data)), source=SourceInfo("cifar10", "", ""))
    monkeypatch.setattr("train.build.load_dataset", lambda *_: as_cifar)
    code, out, err = call("--cfg", write(), "--data-path", npy_data, "--eval", "--resume", path)
    assert code == 0, err
    loader = build_eval_loader(DataConfig(path=str(npy_data)), EvalConfig(), device="cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        pairs = [(network((images / 255 - mean) / std), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert out.startswith(f"{path}: val loss {F.cross_entropy(logits, labels):.4f}, top1 {accuracy:.4f}, top5 ")
    assert "lenet with 200 outputs, of which the data set uses the first 12" in err
    assert "by mean [0.4914, 0.4822, 0.4465] and std [0.2023, 0.1994, 0.201]" in err


def test_weights_of_an_own_training_script_are_evaluated_in_the_own_model(
    write: Write, call: Call, npy_data: Path, tmp_path: Path
) -> None:
    file = write_own_code(tmp_path)
    network = load_object(f"{file}:Net", "model.name")(num_classes=12)
    assert isinstance(network, nn.Module)
    path = homework_checkpoint(tmp_path / "mine.pth", network)
    code, out, err = call("--cfg", write(), "--data-path", npy_data, "--eval", "--resume", path, "--opts",
                          f"model.name={file}:Net", f"train.loss={file}:missing")  # fmt: skip
    assert code == 0, err
    assert f"it is evaluated as {file}:Net with 12 outputs" in err
    assert out.startswith(f"{path}: val loss ")


def test_other_data_sets_use_imagenet_statistics_and_256(
    write: Write, call: Call, npy_data: Path, tmp_path: Path
) -> None:
    path = homework_checkpoint(tmp_path / "ckpt_best.pth", lenet_of_200())
    code, _, err = call("--cfg", write(), "--data-path", npy_data, "--eval", "--resume", path)
    assert code == 0, err
    assert "by mean [0.4869, 0.4578, 0.4076] and std [0.2299, 0.2249, 0.2259]" in err  # (x / 256 - 0.485) / 0.229


def test_run_starts_from_a_homework_checkpoint(write: Write, call: Call, npy_data: Path, tmp_path: Path) -> None:
    path = homework_checkpoint(tmp_path / "ckpt_best.pth", lenet_of_200())
    code, _, err = call("--cfg", write(), "--data-path", npy_data, "--output", tmp_path / "out", "--opts",
                        "TRAIN.EPOCHS=1", f"model.pretrained={path}")  # fmt: skip
    assert code == 0, err
    log = (tmp_path / "out" / "lenet" / "log.txt").read_text()
    assert f"loaded 8 tensors from {path}; new: fc3.weight, fc3.bias" in log


def test_resuming_homework_checkpoint_is_refused_with_advice(
    write: Write, call: Call, npy_data: Path, tmp_path: Path
) -> None:
    path = homework_checkpoint(tmp_path / "ckpt_best.pth", lenet_of_200())
    out = tmp_path / "out"
    code, _, err = call("--cfg", write(), "--data-path", npy_data, "--output", out, "--opts",
                        f"MODEL.RESUME={path}")  # fmt: skip
    assert code == 2
    assert f"{path} was written by another program, so only its weights can be used" in err
    assert f"--opts model.pretrained={path}" in err
    assert f"--eval --resume {path}" in err
    assert not out.exists()


def test_other_commands_refuse_homework_checkpoint_with_advice(tmp_path: Path) -> None:
    path = homework_checkpoint(tmp_path / "ckpt_best.pth", lenet_of_200())
    for read in (
        lambda: load(path),
        lambda: load_newest([path]),
        lambda: load_finetune(lenet_of_200(), str(path), "ab"),
        lambda: load_trained_model(path, torch.device("cpu")),
    ):
        with pytest.raises(UserError, match=r"written by another program, .*model\.pretrained=.* --eval --resume"):
            read()


def test_archive_with_a_broken_name_is_not_a_checkpoint(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("\u00e9\u00e9/data.pkl", b"x")
    path = tmp_path / "x.pt"
    path.write_bytes(content.getvalue().replace("\u00e9\u00e9".encode(), b"\xff\xfe\xff\xfe"))
    assert not is_foreign(path)


def test_damaged_own_checkpoint_is_not_foreign(tmp_path: Path) -> None:
    path, entries = tmp_path / "last.pt", {"position": {"epoch": 1, "step": 0}, "progress": {}, "stream": {}}
    with alone():
        state = make_state(lenet_of_200())
    save(path, state, state.sums, config="", dataset={}, **entries)
    content = path.read_bytes()
    begin = content.rindex(b'\n{"format"')
    for damaged in (content[:begin], content.replace(b"position", b"positiom"), content[: begin + 5]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="its checksum is wrong"):
            load(path)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_state_dicts_are_found_under_usual_names(tmp_path: Path, key: str, prefix: str) -> None:
    network = lenet_of_200()
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "x.pth")
    save_file(state, tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        weights = read_weights(tmp_path / file)
        assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("run-by-a-pickle", "w")


def test_objects_beside_weights_are_ignored_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = lenet_of_200()
    path = homework_checkpoint(tmp_path / "x.pth", network, evil=Evil(), deep=[{"a": Evil()}])
    assert read_weights(path).keys() == network.state_dict().keys()
    assert not (tmp_path / "run-by-a-pickle").exists()


def test_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    for content in ({"model": nn.Sequential(nn.Linear(2, 2))}, nn.Linear(2, 2)):
        torch.save(content, tmp_path / "x.pth")
        message = r"refused, since the file contains pickled objects .*state_dict\(\), FILE"
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "x.pth")


def test_other_names_are_listed_and_equal_shapes_reported(tmp_path: Path) -> None:
    network, theirs = lenet_of_200(), {f"net.{n}": t for n, t in enumerate(lenet_of_200().state_dict().values())}
    with pytest.raises(UserError) as caught:
        copy_weights(network, theirs, (), "weights x.pth")
    assert str(caught.value) == (
        "weights x.pth do not fit the model: missing: conv1.weight, conv1.bias, conv2.weight and 7 more; unexpected: "
        "net.0, net.1, net.2 and 7 more; take weights of the same architecture and options (all shapes agree in order, "
        "so perhaps only names differ; docs/recipes.md shows how to rename them)"
    )
    with pytest.raises(UserError, match=r"same architecture and options$"):
        copy_weights(network, dict(list(theirs.items())[1:]), (), "weights x.pth")


def test_evaluation_refuses_unsuitable_weights(write: Write, call: Call, npy_data: Path, tmp_path: Path) -> None:
    networks = {"net.pth": nn.Sequential(nn.Linear(2, 2)), "small.pth": build_model("lenet", 5)}
    reasons = {"net.pth": "unexpected: 0.weight, 0.bias", "small.pth": "have 5 outputs, but the data set in"}
    for name, network in networks.items():
        path = homework_checkpoint(tmp_path / name, network)
        code, _, err = call("--cfg", write(), "--data-path", npy_data, "--eval", "--resume", path)
        assert code == 2
        assert reasons[name] in err
