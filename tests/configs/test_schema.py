"""Every setting is documented and read, and settings that depend on each other are checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config, all_settings, is_section
from configs.schema.documentation import markdown_table
from configs.utils.errors import UserError
from helpers.config_files import Write, load_error, writer

ROOT = Path(__file__).parents[2]
MINIMAL = "data: {path: data/x}\nmodel: {name: lenet}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config file of the required settings and more text."""
    return writer(tmp_path, MINIMAL)


def test_every_setting_is_documented() -> None:
    assert [key for key, field in all_settings() if not field.description] == []
    table = markdown_table(Config)
    assert all(f"| `{key}` |" in table for key, _ in all_settings())


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("train.ema", ["train.ema", "train.ema.decay", "train.ema.warmup", "train.ema.every_steps"]),
        ("data.stages", ["data.stages", "data.stages[].epoch", "data.stages[].image_size", "data.stages[].batch_size"]),
        ("seed", ["seed"]),
        ("*.epochs", ["train.epochs", "train.schedule_options.epochs"]),
        ("EMA.D", ["train.ema.decay"]),
    ],
)
def test_settings_table_is_filtered(pattern: str, keys: list[str]) -> None:
    _, _, *rows = markdown_table(Config, [pattern]).splitlines()
    assert [row.split("|")[1].strip(" `") for row in rows] == keys


def test_filter_without_match_suggests_settings() -> None:
    with pytest.raises(UserError, match=r"no setting matches 'epohcs'; did you mean epochs.* the sections are data, "):
        markdown_table(Config, ["lr", "epohcs"])


def test_settings_table_has_one_row_per_setting() -> None:
    head, _, *rows = markdown_table(Config).splitlines()
    assert {row.count("|") for row in (head, *rows)} == {6}
    cells = {row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[2:5]] for row in rows}
    expected = {
        "data.path": ["str, not empty", "required", "may change"],
        "data.image_size": ["int or null, >= 1", "null", ""],
        "data.antialias": ["bool", "true", ""],
        "data.stages": ["list of section", "[]", ""],
        "data.stages[].epoch": ["int, >= 0", "required", ""],
        "aug": ["section", "", ""],
        "aug.crop": ["none, squash, pad, random-resized", "none", ""],
        "aug.auto.fill": ["black, mean or null", "null", ""],
        "aug.blur.sigma": ["[float, float]", "[0.1, 2.0]", ""],
        "model.options": ["mapping", "{}", ""],
        "model.pretrained": ["bool or str", "false", ""],
        "train.optimizer.lr_scales": ["mapping to float", "{}", ""],
        "log.wandb.tags": ["list of str", "[]", "may change"],
    }
    assert {key: cells[key] for key in expected} == expected


def test_every_setting_is_read_somewhere() -> None:
    folders = ("pipelines", "models", "train", "tools")
    sources = "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    fields = {key: key.rsplit(".", 1)[-1] for key, field in all_settings() if not is_section(field)}
    assert [key for key, name in fields.items() if not re.search(rf"\.{name}\b", sources)] == []


def test_multistep_without_milestones_is_an_error(write: Write) -> None:
    message = load_error(write("train: {schedule: multistep}"))
    assert "train.schedule_options" in message
    assert "needs milestones for schedule multistep, such as {milestones: [30, 60]}" in message
    options = load_config(write("train: {schedule: multistep, schedule_options: {milestones: [3]}}")).train
    assert options.schedule_options.milestones == (3,)


def test_bce_threshold_needs_bce_loss(write: Write) -> None:
    assert "train.bce_threshold=0.2 applies to loss bce only" in load_error(write("train: {bce_threshold: 0.2}"))
    assert load_config(write("train: {loss: bce, bce_threshold: 0.2}")).train.bce_threshold == 0.2
