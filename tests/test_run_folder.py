"""Which folder a run goes on in, and which checkpoints it may start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_fixtures import DIGITS

from configs.load import load_config, to_yaml
from configs.schema import Config
from train.run_folder import find_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(DIGITS, ["name=net"], output=str(tmp_path))


def make(folder: Path, *names: str, config: Config | None = None) -> Path:
    """A folder with these files; of a run of this config, where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "log.txt").write_text("")
    return folder


def test_auto_means_the_last_run_of_the_name_and_its_checkpoints_the_newest_first(
    config: Config, tmp_path: Path
) -> None:
    assert find_run(config, None) == (None, ())
    assert find_run(config, "auto") == (None, ())
    first = make(tmp_path / "net", "last.pt", "best.pt")
    assert find_run(config, "auto") == (first, (first / "last.pt",))
    second = make(tmp_path / "net-2", "last.pt", "previous.pt", "best.pt", "last.pt.tmp")
    assert find_run(config, "auto") == (second, (second / "last.pt", second / "previous.pt"))
    third = make(tmp_path / "net-3", "best.pt")  # killed before its first last.pt: it begins anew
    assert find_run(config, "auto") == (third, ())


def test_auto_finds_the_checkpoint_before_where_the_last_one_is_missing(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "previous.pt")
    assert find_run(config, "auto") == (folder, (folder / "last.pt", folder / "previous.pt"))


@pytest.mark.parametrize("what", ["", "last.pt"])
def test_a_run_and_its_last_checkpoint_stand_for_the_one_before_as_well(
    what: str, config: Config, tmp_path: Path
) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", config=config)
    assert find_run(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))
    (folder / "last.pt").unlink()
    assert find_run(config, str(folder / what)) == (folder, (folder / "last.pt", folder / "previous.pt"))


def test_any_other_file_stands_for_itself(config: Config, tmp_path: Path) -> None:
    folder = make(tmp_path / "net", "last.pt", "previous.pt", "best.pt", config=config)
    assert find_run(config, str(folder / "best.pt")) == (folder, (folder / "best.pt",))
    copies = make(tmp_path / "copies", "last.pt", "previous.pt")
    assert find_run(config, str(copies / "last.pt")) == (None, (copies / "last.pt",))
