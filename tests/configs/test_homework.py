"""Configs in the homework's keys: translation, defaults, errors and whole runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.homework_keys import KEYS, SECTIONS
from configs.load import load_config, to_yaml
from configs.schema import Config, all_settings
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.config_files import Write, load_error, writer
from helpers.training import ROOT, strict_lines

SHIPPED = sorted((ROOT / "configs" / "homework").glob("*.yaml"))
LENET = """\
DATA:
  BATCH_SIZE: 256
  DATASET: "cifar10"
  IMG_SIZE: 32
  INTERPOLATION: bilinear
  NUM_WORKERS: 32
  PIN_MEMORY: True
MODEL:
  NAME: lenet
  NUM_CLASSES: 10
  DROP_RATE: 0.0
TRAIN:
  EPOCHS: 50
  WARMUP_EPOCHS: 10
  LR: 3e-4
  MIN_LR: 3e-5
  WARMUP_LR: 2e-5
  LR_SCHEDULER:
    NAME: "cosine"
  OPTIMIZER:
    NAME: "adamw"
    EPS: 1e-7
    BETAS: (0.9, 0.95)
    MOMENTUM: 0.8
AUG:
  COLOR_JITTER: 0.3
  RAND_AUGMENT: ""
OUTPUT: "output/lenet"
SAVE_FREQ: 5
PRINT_FREQ: 500
"""
RESNET = """\
BASE: ['']
DATA: {BATCH_SIZE: 64, DATA_PATH: /data/converted, DATASET: medium_imagenet, IMG_SIZE: 64}
MODEL: {NAME: timm/resnet26, RESUME: output/old/last.pt, NUM_CLASSES: 200, DROP_RATE: 0.2, LABEL_SMOOTHING: 0.1}
TRAIN:
  START_EPOCH: 3
  EPOCHS: 30
  WARMUP_EPOCHS: 0
  LR: 0.1
  MIN_LR: 0
  WARMUP_LR: 0
  ACCUMULATION_STEPS: 4
  WEIGHT_DECAY: 1e-4
  CLIP_GRAD: 5.0
  LR_SCHEDULER: {NAME: StepLR, DECAY_EPOCHS: 10, DECAY_RATE: 0.5}
  OPTIMIZER: {NAME: SGD, MOMENTUM: 0.85}
AUG: {COLOR_JITTER: 0, RAND_AUGMENT: rand-m5-n1, MIXUP: 0.8, CUTMIX: 1.0, REPROB: 0.25}
TEST: {CROP: False, SEQUENTIAL: True, SHUFFLE: False}
SEED: 7
EVAL_MODE: True
"""
MINIMAL = "MODEL: {NAME: lenet}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config file."""
    return writer(tmp_path, MINIMAL)


@pytest.fixture(autouse=True)
def _clear_warnings() -> None:
    warnings.warn.cache_clear()  # each warning is printed once per process


