"""Errors about sources and missing data sets suggest a conversion command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from configs.load import load_config
from helpers.training import ROOT
from pipelines.storage.dataset import convert_hint, known_conversion
from tools import convert


@pytest.mark.parametrize(
    ("files", "folder", "options"),
    [
        (["a b/large.h5"], "a b", {"command": "hdf5", "source": Path("a b/large.h5"), "out": Path("data/large")}),
        (["x.HDF5"], "x.HDF5", {"command": "hdf5", "source": Path("x.HDF5"), "out": Path("data/x")}),
        (["raw/cifar-10-batches-py/test_batch"], "raw", {"command": "cifar10", "source": Path("raw")}),
        (["cifar-100-python/train"], "cifar-100-python", {"command": "cifar100", "out": Path("data/cifar100")}),
        (["raw/cifar-10-python.tar.gz"], "raw", {"command": "cifar10", "out": Path("data/cifar10")}),
        (["photos/train/cat/1.jpg"], "photos", {"command": "imagefolder", "source": Path("photos")}),
        (["photos/Training/cat/1.jpg"], "photos", {"command": "imagefolder", "source": Path("photos")}),
        (["flowers/rose/1.JPG"], "flowers", {"command": "imagefolder", "val_fraction": 0.1}),
        ([], "some/cifar10", {"command": "cifar10", "download": True, "out": Path("some/cifar10")}),
        ([], "cifar100", {"command": "cifar100", "download": True, "out": Path("cifar100")}),
        ([], "data/digits", {"command": "digits", "out": Path("data/digits")}),
        ([], "data/medium-imagenet-96", {"command": "hdf5", "out": Path("data/medium-imagenet-96")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_suggested_command_is_accepted_by_convert(
    files: list[str], folder: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    in_place, colon, sentence = convert_hint(folder).partition("convert it first: ")
    file = options.get("source", "FILE.hdf5")
    is_hdf5 = options["command"] == "hdf5"
    assert in_place == (f"name the HDF5 file itself as the data set (data.path={file}), or " if is_hdf5 else "")
    sentence = colon + sentence
    sentence, _, prepare = sentence.partition(", or start training with --prepare, which does this first")
    command, _, use = sentence.removeprefix("convert it first: zhu convert ").partition(", and give ")
    assert prepare == ""
    parsed = vars(convert.build_parser().parse_args(shlex.split(command)))
    assert {key: parsed[key] for key in options} == options
    assert use == ("" if str(parsed["out"]) == folder else f"{parsed['out']} as the data set")


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "medium-imagenet-96", "mine"])
def test_hint_names_prepare_if_no_file_is_needed(name: str, tmp_path: Path) -> None:
    words = known_conversion(tmp_path / name)
    assert (words is not None) == (name in ("digits", "cifar10", "cifar100"))
    assert ("--prepare" in convert_hint(tmp_path / name)) == (words is not None)
    if words is not None:
        assert shlex.join(words) in convert_hint(tmp_path / name)
        assert convert.build_parser().parse_args(words).out == tmp_path / name


def test_configs_have_a_known_data_set() -> None:
    configs = [file for file in (ROOT / "configs").glob("*.yaml") if not file.name.startswith("medium_imagenet")]
    paths = {file.name: Path(load_config(file).data.path) for file in configs}
    assert [name for name, path in paths.items() if known_conversion(path) is None] == []


def test_unknown_path_gets_the_general_hint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "missing"):
        assert convert_hint(path) == "convert the source with zhu convert first"
