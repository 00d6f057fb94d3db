"""Homework config files: optimizer, learning rates and augmentation follow the file, else the homework's defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.load import load_config
from configs.schema import Config
from configs.utils import warnings
from helpers.config_files import Write, writer
from helpers.training import CPU, lenet, strict_lines
from models import build_from_config
from pipelines import build_eval_loader, build_train_loader
from train.optim.factory import build_optimizer
from train.optim.schedule import Timeline, learning_rate

UPDATES = 5  # per epoch, in the tests of learning rates
# Like the homework's own files: the warm-up is longer than one epoch, one key comes twice, CIFAR-10 has 200
# outputs, and OUTPUT may end in the model's name.
LENET = {
    "AUG.COLOR_JITTER": 0.3, "AUG.RAND_AUGMENT": "rand-m5-n1",
    "DATA.BATCH_SIZE": 256, "DATA.DATASET": "cifar10", "DATA.IMG_SIZE": 33, "DATA.INTERPOLATION": "bicubic",
    "DATA.NUM_WORKERS": 32, "DATA.PIN_MEMORY": True,
    "MODEL.NAME": "lenet", "MODEL.NUM_CLASSES": 200, "MODEL.DROP_RATE": 0.1,
    "TRAIN.EPOCHS": 50, "TRAIN.WARMUP_EPOCHS": 10, "TRAIN.LR": 3e-4, "TRAIN.MIN_LR": 3e-5, "TRAIN.WARMUP_LR": 2e-5,
    "TRAIN.ACCUMULATION_STEPS": 2,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.OPTIMIZER.NAME": "adam", "TRAIN.OPTIMIZER.EPS": 1e-7, "TRAIN.OPTIMIZER.BETAS": [0.8, 0.95],
    "TRAIN.OPTIMIZER.MOMENTUM": 0.8,
    "TEST.CROP": True, "SEED": 3, "OUTPUT": "output/lenet", "SAVE_FREQ": 5, "PRINT_FREQ": 500,
}  # fmt: skip
RESNET = LENET | {
    "DATA.DATASET": "medium_imagenet", "DATA.IMG_SIZE": 64, "MODEL.NAME": "resnet18", "TRAIN.EPOCHS": 30,
    "TRAIN.LR": 0.1, "TRAIN.MIN_LR": 0.01, "TRAIN.WARMUP_LR": 0.02, "TRAIN.OPTIMIZER.NAME": "SGD",
    "OUTPUT": "output/resnet18_medium_imagenet",
}  # fmt: skip
ALEXNET = LENET | {
    "DATA.IMG_SIZE": 70, "MODEL.NAME": "alexnet", "TRAIN.OPTIMIZER.NAME": "adamw", "OUTPUT": "output/alexnet_cifar",
}  # fmt: skip
FILES = {"lenet": LENET, "alexnet": ALEXNET, "resnet18": RESNET}
# The homework's defaults of missing keys.
UNWRITTEN: dict[str, Any] = {
    "AUG.COLOR_JITTER": 0.4, "AUG.RAND_AUGMENT": "none", "DATA.BATCH_SIZE": 128, "DATA.DATASET": "cifar10",
    "DATA.IMG_SIZE": 224, "DATA.INTERPOLATION": "bilinear", "MODEL.DROP_RATE": None,
    "TRAIN.EPOCHS": 300, "TRAIN.WARMUP_EPOCHS": 0, "TRAIN.LR": 5e-4, "TRAIN.MIN_LR": 0.0, "TRAIN.WARMUP_LR": 0.0,
    "TRAIN.ACCUMULATION_STEPS": 1, "TRAIN.LR_SCHEDULER.NAME": "cosine", "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8, "TRAIN.OPTIMIZER.BETAS": [0.9, 0.999], "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    "TEST.CROP": False, "SEED": 0, "OUTPUT": "output", "SAVE_FREQ": 1, "PRINT_FREQ": 50,
}  # fmt: skip
LEFT_OUT = ["", *(key for key in LENET if key != "MODEL.NAME")]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config file."""
    return writer(tmp_path, "")


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


