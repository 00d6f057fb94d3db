"""Tests of tools/export.py: exported files reproduce the checkpoint's logits, or are not written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from helpers.training import CPU, DIGITS, Run, alone
from pipelines import build_eval_loader
from pipelines.storage.dataset import load_dataset
from tools import export
from tools.inference import export_check
from tools.inference.export_formats import FORMATS
from train.build import build_all
from train.checkpoint import store
from train.checkpoint.finetune import without_pretrained
from train.trained_model import load_trained_model

NAMES = ("safetensors", "torch", "onnx")
FILES = {"model.safetensors", "config.json", "model.pt2", "model.onnx", "export.json"}


@dataclass(frozen=True)
class Result:
    code: int
    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "export.json").read_text())
        return content

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def run_as_printed(self, name: str, images: Tensor) -> Tensor:
        """Run the printed code of a format and return its logits."""
        lines = next(row["use"] for row in self.report["formats"] if row["format"] == name)
        names = {"images": images}
        with torch.no_grad():
            exec("\n".join(lines), names)
        return torch.as_tensor(names["logits"])


def run_export(source: Path, folder: Path, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", "--checkpoint", str(source), "--out", str(folder), *arguments])
        return Result(export.main(), folder)


@pytest.fixture(scope="module")
def lenet_export(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = run_export(digits_run.folder, tmp_path_factory.mktemp("lenet") / "export")
    assert result.code == 0
    return result


@pytest.fixture(scope="module")
def network(digits_run: Run) -> nn.Module:
    with alone() as device:
        return load_trained_model(digits_run.folder, device).state.network


@pytest.fixture(scope="module")
def digits(digits_run: Run) -> Tensor:
    """64 images of the validation split, uint8 [64, 3, 32, 32]."""
    data = load_config(DIGITS, **{"data.path": str(digits_run.data)}).data
    return next(iter(build_eval_loader(data, device=CPU))).images.clone()


@pytest.fixture(scope="module")
def timm_checkpoint(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialized vision transformer of timm, whose data set does not exist."""
    path = tmp_path_factory.mktemp("timm") / "last.pt"
    settings = {"model.name": "timm/test_vit", "data.path": str(path.parent / "gone"), "eval.crop_fraction": 0.875}
    return write_checkpoint(path, digits_run.data, **settings)


