"""Data sets as people have them are converted, verified and trained on, and give the same run in every form."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.photos import photos
from helpers.training import DIGITS
from tools import convert
from train import ddp

CLASSES = ("n01", "n02", "n03")
TRAIN, VAL = 8, 4  # images per class


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


FILES = [jpeg(image) for image in photos(32, 32, len(CLASSES) * (TRAIN + VAL))]
CONTENT = {  # split -> (class, file) of each image, sorted by class
    "train": [(name, FILES[row * TRAIN + place]) for row, name in enumerate(CLASSES) for place in range(TRAIN)],
    "val": [(name, FILES[-1 - row * VAL - place]) for row, name in enumerate(CLASSES) for place in range(VAL)],
}


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tiny_imagenet(root: Path) -> list[str]:
    lines = []
    for row, (name, content) in enumerate(CONTENT["train"]):
        write_file(root / f"train/{name}/images/{name}_{row:02d}.JPEG", content)
    for row, (name, content) in enumerate(CONTENT["val"]):
        write_file(root / f"val/images/val_{row:02d}.JPEG", content)
        lines.append(f"val_{row:02d}.JPEG\t{name}\t0\t32\t44\t62\n")
    write_file(root / "val/val_annotations.txt", "".join(reversed(lines)).encode())
    return ["imagefolder"]


def links(root: Path) -> list[str]:
    outside = root.parent / "outside"
    for split, rows in CONTENT.items():
        for row, (name, content) in enumerate(rows):
            write_file(outside / split / name / f"{row:02d}.jpg", content)
        (root / split).mkdir(parents=True)
        for name in CLASSES[1:]:
            (root / split / name).symlink_to(outside / split / name)
        (root / split / CLASSES[0]).mkdir()
        for file in (outside / split / CLASSES[0]).iterdir():
            (root / split / CLASSES[0] / file.name).symlink_to(file)
    return ["imagefolder", "--follow-links"]


def hdf5(root: Path) -> list[str]:
    with h5py.File(root, "w") as file:
        for split, rows in CONTENT.items():
            images = np.empty(len(rows), h5py.vlen_dtype(np.uint8))
            images[:] = [np.frombuffer(content, np.uint8) for _, content in rows]
            file[f"{split}/jpeg"] = images
            file[f"{split}/one_hot"] = np.eye(len(CLASSES))[[CLASSES.index(name) for name, _ in rows]]
    (root.parent / "classes.txt").write_text("\n".join(CLASSES))
    keys = ["--images-key", "{split}/jpeg", "--labels-key", "{split}/one_hot"]
    return ["hdf5", *keys, "--classes", str(root.parent / "classes.txt")]


def no_splits(root: Path) -> list[str]:
    for row, (name, content) in enumerate([*CONTENT["train"], *CONTENT["val"]]):
        write_file(root / name / f"{row}.jpg", content)
    return ["imagefolder", "--val-fraction", "0.34"]


def kaggle(root: Path) -> list[str]:
    lines = ["id,label\n"]
    for row, (name, content) in enumerate([*CONTENT["train"], *CONTENT["val"]]):
        write_file(root / f"train/{row}.jpg", content)
        lines.append(f"{row},{name}\n")
    write_file(root / "trainLabels.csv", "".join(lines).encode())
    return ["imagefolder", "--labels", str(root / "trainLabels.csv"), "--val-fraction", "0.34"]


def converted_run(
    folder: Path, write: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Write a source, convert and verify it, train one epoch, and return the metrics of the epoch."""
    folder.mkdir()
    data, (command, *options) = folder / "data", write(folder / "source")
    arguments = [command, "--source", str(folder / "source"), "--out", str(data), "--name", "natural", *options]
    assert convert.main(arguments) == 0
    count = len(CLASSES) * (TRAIN + VAL)
    assert convert.verify(data) == f"{data} is intact: {count} samples in 2 shards"
    content = json.loads((data / "dataset.json").read_text())
    assert (content["encoding"], content["classes"]) == ("jpeg", list(CLASSES))
    assert {name: split["samples"] for name, split in content["splits"].items()} == {"train": 24, "val": 12}
    settings = ["data.batch_size=8", "data.image_size=32", "train.epochs=1", "model.num_classes=3"]
    command_line = ["ddp.py", "--cfg", str(DIGITS), "--data-path", str(data), "--output", str(folder / "output")]
    monkeypatch.setattr(sys, "argv", [*command_line, "--opts", *settings])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ddp.main() == 0
    lines = (folder / "output/digits_lenet/metrics.jsonl").read_text().splitlines()
    metrics = next(line for line in map(json.loads, lines) if "val_loss" in line)
    return {name: metrics[name] for name in ("train_loss", "val_loss", "val_top1")}


def test_forms_of_one_data_set_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [converted_run(tmp_path / form.__name__, form, monkeypatch) for form in (tiny_imagenet, links, hdf5)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("form", [no_splits, kaggle])
def test_data_sets_without_a_split_are_split_and_trained_on(
    form: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = converted_run(tmp_path / "one", form, monkeypatch)
    assert 0 < metrics["val_loss"] < 5
    assert os.listdir(tmp_path / "one/output") == ["digits_lenet"]