def text_of(keys: dict[str, Any]) -> str:
    """Return the YAML of these dotted keys without None values."""
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return yaml.safe_dump(nested)


def optimizer_there(name: str, keys: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the homework's optimizer, with torch's weight decay."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=keys["TRAIN.LR"], momentum=keys["TRAIN.OPTIMIZER.MOMENTUM"], nesterov=True
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    betas = tuple(keys["TRAIN.OPTIMIZER.BETAS"])
    return kind(parameters, lr=keys["TRAIN.LR"], betas=betas, eps=keys["TRAIN.OPTIMIZER.EPS"])


def rates_there(keys: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the rate of each step: the file's warm-up, then torch's cosine, stepped once per epoch."""
    epochs, warmup = keys["TRAIN.EPOCHS"], keys["TRAIN.WARMUP_EPOCHS"]
    first, updates = keys["TRAIN.WARMUP_LR"], warmup * UPDATES
    rates = [first + (keys["TRAIN.LR"] - first) * (update + 1) / updates for update in range(updates)]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs - warmup, keys["TRAIN.MIN_LR"])
    for _ in range(warmup, epochs):
        rates += [optimizer.param_groups[0]["lr"]] * UPDATES
        optimizer.step()
        cosine.step()
    return rates


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_missing_key_uses_homework_default_others_the_file(
    write: Write, capsys: pytest.CaptureFixture[str], file: str, left_out: str
) -> None:
    written = {key: value for key, value in FILES[file].items() if key != left_out}
    keys = UNWRITTEN | written
    keys |= {
        key: min(keys[key], keys["TRAIN.LR"]) for key in ("TRAIN.MIN_LR", "TRAIN.WARMUP_LR")
    }  # reduced, with a note
    config = load_config(write(text_of(written)))
    (listed,) = [line for line in capsys.readouterr().err.splitlines() if "have the homework's defaults" in line]
    assert (f" {left_out}=" in listed) == (left_out not in not_read(keys))

    name = keys["TRAIN.OPTIMIZER.NAME"].lower()
    there = optimizer_there(name, keys)
    here = build_optimizer(lenet(), config.train.optimizer, config.train.lr)
    (group,) = here.param_groups
    assert isinstance(here, type(there))
    for setting in ("weight_decay", "betas", "eps", "momentum", "nesterov", "amsgrad", "dampening"):
        assert group.get(setting) == there.defaults.get(setting)

    timeline = Timeline.even(config.train.epochs, UPDATES)
    rates = [learning_rate(update, timeline, config.train) for update in range(timeline.total)]
    assert rates == pytest.approx(rates_there(keys, there), rel=1e-9, abs=1e-12)
    check_pictures(config, keys)
    check_the_rest(config, keys)


def not_read(keys: dict[str, Any]) -> tuple[str, ...]:
    """Return keys without meaning here, or for the file's optimizer."""
    of_sgd, of_adam = ("TRAIN.OPTIMIZER.MOMENTUM",), ("TRAIN.OPTIMIZER.EPS", "TRAIN.OPTIMIZER.BETAS")
    of_others = of_adam if keys["TRAIN.OPTIMIZER.NAME"] == "SGD" else of_sgd
    return ("", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", *of_others)


def check_pictures(config: Config, keys: dict[str, Any]) -> None:
    jitter, aug = config.aug.color_jitter, config.aug
    strength = keys["AUG.COLOR_JITTER"]
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (strength, strength, strength, 0)
    assert (aug.auto.policy, aug.flip, aug.crop) == (keys["AUG.RAND_AUGMENT"], 0.5, "squash")
    assert (aug.grayscale, aug.blur.probability, aug.erase.probability, aug.mix.mixup, aug.mix.cutmix) == (0,) * 5
    assert (config.data.image_size, config.data.interpolation) == (keys["DATA.IMG_SIZE"], keys["DATA.INTERPOLATION"])
    assert config.eval.crop_mode == ("center" if keys["TEST.CROP"] else "squash")


def check_the_rest(config: Config, keys: dict[str, Any]) -> None:
    train = config.train
    assert (train.loss, train.label_smoothing, train.amp, train.clip_grad_norm) == ("cross-entropy", 0, "off", None)
    assert (config.data.batch_size, train.accumulation_steps) == (
        keys["DATA.BATCH_SIZE"], keys["TRAIN.ACCUMULATION_STEPS"],
    )  # fmt: skip
    assert (config.seed, train.save_every_epochs, config.log.every_steps) == (
        keys["SEED"], keys["SAVE_FREQ"], keys["PRINT_FREQ"],
    )  # fmt: skip
    assert (config.model.name, config.model.drop_rate) == (keys["MODEL.NAME"], keys["MODEL.DROP_RATE"])


@pytest.mark.parametrize("file", FILES)
def test_every_homework_file_runs_with_one_epoch(write: Write, capsys: pytest.CaptureFixture[str], file: str) -> None:
    path = write(text_of(FILES[file]))
    config = load_config(path, ["TRAIN.EPOCHS", "1"])
    assert (config.train.epochs, config.train.warmup_epochs) == (1, 1)
    assert "TRAIN.WARMUP_EPOCHS=10 is longer than the run and is cut to 1" in capsys.readouterr().err


def test_homework_rate_without_warm_up_falls_per_epoch(write: Write) -> None:
    train = load_config(write(text_of({"MODEL.NAME": "lenet", "TRAIN.EPOCHS": 4, "TRAIN.LR": 0.2}))).train
    rates = [learning_rate(update, Timeline.even(4, 3), train) for update in range(12)]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)])