def write_checkpoint(path: Path, data: Path, **settings: Any) -> Path:
    """Write a checkpoint of a randomly initialized model for the classes of `data`."""
    config = load_config(DIGITS, **{"data.path": str(data), **settings})
    dataset = load_dataset(data)
    facts = {"name": dataset.name, "image_size": 32}
    facts |= {key: list(getattr(dataset, key)) for key in ("classes", "mean", "std")}
    with alone() as device:
        training = build_all(without_pretrained(config), dataset, 32, device)
        about = {"position": {"epoch": 0, "step": 0}, "config": to_yaml(config), "dataset": facts}
        store.save(path, training, training.sums, **about)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ({"name": "resnet18", "activation": "gelu", "drop_rate": 0.2, "options": {"width": 16}, "freeze": ["layer1.*"]},
         {"width": 16, "activation": "gelu"}),
        # the finetune checkpoint does not exist, and drop_path_rate only affects training
        ({"name": "timm/test_vit", "activation": "silu", "options": {"drop_path_rate": 0.1}, "finetune": "gone"},
         {"act_layer": "silu"}),
    ],
)  # fmt: skip
def test_activation_and_width_are_exported(
    model: dict[str, Any], arguments: dict[str, Any], digits_run: Run, digits: Tensor, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "last.pt", digits_run.data, model=model)
    result = run_export(path, tmp_path / "export")
    assert result.code == 0
    config = json.loads((result.folder / "config.json").read_text())
    assert arguments.items() <= config["model_args"].items()
    with alone() as device, torch.no_grad():
        expected = load_trained_model(path, device).state.network(digits)
    for name in NAMES:
        assert (result.run_as_printed(name, digits) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("samples", [1, 5, 64])
@pytest.mark.parametrize("name", NAMES)
def test_printed_code_reproduces_the_checkpoints_logits(
    name: str, samples: int, lenet_export: Result, network: nn.Module, digits: Tensor
) -> None:
    with torch.no_grad():
        expected = network(digits[:samples])
    logits = lenet_export.run_as_printed(name, digits[:samples])
    assert logits.shape == (samples, 10)
    assert (logits - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1


def test_report_counts_all_verified_images(lenet_export: Result) -> None:
    assert lenet_export.files == FILES
    report = lenet_export.report
    assert report["verified_on"].startswith("256 images of split 'val' of ")
    assert [row["format"] for row in report["formats"]] == list(NAMES)
    assert all(row["same top-1"] == "256 of 256" and row["max difference"] <= 1e-4 for row in report["formats"])
    assert report["versions"].keys() >= {"torch", "onnx", "onnxruntime"}


def test_safetensors_has_checkpoint_weights_under_plain_names(lenet_export: Result, digits_run: Run) -> None:
    weights = load_file(lenet_export.folder / "model.safetensors")
    saved = torch.load(digits_run.folder / "best.pt", weights_only=True)["model"]
    assert {f"network.{name}" for name in weights} == {name for name in saved if name.startswith("network.")}
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved[f"network.{name}"])


def test_config_json_has_preprocessing_and_classes(lenet_export: Result, digits_run: Run) -> None:
    config = json.loads((lenet_export.folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("lenet", 10, 84)
    assert config["label_names"] == list("0123456789")
    recipe, dataset = config["pretrained_cfg"], load_dataset(digits_run.data)
    for key in ("mean", "std"):
        assert torch.equal(torch.tensor(recipe[key]), torch.tensor(getattr(dataset, key)))
    assert recipe["input_size"] == [3, 32, 32]
    assert (recipe["interpolation"], recipe["crop_pct"]) == ("bilinear", 1.0)
    assert (recipe["first_conv"], recipe["classifier"]) == ("conv1", "fc3")


def test_onnx_is_one_file_with_metadata(lenet_export: Result) -> None:
    session = onnxruntime.InferenceSession(lenet_export.folder / "model.onnx")
    images, logits = session.get_inputs()[0], session.get_outputs()[0]
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list("0123456789")
    assert (facts["model"], facts["image_size"], facts["dataset"]) == ("lenet", "32", "digits")
    assert len(facts["checkpoint_sha256"]) == 64


def test_timm_model_loads_from_exported_folder(
    timm_checkpoint: Path, digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("safetensors", "torch")
    result = run_export(timm_checkpoint, tmp_path, "--format", *names)
    assert result.code == 0
    assert "256 images of random pixels" in capsys.readouterr().out
    assert {row["verified on"] for row in result.report["formats"]} == {"random pixels"}
    with alone() as device:
        network = load_trained_model(timm_checkpoint, device).state.network
    with torch.no_grad():
        expected = network(digits)
    for name in names:
        assert (result.run_as_printed(name, digits) - expected).abs().max() <= 1e-4
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["pretrained_cfg"]["crop_pct"]) == ("test_vit", 0.875)
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["license"] is None


def test_data_path_option_is_used_and_must_exist(timm_checkpoint: Path, digits_run: Run, tmp_path: Path) -> None:
    arguments = ("--format", "safetensors", "--verify-images", "9", "--data-path")
    report = run_export(timm_checkpoint, tmp_path / "out", *arguments, str(digits_run.data)).report
    assert report["verified_on"] == f"9 images of split 'val' of {digits_run.data}"
    with pytest.raises(UserError, match="does not exist"):
        run_export(timm_checkpoint, tmp_path / "missed", *arguments, str(tmp_path / "missing"))
    assert not (tmp_path / "missed").exists()


def off_by(difference: float) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    """Return a loader of safetensors that changes a logit of the first image by `difference`."""

    def load(folder: Path) -> Callable[[Tensor], Tensor]:
        predict = FORMATS["safetensors"].load(folder)

        def wrong(images: Tensor) -> Tensor:
            logits = predict(images)
            logits[0, 0] += difference
            return logits

        return wrong

    return load


def test_differing_format_is_not_written_and_others_continue(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first.onnx").write_text("mine")
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["safetensors"], load=off_by(2e-4)))
    arguments = ("--format", "onnx", "safetensors")
    first = run_export(digits_run.folder, tmp_path, *arguments[:2])
    assert first.code == 1
    assert first.files == {"first.onnx", "export.json"}
    error = capsys.readouterr().err
    assert "error: format onnx gives logits that differ by up to 2.0" in error
    assert "1.0e-04 is allowed, so nothing is kept" in error
    second = run_export(digits_run.folder, tmp_path, *arguments)
    assert second.code == 1
    assert second.files == {"first.onnx", "export.json", "config.json", "model.safetensors"}
    assert list(second.report["failed"]) == ["onnx"]
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert run_export(digits_run.folder, tmp_path, *arguments[:2]).code == 1
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert run_export(digits_run.folder, tmp_path, *arguments, "--tolerance", "3e-4").code == 0


def test_diverged_checkpoint_is_refused(timm_checkpoint: Path, tmp_path: Path) -> None:
    with alone() as device:
        trained = load_trained_model(timm_checkpoint, device)
    next(trained.state.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="logits that are not finite"):
        export_check.expected_logits(trained, None, 3)


@pytest.mark.parametrize("bad", [("--verify-images", "0"), ("--tolerance", "nan")])
def test_invalid_numbers_are_refused_before_loading(bad: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{bad[0]}={bad[1]}"):
        run_export(tmp_path / "no-such-run", tmp_path / "out", *bad)