def notes_besides_the_list(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on stderr except the list of defaults."""
    lists = " keys not given have the homework's defaults: "
    lines = capsys.readouterr().err.splitlines()
    assert sum(lists in line for line in lines) == 1
    return [line for line in lines if lists not in line]


def flat_settings(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            is_section = isinstance(value, dict) and any(known.startswith(f"{prefix}{key}.") for known in known_keys)
            found |= flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
        return found

    known_keys = [key for key, _ in all_settings()]
    return flat(config.model_dump())


def changes(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the schema's defaults."""
    plain = flat_settings(Config.model_validate({"data": {"path": "-"}, "model": {"name": "-"}}))
    return {key: value for key, value in flat_settings(config).items() if value != plain[key]}


# Translation


def test_complete_lenet_config_translates_every_setting(write: Write) -> None:
    assert changes(load_config(write(LENET, head=""))) == {
        "data.path": "data/cifar10",
        "data.batch_size": 256,
        "data.image_size": 32,
        "aug.crop": "squash",
        "aug.color_jitter.brightness": 0.3,
        "aug.color_jitter.contrast": 0.3,
        "aug.color_jitter.saturation": 0.3,
        "model.name": "lenet",
        "model.num_classes": 10,
        "model.drop_rate": 0.0,
        "train.epochs": 50,
        "train.warmup_epochs": 10,
        "train.lr": 3e-4,
        "train.min_lr": 3e-5,
        "train.warmup_lr": 2e-5,
        "train.schedule_options.per_epoch": True,
        "train.optimizer.weight_decay": 0.01,
        "train.optimizer.decay_biases": True,
        "train.optimizer.eps": 1e-7,
        "train.optimizer.betas": (0.9, 0.95),
        "train.optimizer.momentum": 0.8,
        "train.amp": "off",
        "train.save_every_epochs": 5,
        "eval.crop_mode": "squash",
        "log.every_steps": 500,
        "name": "lenet",
    }


def test_complete_resnet_config_translates_every_setting(write: Write) -> None:
    assert changes(load_config(write(RESNET, head=""))) == {
        "data.path": "/data/converted",
        "data.batch_size": 64,
        "data.image_size": 64,
        "aug.crop": "squash",
        "aug.auto.policy": "rand-m5-n1",
        "aug.erase.probability": 0.25,
        "aug.mix.mixup": 0.8,
        "aug.mix.cutmix": 1.0,
        "model.name": "timm/resnet26",
        "model.num_classes": 200,
        "model.drop_rate": 0.2,
        "train.epochs": 30,
        "train.first_epoch": 3,
        "train.lr": 0.1,
        "train.schedule": "step",
        "train.schedule_options.epochs": 10,
        "train.schedule_options.rate": 0.5,
        "train.optimizer.name": "sgd",
        "train.optimizer.weight_decay": 1e-4,
        "train.optimizer.decay_biases": True,
        "train.optimizer.momentum": 0.85,
        "train.amp": "off",
        "train.label_smoothing": 0.1,
        "train.accumulation_steps": 4,
        "train.clip_grad_norm": 5.0,
        "eval.only": True,
        "eval.crop_mode": "squash",
        "resume": "output/old/last.pt",
        "seed": 7,
        "name": "timm_resnet26",
    }


def test_missing_keys_have_homework_defaults(write: Write) -> None:
    assert changes(load_config(write())) == {
        "data.path": "data/cifar10",
        "data.image_size": 224,
        "aug.crop": "squash",
        "aug.color_jitter.brightness": 0.4,
        "aug.color_jitter.contrast": 0.4,
        "aug.color_jitter.saturation": 0.4,
        "model.name": "lenet",
        "train.epochs": 300,
        "train.lr": 5e-4,
        "train.schedule_options.per_epoch": True,
        "train.optimizer.weight_decay": 0.01,
        "train.optimizer.decay_biases": True,
        "train.amp": "off",
        "eval.crop_mode": "squash",
        "name": "lenet",
    }


def test_every_key_maps_to_a_setting_or_nothing() -> None:
    known = {key for key, _ in all_settings()}
    assert {key for key, rule in KEYS.items() if rule.target not in known} == {
        "DATA.PIN_MEMORY",
        "DATA.NUM_WORKERS",
        "TEST.SEQUENTIAL",
        "TEST.SHUFFLE",
    }


def test_empty_sections_and_nulls_count_as_missing(write: Write) -> None:
    empty = write("DATA:\nTRAIN: {LR: null, OPTIMIZER: }\nTEST: {}\nSEED:\nBASE:\n")
    assert load_config(empty) == load_config(write(name="minimal.yaml"))


@pytest.mark.parametrize("value", ["null", '""', "none", "None", "off"])
def test_word_or_null_disables_policy(write: Write, value: str) -> None:
    assert load_config(write(f"AUG: {{RAND_AUGMENT: {value}}}")).aug.auto.policy == "none"


def test_null_disables_color_jitter(write: Write) -> None:
    assert load_config(write("AUG: {COLOR_JITTER: null}")).aug.color_jitter.brightness == 0


@pytest.mark.parametrize(
    ("dataset", "size", "path"),
    [
        ("cifar10", 32, "data/cifar10"),
        ("CIFAR10", 224, "data/cifar10"),
        ("medium_imagenet", 64, "data/medium-imagenet-96"),
        ("medium_imagenet", 96, "data/medium-imagenet-96"),
        ("medium_imagenet", 97, "data/medium-imagenet-224"),
        ("medium_imagenet", 224, "data/medium-imagenet-224"),
    ],
)
def test_name_and_size_choose_data_set_without_path(write: Write, dataset: str, size: int, path: str) -> None:
    section = f"DATA: {{DATASET: {dataset}, IMG_SIZE: {size}, DATA_PATH: ''}}"
    assert load_config(write(section)).data.path == path


def test_path_overrides_data_set_name(write: Write) -> None:
    assert load_config(write("DATA: {DATASET: cifar100, DATA_PATH: data/cifar100}")).data.path == "data/cifar100"
    assert load_config(write("DATA: {DATASET: cifar100}"), **{"data.path": "x"}).data.path == "x"


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cosine", "cosine"),
        ("CosineAnnealingLR", "cosine"),
        ("Linear", "linear"),
        ("LinearLR", "linear"),
        ("StepLR", "step"),
        ("multistep", "multistep"),
        ("MultiStepLR", "multistep"),
        ("ConstantLR", "constant"),
        ("ExponentialLR", "exponential"),
        ("PolynomialLR", "polynomial"),
        ("ReduceLROnPlateau", "plateau"),
        ("reduce_lr_on_plateau", "plateau"),
        ("plateau", "plateau"),
        ("OneCycleLR", "one-cycle"),
        ("one_cycle", "one-cycle"),
        ("one-cycle", "one-cycle"),
    ],
)
def test_schedules_accept_torch_names(write: Write, name: str, schedule: str) -> None:
    section = f"{{NAME: {name}{', MULTISTEPS: [30]' * (schedule == 'multistep')}}}"
    assert load_config(write(f"TRAIN: {{LR_SCHEDULER: {section}}}")).train.schedule == schedule


