"""Tests of the command tools/convert.py: conversion, verification and refusal of bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from configs.utils.errors import UserError
from helpers.cifar_files import write_archive, write_cifar10
from helpers.object_store import BUCKET, s3_server
from pipelines.convert.encode import ROTATED
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from tools import convert
from tools.sources import download
from tools.sources.cifar import EDITIONS
from train.checkpoint.progress import dataset_entry

ROOT = Path(__file__).parents[2]


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "convert.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def write_hdf5(path: Path, rows: int = 30) -> Path:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split in ("train", "val", "test"):
            file.create_dataset(f"images-{split}", data=random.integers(0, 256, (rows, 3, 8, 8), np.uint8))
            if split != "test":
                file.create_dataset(f"labels-{split}", data=random.integers(0, 3, rows))
    return path


def write_images(root: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.png", "val/dog/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(root / name)
    return root


def convert_to(out: Path, *arguments: str | Path) -> dict[str, Any]:
    """Convert in this process and return dataset.json."""
    assert convert.main([*map(str, arguments), "--out", str(out), "--workers", "1"]) == 0
    content: dict[str, Any] = json.loads((out / "dataset.json").read_text())
    return content


def images_of(out: Path, split: str) -> np.ndarray:
    rows = open_split(out, split)
    shape = rows.image_shape
    assert shape is not None
    return np.stack([rows.content[end - np.prod(shape) : end].reshape(shape) for end in rows.address + rows.size])


@pytest.mark.slow
def test_digits_convert_to_a_verified_data_set(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    result = run_script("digits", "--out", out, "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert f"{out}: 1,797 samples of 10 classes as npy" in result.stdout
    assert "images/s" in result.stdout
    assert "train: 1,437 samples in 1 shard" in result.stdout
    assert "val: 360 samples in 1 shard" in result.stdout
    assert "0 quarantined" in result.stdout
    again = run_script("digits", "--out", out, "--workers", "2")
    assert "already contains this data set: nothing to do" in again.stderr
    assert again.stdout.splitlines()[0] == f"{out}: 1,797 samples of 10 classes as npy"
    assert again.stdout.splitlines()[1:] == result.stdout.splitlines()[1:]
    checked = run_script("verify", out)
    assert (checked.returncode, checked.stdout) == (0, f"{out} is intact: 1,797 samples in 2 shards\n")


def test_hdf5_pixels_and_labels_are_unchanged(tmp_path: Path) -> None:
    source = write_hdf5(tmp_path / "x.hdf5")
    names = tmp_path / "classes.txt"
    names.write_text("red\ngreen\nblue\n")
    dataset = convert_to(tmp_path / "out", "hdf5", "--source", source, "--classes", names, "--name", "colours")
    assert (dataset["name"], dataset["classes"], dataset["image_shape"]) == (
        "colours",
        ["red", "green", "blue"],
        [8, 8, 3],
    )
    with h5py.File(source) as file:
        for split in ("val", "test"):
            expected = file[f"images-{split}"][:].transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(images_of(tmp_path / "out", split), expected)
        assert open_split(tmp_path / "out", "val").labels.tolist() == file["labels-val"][:].tolist()  # type: ignore[union-attr]
        pairs = {
            (image.tobytes(), label)
            for image, label in zip(file["images-train"][:].transpose(0, 2, 3, 1), file["labels-train"][:], strict=True)
        }
    train = open_split(tmp_path / "out", "train")
    assert train.labels is not None
    stored = zip(images_of(tmp_path / "out", "train"), train.labels, strict=True)
    assert {(image.tobytes(), label) for image, label in stored} == pairs
    assert open_split(tmp_path / "out", "test").labels is None


def test_jpeg_files_in_hdf5_are_kept_by_default(tmp_path: Path) -> None:
    random, files = np.random.default_rng(0), []
    for size in (12, 12, 16):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (size, 10, 3), np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    images = np.empty(3, h5py.vlen_dtype(np.uint8))
    images[:] = [np.frombuffer(content, np.uint8) for content in files]
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for split in ("train", "val"):
            file[f"{split}/jpeg"], file[f"{split}/target"] = images, np.eye(2)[[0, 1, 1]]
    keys = ["--images-key", "{split}/jpeg", "--labels-key", "{split}/target"]
    assert convert_to(tmp_path / "out", "hdf5", "--source", tmp_path / "x.hdf5", *keys)["encoding"] == "jpeg"
    rows = open_split(tmp_path / "out", "val")
    stored = [rows.content[start : start + size].tobytes() for start, size in zip(rows.address, rows.size, strict=True)]
    assert (stored, rows.labels.tolist()) == (files, [0, 1, 1])  # type: ignore[union-attr]
    with pytest.raises(UserError, match="npy stores one shape"):
        convert_to(tmp_path / "npy", "hdf5", "--source", tmp_path / "x.hdf5", *keys, "--encoding", "npy")


def test_size_option_resizes_images(tmp_path: Path) -> None:
    source = write_hdf5(tmp_path / "x.hdf5")
    assert convert_to(tmp_path / "out", "hdf5", "--source", source, "--size", "16")["image_shape"] == [16, 16, 3]


def test_image_folder_keeps_jpeg_bytes_by_default(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos")
    assert convert_to(tmp_path / "jpeg", "imagefolder", "--source", source)["encoding"] == "jpeg"
    rows = open_split(tmp_path / "jpeg", "val")
    start = int(rows.address[0])
    assert bytes(rows.content[start : start + int(rows.size[0])]) == (source / "val/dog/1.jpg").read_bytes()
    assert convert_to(tmp_path / "npy", "imagefolder", "--source", source, "--encoding", "npy")["encoding"] == "npy"


def test_class_folders_without_splits_become_a_verified_data_set(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos") / "train"
    command = ["imagefolder", "--source", source, "--val-fraction", "0.4", "--follow-links"]
    dataset = convert_to(tmp_path / "out", *command)
    assert {name: split["samples"] for name, split in dataset["splits"].items()} == {"train": 2, "val": 1}
    assert convert.verify(tmp_path / "out") == f"{tmp_path / 'out'} is intact: 3 samples in 2 shards"
    convert_to(tmp_path / "out", *command)  # the same split again
    with pytest.raises(UserError, match="already contains the data set 'train', converted from another source"):
        convert_to(tmp_path / "out", *command, "--test-fraction", "0.1", "--val-fraction", "0")


def test_labels_option_names_the_classes_of_flat_images(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos") / "train/cat"
    (tmp_path / "labels.csv").write_text("id,label\n1,Tom\n2,Felix\n")
    dataset = convert_to(tmp_path / "out", "imagefolder", "--source", source, "--labels", tmp_path / "labels.csv")
    assert (dataset["classes"], dataset["splits"]["train"]["samples"]) == (["Felix", "Tom"], 2)


def test_orientation_is_applied_and_recorded_if_asked(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by 90 degrees
    for folder in ("train", "val"):
        (tmp_path / f"photos/{folder}/a").mkdir(parents=True)
        Image.new("RGB", (12, 20)).save(tmp_path / f"photos/{folder}/a/1.jpg", exif=tags)
    command = ["imagefolder", "--source", tmp_path / "photos"]
    ignored = convert_to(tmp_path / "ignored", *command)
    assert ignored["image_shape"] == [20, 12, 3]
    assert "orientation" not in ignored["options"]["encoding"]  # as in older data sets
    applied = convert_to(tmp_path / "applied", *command, "--orientation", "apply")
    assert applied["image_shape"] == [12, 20, 3]
    assert applied["options"]["encoding"]["orientation"] == "apply"
    assert applied["reencoded"] == {"train": {ROTATED: 1}, "val": {ROTATED: 1}}
    for name in ("ignored", "applied"):
        assert "is intact" in convert.verify(tmp_path / name)
    assert dataset_entry(load_dataset(tmp_path / "applied"), 12)["conversion"]["orientation"] == "apply"


def test_defective_images_are_listed_and_refused_when_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "photos")
    for number in range(5):
        (source / f"train/cat/bad{number}.jpg").write_bytes(b"garbage"[: 7 * number])
    dataset = convert_to(tmp_path / "out", "imagefolder", "--source", source)
    output = capsys.readouterr().out
    assert "train: 3 samples in 1 shard" in output
    assert "5 quarantined" in output
    assert "train/cat/bad0.jpg: empty file" in output
    assert "2 more in" in output
    assert len(dataset["splits"]["train"]["quarantined"]) == 5
    with pytest.raises(UserError, match="bad0"):
        convert_to(tmp_path / "strict", "imagefolder", "--source", source, "--strict")


def test_cifar_is_downloaded_and_converted_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    folder = write_cifar10(site)
    archive = write_archive(site / EDITIONS["cifar10"].archive, folder)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(EDITIONS, "cifar10", dataclasses.replace(EDITIONS["cifar10"], md5=md5))
    monkeypatch.setattr(download, "SITE", site.as_uri() + "/")
    monkeypatch.chdir(tmp_path)
    dataset = convert_to(tmp_path / "out", "cifar10", "--download")
    assert (tmp_path / "data/raw" / archive.name).is_file()
    assert [split["samples"] for split in dataset["splits"].values()] == [20, 4, 4]
    assert dataset["source"]["kind"] == "cifar10"


def test_present_cifar_folder_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SITE", (tmp_path / "nowhere").as_uri() + "/")
    write_cifar10(tmp_path / "raw")
    dataset = convert_to(tmp_path / "out", "cifar10", "--download", "--source", tmp_path / "raw")
    assert dataset["splits"]["train"]["samples"] == 20
    with pytest.raises(UserError, match="cannot download"):
        convert_to(tmp_path / "other", "cifar100", "--download", "--source", tmp_path / "raw")


@pytest.mark.parametrize("command", ["digits", "cifar10", "cifar100", "hdf5", "imagefolder", "verify"])
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        convert.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  zhu convert {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits"],
        ["digits", "--out", "x", "--workers", "0"],
        ["digits", "--out", "x", "--encoding", "jpeg", "--quality", "101"],
        ["digits", "--out", "x", "--size", "1.5"],
        ["digits", "--out", "x", "--seed", "-1"],
        ["digits", "--out", "x", "--subsampling", "4:1:1"],
        ["imagefolder", "--out", "x", "--source", ".", "--val-fraction", "1"],
        ["imagefolder", "--out", "x", "--source", ".", "--test-fraction", "10%"],
        ["hdf5", "--out", "x"],
        ["parquet", "--out", "x"],
        [],
    ],
)
def test_invalid_arguments_exit_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        convert.main(arguments)
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--quality and --subsampling belong to --encoding jpeg"):
        convert.main(["digits", "--out", str(tmp_path / "x"), "--quality", "90"])
    with pytest.raises(UserError, match="--spool is for an --out in an object store"):
        convert.main(["digits", "--out", str(tmp_path / "x"), "--spool", str(tmp_path / "spool")])


def test_url_is_converted_into_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3_server():
        url = f"s3://{BUCKET}/digits"
        for timed in (True, False):
            assert convert.main(["digits", "--out", f"{url}/", "--workers", "1"]) == 0
            found = capsys.readouterr()
            assert found.out.startswith(f"{url}: 1,797 samples of 10 classes as npy")
            assert ("images/s" in found.out) == timed
            assert (f"{url} already contains this data set: nothing to do" in found.err) != timed
        assert convert.main(["verify", url]) == 0
    assert capsys.readouterr().out == f"{url} is intact: 1,797 samples in 2 shards\n"
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_url_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to https://host/set: web servers are only read"):
        convert.main(["imagefolder", "--source", str(tmp_path / "missing"), "--out", "https://host/set"])


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 101])
def test_invalid_data_set_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="give a --name of up to 100 letters"):
        convert.main(["digits", "--out", str(tmp_path / "x"), f"--name={name}"])
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_print_one_line_and_exit_with_2(tmp_path: Path) -> None:
    truncated = write_hdf5(tmp_path / "truncated.hdf5")
    truncated.write_bytes(truncated.read_bytes()[:5000])
    commands: tuple[list[str | Path], ...] = (
        ["hdf5", "--source", truncated, "--out", tmp_path / "out"],
        ["verify", tmp_path / "missing"],
    )
    for arguments in commands:
        result = run_script(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["cifar10", "--source", "missing"],
        ["cifar100", "--source", "missing"],
        ["hdf5", "--source", "missing"],
        ["hdf5", "--source", "x.hdf5", "--classes", "missing"],
        ["imagefolder", "--source", "missing"],
        ["imagefolder", "--source", "."],
    ],
)
def test_missing_source_is_a_user_error_and_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hdf5(tmp_path / "x.hdf5")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        convert.main([*arguments, "--out", "out"])
    assert not (tmp_path / "out").exists()


def test_verify_names_damaged_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_to(out, "hdf5", "--source", write_hdf5(tmp_path / "x.hdf5"))
    assert convert.verify(out) == f"{out} is intact: 90 samples in 3 shards"
    shard = out / "x-val-000000.tar"
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[700] ^= 1
    for damaged in (content[:-1024], content[: len(content) // 2], flipped):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged: x-val-000000.tar"):
            convert.main(["verify", str(out)])
    shard.write_bytes(content)
    index = out / "train.index.npz"
    index.write_bytes((out / "val.index.npz").read_bytes())
    with pytest.raises(UserError, match=r"train.index.npz"):
        convert.main(["verify", str(out)])


def test_converting_twice_changes_nothing(tmp_path: Path) -> None:
    source, out = write_hdf5(tmp_path / "x.hdf5"), tmp_path / "out"
    convert_to(out, "hdf5", "--source", source)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    convert_to(out, "hdf5", "--source", source)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before


def test_convert_does_not_import_torch_or_dali() -> None:
    code = "import sys, tools.convert; print(sorted({'torch', 'nvidia.dali', 'h5py', 'sklearn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"


def test_equal_sources_give_equal_files_in_any_folder(tmp_path: Path) -> None:
    source = write_hdf5(tmp_path / "x.hdf5")
    contents = []
    for name in ("first", "second"):
        convert_to(tmp_path / name, "hdf5", "--source", source)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert "x-train-000000.tar" in contents[0]
