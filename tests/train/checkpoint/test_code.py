"""Checkpoints record the user's own code, which is found again from another working directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from configs.schema import Config, all_settings
from configs.schema.section import IsCode
from helpers.own_code import OWN_CODE, write_own_code
from train.checkpoint.code import code_entries, find_code

KEYS = ("aug.custom", "model.name", "train.proxy.model", "train.loss")


def own_config(file: str) -> Config:
    return Config.model_validate(
        {
            "data": {"path": "data/x"},
            "model": {"name": f"{file}:Net"},
            "train": {"loss": f"{file}:smooth", "proxy": {"model": f"{file}:Net"}},
            "aug": {"custom": f"{file}:noise"},
        }
    )


def test_settings_that_name_code_are_marked() -> None:
    assert {key for key, field in all_settings() if IsCode in field.metadata} == set(KEYS)


def test_files_are_recorded_with_path_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_own_code(tmp_path)
    monkeypatch.chdir(tmp_path)
    entry = {"file": str(file), "sha256": hashlib.sha256(OWN_CODE.encode()).hexdigest()}
    assert code_entries(own_config("own.py")) == dict.fromkeys(KEYS, entry)
    builtin = Config.model_validate({"data": {"path": "data/x"}, "model": {"name": "timm/hf-hub:a/b"}})
    assert code_entries(builtin) == {}


def test_recorded_path_is_used_where_the_relative_one_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_own_code(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = own_config("own.py")
    code = code_entries(config)
    assert find_code(config, {"code": code}, Path("last.pt")) == config
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_code(config, {"code": code}, Path("last.pt")) == own_config(str(file))
    assert find_code(config, {}, Path("last.pt")) == config
    assert capsys.readouterr().err == ""
    write_own_code(tmp_path / "elsewhere", "changed = True\n")
    assert find_code(config, {"code": code}, Path("last.pt")) == config
    changed = f"warning: {tmp_path / 'elsewhere' / 'own.py'} (model.name=own.py:Net) has changed since last.pt was"
    assert changed in capsys.readouterr().err