def test_one_cycle_rejects_second_warm_up(write: Write) -> None:
    one_cycle = "TRAIN: {LR_SCHEDULER: {NAME: OneCycleLR}"
    assert load_config(write(one_cycle + "}")).train.warmup_epochs == 0
    with pytest.raises(UserError, match=r"includes its own warm-up; set train\.warmup_epochs to 0"):
        load_config(write(one_cycle + ", WARMUP_EPOCHS: 2}"))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adam", "RMSprop"])
def test_optimizers_have_torch_weight_decay_in_any_case(write: Write, name: str) -> None:
    torchs = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(1))]).defaults["weight_decay"]
    optimizer = load_config(write(f"TRAIN: {{OPTIMIZER: {{NAME: {name}}}}}")).train.optimizer
    assert (optimizer.name, optimizer.weight_decay, optimizer.decay_biases) == (name.lower(), torchs, True)


def test_sgd_uses_nesterov_momentum(write: Write) -> None:
    optimizer = load_config(write("TRAIN: {OPTIMIZER: {NAME: SGD}}")).train.optimizer
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)


def test_timm_optimizer_keeps_defaults_of_missing_keys(write: Write) -> None:
    def settings(text: str) -> tuple[Any, Any, Any]:
        optimizer = load_config(write(f"TRAIN: {{OPTIMIZER: {{{text}}}}}")).train.optimizer
        return optimizer.betas, optimizer.eps, optimizer.nesterov

    assert settings("NAME: lamb") == (None, None, None)
    assert settings("NAME: lamb, EPS: 1e-8, BETAS: [0.9, 0.999]") == ((0.9, 0.999), 1e-8, None)
    assert settings("NAME: adamw")[:2] == ((0.9, 0.999), 1e-8)


def test_sgd_accepts_zero_momentum(write: Write) -> None:
    optimizer = load_config(write("TRAIN: {OPTIMIZER: {NAME: sgd, MOMENTUM: 0}}")).train.optimizer
    assert (optimizer.momentum, optimizer.nesterov) == (0, False)