def test_training_sees_the_whole_image_squashed(write: Write, jpeg_data: Path) -> None:
    """The images have several shapes, so the central square would cut off parts of most."""
    config = load_config(write(text_of({"MODEL.NAME": "lenet", "DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 16})),
                         ["aug.flip=0", "aug.color_jitter=0"], **{"data.path": str(jpeg_data)})  # fmt: skip
    squashed, central = (
        next(iter(build_train_loader(config.data, aug, device=CPU)))
        for aug in (config.aug, config.aug.model_copy(update={"crop": "none"}))
    )
    whole = config.data.model_copy(update={"val_split": "train"})
    stored = torch.cat([batch.images for batch in build_eval_loader(whole, config.eval, device=CPU)])
    assert all(any(torch.equal(image, other) for other in stored) for image in squashed.images)
    assert not torch.equal(squashed.images, central.images)


def test_second_run_gets_its_own_folder(
    write: Write, call: Callable[..., tuple[int, str, str]], npy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "lenet"
    keys = LENET | {"DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 100, "OUTPUT": str(out), "AUG.RAND_AUGMENT": ""}
    path = write(text_of(keys))
    for folder in (out, out.with_name("lenet-2")):
        code, _, err = call("--cfg", path, "--data-path", npy_data, "--opts", "TRAIN.EPOCHS", "1", "SEED", "1")
        assert code == 0, err
        assert len(strict_lines(folder / "metrics.jsonl")) == 1
        assert (folder / "best.pt").exists()
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["lenet", "lenet-2"]


def test_model_has_the_dropout_of_the_file(write: Write) -> None:
    for written, rates in ((0.1, {0.1}), (0.0, {0.0}), (None, {0.5})):
        keys = {key: value for key, value in (ALEXNET | {"MODEL.DROP_RATE": written}).items() if value is not None}
        with torch.device("meta"):
            model = build_from_config(
                load_config(write(text_of(keys))).model, 10, image_size=70, mean=[0.5] * 3, std=[0.5] * 3
            )
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == rates
