"""Which run folder a run resumes in, and its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from helpers.run_dirs import make
from helpers.training import DIGITS, alone
from train.checkpoint.resume import is_explicit_checkpoint, resolve_resume
from train.checkpoint.run_dir import create_run_dir, lock_run_dir


def test_auto_resolves_to_latest_run_and_newest_checkpoint(config: Config, tmp_path: Path) -> None:
    assert resolve_resume(config, None) == (None, ())
    assert resolve_resume(config, "auto") == (None, ())
    first = make(tmp_path / "net", "last.pt", "best.pt")
    assert resolve_resume(config, "auto") == (first, (first / "last.pt",))
    second = make(tmp_path / "net-2", "last.pt", "previous.pt", "best.pt", "last.pt.tmp")
    assert resolve_resume(config, "auto") == (second, (second / "last.pt", second / "previous.pt"))
    third = make(tmp_path / "net-3", "last.pt.tmp")  # killed before its first checkpoint
    assert resolve_resume(config, "auto") == (third, ())


def test_latest_run_is_the_one_with_highest_number(config: Config, tmp_path: Path) -> None:
    """An old run was removed."""
    third = make(tmp_path / "net-3", "last.pt", config=config)
    assert resolve_resume(config, "auto") == (third, (third / "last.pt",))
    assert create_run_dir(config) == tmp_path / "net-4"


def test_run_named_like_a_number_is_not_confused(config: Config, tmp_path: Path) -> None:
    def named(name: str) -> Config:
        return load_config(DIGITS, [f"name={name}"], output=str(tmp_path))

    for name in ("net-2", "net-64", "net-64-2", "net-1", "nets", "net-2-3"):
        make(tmp_path / name, "last.pt", config=named(name))
    make(tmp_path / "net-99")  # not a run
    (tmp_path / "net").touch()  # not a folder
    assert resolve_resume(config, "auto") == (None, ())
    (tmp_path / "net").unlink()
    assert create_run_dir(config) == tmp_path / "net"
    first = make(tmp_path / "net", "last.pt", config=config)
    assert resolve_resume(config, "auto") == (first, (first / "last.pt",))
    assert create_run_dir(config) == tmp_path / "net-3"
    assert resolve_resume(named("net-64"), "auto")[0] == tmp_path / "net-64"


def test_renamed_run_folder_is_found_by_its_new_name(config: Config, tmp_path: Path) -> None:
    copied = make(tmp_path / "net-tuned", "last.pt", config=config)
    renamed = load_config(DIGITS, ["name=net-tuned"], output=str(tmp_path))
    assert resolve_resume(renamed, "auto") == (copied, (copied / "last.pt",))


@pytest.mark.parametrize(
    "text", ["name: net\nremoved_setting: 3\n", "name: [", "name: 3", "- 3", "\xff", "link", "pipe"]
)
def test_only_the_name_of_a_config_is_read(text: str, config: Config, tmp_path: Path) -> None:
    """The config may be from an older version with other settings, or from someone else."""
    make(tmp_path / "net", "last.pt", config=config)
    folder = make(tmp_path / "net-3", "last.pt")
    if text == "link":
        (folder / "config.yaml").symlink_to(folder / "config.yaml")
    elif text == "pipe":
        os.mkfifo(folder / "config.yaml")
    else:
        (folder / "config.yaml").write_bytes(text.encode("latin1"))
    is_ours = text.startswith("name: net\n")
    assert resolve_resume(config, "auto")[0] == (folder if is_ours else tmp_path / "net")
    (folder / "lock").touch()  # like that of `lock_run_dir`
    assert resolve_resume(config, "auto")[0] == folder


def test_run_with_only_best_checkpoint_resumes_from_it(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "best.pt", config=config)
    for resume in ("auto", str(folder), str(folder / "best.pt")):
        assert resolve_resume(config, resume) == (folder, (folder / "best.pt",))
    assert resolve_resume(config, str(folder / "last.pt")) == (folder, (folder / "last.pt",))  # explicit, but missing


def test_kept_epochs_are_used_only_without_other_checkpoints(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "best.pt", "epoch-2.pt", "epoch-10.pt", "epoch-x.pt", "epoch-12.pt.tmp")
    expected = (folder / "epoch-10.pt", folder / "epoch-2.pt", folder / "best.pt")
    assert resolve_resume(config, "auto") == (folder, expected)
    make(folder, "last.pt")
    assert resolve_resume(config, "auto") == (folder, (folder / "last.pt",))
    with alone(), lock_run_dir(folder):
        assert not (folder / "epoch-12.pt.tmp").exists()  # of an interrupted save
        assert (folder / "epoch-10.pt").exists()


def test_auto_uses_previous_checkpoint_if_last_is_missing(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "previous.pt")
    assert resolve_resume(config, "auto") == (folder, (folder / "last.pt", folder / "previous.pt"))


@pytest.mark.parametrize("what", ["", "last.pt"])
def test_run_and_last_checkpoint_fall_back_to_previous(what: str, config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", config=config)
    assert resolve_resume(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))
    (folder / "last.pt").unlink()
    assert resolve_resume(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))


def test_other_checkpoint_files_have_no_fallback(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", "best.pt", config=config)
    assert resolve_resume(config, str(folder / "best.pt")) == (folder, (folder / "best.pt",))
    copies = make(tmp_path / "copies", "last.pt", "previous.pt")
    assert resolve_resume(config, str(copies / "last.pt")) == (None, (copies / "last.pt",))


@pytest.mark.parametrize(
    ("resume", "is_one"), [(None, False), ("auto", False), ("best.pt", True), ("last.pt", False), (".", False)]
)
def test_explicit_checkpoint_is_distinguished_from_a_run(resume: str | None, is_one: bool, tmp_path: Path) -> None:
    assert is_explicit_checkpoint(resume if resume in (None, "auto") else str(tmp_path / resume)) == is_one