def test_zero_drop_rate_disables_alexnet_dropout_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(write("MODEL: {NAME: alexnet}", head="")).model.drop_rate is None
    assert "dropout of" not in capsys.readouterr().err
    assert load_config(write("MODEL: {NAME: alexnet, DROP_RATE: 0.0}", head="")).model.drop_rate == 0
    assert "MODEL.DROP_RATE=0" in (note := capsys.readouterr().err)
    assert "switches off the dropout of 0.5 in alexnet; leave out the key to keep it" in note


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("", "output/lenet"),
        ("output", "output/lenet"),
        ("output/lenet", "output/lenet"),
        ("output/lenet/", "output/lenet"),
        ("output/first", "output/first/lenet"),
        ("lenet", "lenet"),
    ],
)
def test_run_folder_is_output_and_model_name(write: Write, output: str, folder: str) -> None:
    config = load_config(write(f"OUTPUT: '{output}'"))
    assert Path(config.output) / str(config.name) == Path(folder)
    named = load_config(write(f"OUTPUT: '{output}'"), ["name=other"])
    assert Path(named.output) / str(named.name) == Path(output or "output") / "other"


def test_test_crop_sets_evaluation_crop_mode(write: Write) -> None:
    for crop, mode in (("true", "center"), ("false", "squash")):
        evaluation = load_config(write(f"TEST: {{CROP: {crop}}}")).eval
        assert (evaluation.crop_mode, evaluation.crop_fraction) == (mode, 1.0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_survives_to_yaml(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(path)
    assert notes_besides_the_list(capsys) == []
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_two_configs_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == ["lenet_cifar10", "resnet18_medium_imagenet"]


# Inheritance and overrides


def test_bases_are_merged_and_later_ones_win(write: Write) -> None:
    write("TRAIN: {LR: 0.1, EPOCHS: 7, OPTIMIZER: {EPS: 1e-6}}\nMODEL: {DROP_RATE: 0.1}", "one.yaml", head="")
    write("TRAIN: {LR: 0.2, OPTIMIZER: {MOMENTUM: 0.5}}", "two.yaml", head="")
    config = load_config(write("BASE: ['', one.yaml, 'two.yaml']\nTRAIN: {EPOCHS: 30}"))
    assert (config.train.lr, config.train.epochs, config.model.drop_rate) == (0.2, 30, 0.1)
    assert (config.train.optimizer.eps, config.train.optimizer.momentum) == (1e-6, 0.5)


def test_last_layer_wins_in_either_spelling(write: Write) -> None:
    write("data: {path: x}\ntrain: {lr: 0.3, epochs: 40}\naug: {color_jitter: 0.2, flip: 0}", "ours.yaml", head="")
    write("BASE: ours.yaml\nTRAIN: {LR: 0.2}\nAUG: {COLOR_JITTER: 0.1}\nOUTPUT: theirs", "theirs.yaml")
    config = load_config(write("base: theirs.yaml\noutput: ours\naug: {color_jitter: {hue: 0.1}}", head=""))
    assert (config.data.path, config.train.epochs, config.aug.flip) == ("x", 40, 0)  # from the first file, not defaults
    assert (config.train.lr, config.output) == (0.2, "ours")
    assert (config.aug.color_jitter.contrast, config.aug.color_jitter.hue) == (0.1, 0.1)
    overrides = ["train.lr=0.5", "TRAIN.LR=0.6", "OUTPUT=a", "output=b"]
    overridden = load_config(write(LENET, head=""), overrides)
    assert (overridden.train.lr, overridden.output) == (0.6, "b")


def test_overrides_accept_both_spellings_for_both_file_kinds(write: Write) -> None:
    overrides = ["TRAIN.LR", "1e-3", "DATA.BATCH_SIZE=64", "train.epochs", "30", "TRAIN.OPTIMIZER.BETAS", "(0.8, 0.9)"]
    ours = write("data: {path: x}\nmodel: {name: lenet}\ntrain: {lr: 0.5, epochs: 2}", "ours.yaml", head="")
    for path in (write(), ours):
        config = load_config(path, overrides)
        assert (config.train.lr, config.data.batch_size, config.train.epochs) == (1e-3, 64, 30)
        assert config.train.optimizer.betas == (0.8, 0.9)


def test_uppercase_override_adds_no_homework_defaults(write: Write) -> None:
    ours = write("data: {path: x}\nmodel: {name: lenet}", "ours.yaml", head="")
    overridden = load_config(ours, ["TRAIN.LR=0.1", "DATA.DATASET=cifar10", "MODEL.NAME=resnet18"])
    wanted = {"train.lr": 0.1, "data.path": "data/cifar10", "model.name": "resnet18"}
    assert overridden == load_config(ours, **wanted)
    assert overridden.name == "ours"


def test_command_line_flags_win(write: Write) -> None:
    config = load_config(write(LENET, head=""), **{"data.batch_size": 8, "data.path": "x", "output": "y"})
    assert (config.data.batch_size, config.data.path, config.output, config.name) == (8, "x", "y", "lenet")


# Warnings


def test_last_of_repeated_keys_counts_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("PRINT_FREQ: 1\nTRAIN: {LR: 1, LR: 2}\nPRINT_FREQ: 5\nSEED: 3")
    config = load_config(path)
    assert (config.log.every_steps, config.train.lr, config.seed) == (5, 2, 3)
    assert notes_besides_the_list(capsys) == [
        f"warning: {path}:3: TRAIN.LR is given twice (first in line 3); the last one counts",
        f"warning: {path}:4: PRINT_FREQ is given twice (first in line 2); the last one counts",
    ]


def test_last_of_repeated_sections_counts_as_whole(write: Write) -> None:
    config = load_config(write("TRAIN: {LR: 1, EPOCHS: 77}\nTRAIN: {LR: 2}"))
    assert (config.train.lr, config.train.epochs) == (2, 300)


def test_one_warning_names_all_unused_keys_and_alternatives(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("DATA: {PIN_MEMORY: true}\nTEST: {SHUFFLE: true, SEQUENTIAL: false}")
    load_config(path, ["DATA.NUM_WORKERS=8"])
    (line,) = notes_besides_the_list(capsys)
    for place in (f"DATA.PIN_MEMORY ({path}:2)", f"TEST.SHUFFLE ({path}:3)", "DATA.NUM_WORKERS (--opts)"):
        assert place in line
    assert "data.threads and data.prefetch" in line


def test_warning_is_printed_once_by_first_rank(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("SEED: 1\nSEED: 2")
    monkeypatch.setenv("RANK", "1")
    load_config(path)
    assert capsys.readouterr().err == ""
    warnings.warn.cache_clear()
    monkeypatch.setenv("RANK", "0")
    load_config(path)
    load_config(path)
    assert len(notes_besides_the_list(capsys)) == 1


def test_warm_up_longer_than_run_is_cut_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(LENET, head="")
    assert load_config(path, ["TRAIN.EPOCHS", "1"]).train.warmup_epochs == 1
    assert (
        f"warning: {path}:14: TRAIN.WARMUP_EPOCHS=10 is longer than the run and is cut to 1"
        in (notes_besides_the_list(capsys)[1])
    )
    assert load_config(write("TRAIN: {EPOCHS: 5, WARMUP_EPOCHS: 9}")).train.warmup_epochs == 5
    assert load_config(write(), ["train.epochs=3"]).train.warmup_epochs == 0


def test_learning_rates_above_lr_are_cut_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(LENET, head="")
    train = load_config(path, ["TRAIN.LR=1e-5"]).train
    assert (train.lr, train.min_lr, train.warmup_lr) == (1e-5, 1e-5, 1e-5)
    (line,) = notes_besides_the_list(capsys)
    assert f"TRAIN.MIN_LR=3e-05 ({path}:16) is cut to TRAIN.LR=1e-05" in line
    assert f"TRAIN.WARMUP_LR=2e-05 ({path}:17) is cut to TRAIN.LR=1e-05" in line
    assert load_config(path, ["train.lr=2.5e-5"]).train.min_lr == 2.5e-5
    assert "train.min_lr=0.1 must not exceed train.lr=1e-05" in load_error(path, "train.lr=1e-5", "train.min_lr=0.1")


def test_wrong_number_of_classes_is_dropped_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(LENET.replace("NUM_CLASSES: 10", "NUM_CLASSES: 200"), head="")
    assert load_config(path).model.num_classes is None
    assert f"MODEL.NUM_CLASSES=200 ({path}:10) does not fit cifar10" in capsys.readouterr().err
    unnamed = write(LENET.replace("NUM_CLASSES: 10", "NUM_CLASSES: 200").replace('DATASET: "cifar10"', ""), head="")
    assert load_config(unnamed, **{"data.path": "elsewhere"}).model.num_classes is None
    assert "does not fit cifar10, the default of DATA.DATASET" in capsys.readouterr().err
    of_its_own = "DATA: {DATA_PATH: x}\nMODEL: {NAME: lenet, NUM_CLASSES: 37}"
    assert load_config(write(of_its_own, head="")).model.num_classes == 37


# Errors


def test_unknown_key_error_names_line_and_allowed_keys(write: Write) -> None:
    message = load_error(write("TRAIN:\n  LR: 0.1\n  EPOCH: 5"))
    assert re.search(
        r"run\.yaml:4: TRAIN\.EPOCH=5 is unknown; did you mean TRAIN\.EPOCHS or .*\? allowed in TRAIN: ", message
    )
    assert all(key in message for key in ("WARMUP_LR", "ACCUMULATION_STEPS", "OPTIMIZER"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('TRAIN.LR="abc"', 'TRAIN.LR="abc" (train.lr) must be a valid number'),
        ("TRAIN.EPOCHS=5.5", "TRAIN.EPOCHS=5.5 (train.epochs) must be a valid integer"),
        ("TRAIN=5", "TRAIN=5 must be a section; allowed in TRAIN: LR_SCHEDULER"),
        ("TRAIN.BATCH_SIZE=5", "TRAIN.BATCH_SIZE=5 is unknown; did you mean DATA.BATCH_SIZE?"),
        ("TRAIN.lr=5", "TRAIN.lr=5 is unknown; did you mean TRAIN.LR"),
        ("SEEDS=5", "SEEDS=5 is unknown; did you mean SEED? allowed in the config: DATA, MODEL"),
        ("BASE=x.yaml", 'BASE="x.yaml" is unknown'),
        ("DATA.DATASET=imagenet", 'DATA.DATASET="imagenet" is unknown; use cifar10 or medium_imagenet, or give'),
        ("DATA.DATASET=[a]", 'DATA.DATASET=["a"] is unknown; use cifar10'),
        ("DATA.DATA_PATH=5", "DATA.DATA_PATH=5 (data.path) must be a valid string"),
        ("DATA.INTERPOLATION=area", "(data.interpolation) must be 'bilinear' or 'bicubic'"),
        ("DATA.IMG_SIZE=0", "DATA.IMG_SIZE=0 (data.image_size) must be greater than or equal to 1"),
        ("MODEL.NAME=5", 'MODEL.NAME=5 (model.name) must be a valid string; quote it: "5"'),
        ("MODEL.DROP_RATE=1.5", "MODEL.DROP_RATE=1.5 (model.drop_rate) must be less than 1"),
        ("TRAIN.LR_SCHEDULER.NAME=Foo", "TRAIN.LR_SCHEDULER.NAME=\"Foo\" (train.schedule) must be 'cosine', "),
        (
            "TRAIN.OPTIMIZER.BETAS=(0.9, 1)",
            "TRAIN.OPTIMIZER.BETAS=[0.9, 1] (train.optimizer.betas) must be two numbers",
        ),
        ("TRAIN.OPTIMIZER.NAME=[a]", 'TRAIN.OPTIMIZER.NAME=["a"] (train.optimizer.name) must be a valid string'),
        ("AUG.COLOR_JITTER=much", 'AUG.COLOR_JITTER="much" (aug.color_jitter) must be one number'),
        ("AUG.COLOR_JITTER=-1", "AUG.COLOR_JITTER=-1 (aug.color_jitter.brightness) must be greater than or equal to 0"),
        ("AUG.RAND_AUGMENT=rand-q9", "AUG.RAND_AUGMENT=\"rand-q9\" (aug.auto.policy) has a part 'q9' that is unknown"),
        ("TEST.CROP=maybe", 'TEST.CROP="maybe" must be true (the central square) or false'),
        ("EVAL_MODE=yes", 'EVAL_MODE="yes" (eval.only) must be a valid boolean'),
    ],
)
def test_wrong_value_error_quotes_users_spelling(write: Write, override: str, expected: str) -> None:
    message = load_error(write(), override)
    assert message.startswith("--opts: ")
    assert expected in message


def test_wrong_value_error_names_file_and_line(write: Write) -> None:
    write("TRAIN:\n  LR: fast\n", "base.yaml", head="")
    child = write("BASE: [base.yaml]\nSEED: 1")
    assert re.search(r'base\.yaml:2: TRAIN\.LR="fast" \(train\.lr\)', load_error(child))
    assert load_error(child, "train.lr=slow").startswith('--opts: train.lr="slow" must')
    assert load_error(child, "TRAIN.LR=slow").startswith('--opts: TRAIN.LR="slow" (train.lr) must')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SEED: 1", "run.yaml: MODEL.NAME (model.name) is missing; give the name"),
        ("BASE: 5\nMODEL: {NAME: lenet}", "run.yaml:1: BASE=5 must be a file name or a list of file names"),
        ("BASE: none.yaml", "none.yaml cannot be read"),
        ("BASE: run.yaml", "is a cycle"),
        ("MODEL: {NAME: lenet}\nTRAIN.LR: 5", "run.yaml:2: TRAIN.LR=5 is unknown; in a file, nest sections"),
        ("MODEL: {NAME: lenet}\nseed: 1\nseed: 2", "run.yaml:3: key seed is given twice (first in line 2); keep one"),
    ],
)
def test_malformed_file_error_names_file(write: Write, text: str, expected: str) -> None:
    assert expected in load_error(write(text, head=""))


@hypothesis_settings(max_examples=200)
@given(
    key=st.sampled_from([*KEYS, *SECTIONS]),
    text=st.one_of(
        st.text(), st.sampled_from(["", "-1", "0", "1", "1e9", "true", "[]", "[1, 2]", "{}", "{A: 1}", "x"])
    ),
)
def test_random_values_raise_only_user_errors(key: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any_key.yaml"
    path.write_text(MINIMAL)
    try:
        load_config(path, [f"{key}={text}"])
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (one line is the claim)


# Whole runs


def lrs_of(log: str) -> list[float]:
    return [float(found) for found in re.findall(r"step \d+: loss .*?, lr ([\d.e-]+),", log)]


def test_run_uses_batch_size_warm_up_and_jitter(
    write: Write, call: Callable[..., tuple[int, str, str]], npy_data: Path, tmp_path: Path
) -> None:
    text = LENET.replace("EPOCHS: 50", "EPOCHS: 1")
    text = text.replace("PRINT_FREQ: 500", "PRINT_FREQ: 1").replace("BATCH_SIZE: 256", "BATCH_SIZE: 64")
    text = text.replace("IMG_SIZE: 32", "IMG_SIZE: 34").replace("NUM_CLASSES: 10", "NUM_CLASSES: 200")
    path = write(text, head="")
    code, _, err = call("--cfg", path, "--data-path", npy_data, "--output", tmp_path / "out")
    assert code == 0, err
    assert [line.split(":")[0] for line in err.splitlines()] == ["warning"] * 3
    folder = tmp_path / "out" / "lenet"
    log = (folder / "log.txt").read_text()
    assert "lenet (83,296 parameters) on tiny (700 train samples), 1 epoch of 10 steps at global batch 64" in log
    assert lrs_of(log) == pytest.approx([2e-5 + (3e-4 - 2e-5) * step / 10 for step in range(1, 11)], rel=1e-3)
    (metrics,) = strict_lines(folder / "metrics.jsonl")
    assert (metrics["step"], metrics["lr"]) == (10, pytest.approx(3e-4))
    resolved = load_config(folder / "config.yaml")
    assert "DATA" not in (folder / "config.yaml").read_text()
    assert (resolved.data.image_size, resolved.aug.color_jitter.saturation, resolved.aug.flip) == (34, 0.3, 0.5)
    assert '"image_size": 34' in (folder / "facts.json").read_text()


def test_sgd_run_trains_resumes_and_evaluates(
    write: Write, call: Callable[..., tuple[int, str, str]], npy_data: Path, tmp_path: Path
) -> None:
    path = write(
        f"""\
DATA: {{DATA_PATH: {npy_data}, BATCH_SIZE: 50, IMG_SIZE: 32}}
MODEL: {{NAME: lenet, NUM_CLASSES: 12}}
TRAIN: {{EPOCHS: 1, WARMUP_EPOCHS: 0, LR: 0.1, MIN_LR: 0.02, ACCUMULATION_STEPS: 2, LR_SCHEDULER: {{NAME: linear}},
        OPTIMIZER: {{NAME: SGD}}}}
OUTPUT: {tmp_path}/out
PRINT_FREQ: 1
""",
        head="",
    )
    code, _, err = call("--cfg", path)
    assert code == 0, err
    folder = tmp_path / "out" / "lenet"
    log = (folder / "log.txt").read_text()
    assert "1 epoch of 7 steps at global batch 100" in log
    assert lrs_of(log) == pytest.approx([0.1 - 0.08 * step / 7 for step in range(7)], rel=1e-3)
    resolved = load_config(folder / "config.yaml")
    assert (resolved.aug.auto.policy, resolved.aug.color_jitter.brightness) == ("none", 0.4)
    assert (resolved.train.optimizer.name, resolved.train.optimizer.weight_decay) == ("sgd", 0.0)
    assert resolved.train.optimizer.nesterov

    (metrics,) = strict_lines(folder / "metrics.jsonl")
    code, out, err = call("--cfg", path, "--opts", f"MODEL.RESUME={folder}", "EVAL_MODE=true")
    assert code == 0, err
    assert out.startswith(f"{folder / 'last.pt'}: val")
    assert f"{metrics['val_loss']:.4f}" in out
    code, _, err = call("--cfg", path, "--opts", f"MODEL.RESUME={folder}", "PRINT_FREQ", "7")
    assert code == 0, err
    assert f"resumed from {folder / 'last.pt'}" in (folder / "log.txt").read_text()
    assert load_config(folder / "config.yaml").log.every_steps == 7


def test_evaluation_needs_checkpoint_and_flag_overrides_config(
    write: Write, call: Callable[..., tuple[int, str, str]], npy_data: Path
) -> None:
    path = write(f"DATA: {{DATA_PATH: {npy_data}, IMG_SIZE: 32}}\nEVAL_MODE: true")
    code, _, err = call("--cfg", path)
    assert code == 2
    assert err.splitlines()[-1] == "error: eval.only needs a checkpoint; give --resume PATH or --resume auto"
    resume = ["--opts", "MODEL.RESUME=/nowhere/a.pt"]
    assert "/nowhere/a.pt does not exist" in call("--cfg", path, *resume)[2]
    assert "/nowhere/b.pt does not exist" in call("--cfg", path, *resume, "--resume", "/nowhere/b.pt")[2]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("DATASET: cifar10", "zhu convert cifar10 --download --out data/cifar10"),
        ("DATASET: medium_imagenet", "zhu convert hdf5 --source FILE.hdf5 --out data/medium-imagenet-224"),
        ("DATA_PATH: raw", "zhu convert hdf5 --source raw/pixels.hdf5 --out data/pixels, and give data/pixels"),
        ("DATA_PATH: raw/pixels.hdf5", "cannot read raw/pixels.hdf5 as HDF5"),
    ],
)
def test_unconverted_data_set_error_names_convert_command(
    write: Write,
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "pixels.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    code, _, err = call("--cfg", write(f"DATA: {{{section}}}"))
    assert code == 2
    assert expected in err
    assert [line.split(":")[0] for line in err.splitlines()] == ["warning", "error"]
