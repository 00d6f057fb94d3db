"""Hugging Face datasets: an Arrow data set with a transform, in torch's DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
from torchvision.transforms import v2

from tools.benchmarks.peers.task import Batches, PeerTask, endless
from tools.benchmarks.peers.torch_loader import data_loader, tensor_transform, uint8_transforms

Rows = dict[str, list[Any]]  # columns of a batch


def huggingface_datasets(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, 3, H, W].

    Settings: an Arrow data set, memory-mapped by load_from_disk; JPEG as feature Image, decoded by Pillow, raw pixels
    as bytes, read by np.frombuffer (the features Array3D and Image, which stores pixels as PNG, are slower);
    with_transform with torchvision's transforms v2 on PIL images (JPEG) or tensors; torch's DataLoader with shuffle,
    which fetches a batch at once, and `task.workers` persistent workers; on a GPU, pinned memory and non_blocking
    copies.
    """
    if task.encoding == "npy":
        transform = partial(_raw_batch, tensor_transform(task), task.split.image_size(0))
    else:
        transform = partial(_jpeg_batch, v2.Compose(uint8_transforms(task)))
    loader = data_loader(_table(task).with_transform(transform), task)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    return endless(((batch["image"], batch["label"]) for batch in epochs), task.device)


def _raw_batch(transform: v2.Compose, size: tuple[int, int], rows: Rows) -> Rows:
    arrays = [np.frombuffer(image, np.uint8).reshape(*size, 3) for image in rows["image"]]
    return {"image": [transform(array) for array in arrays], "label": rows["label"]}


def _jpeg_batch(transform: v2.Compose, rows: Rows) -> Rows:
    return {"image": [transform(image) for image in rows["image"]], "label": rows["label"]}


def _table(task: PeerTask) -> datasets.Dataset:
    """Write the Arrow data set, unless present, and open it."""
    folder, raw = task.file("-arrow"), task.encoding == "npy"
    if not folder.exists():
        features = {"image": datasets.Value("binary") if raw else datasets.Image(), "label": datasets.Value("int64")}
        table = datasets.Dataset.from_generator(
            partial(_rows, task), datasets.Features(features), cache_dir=str(task.file("-arrow-cache"))
        )
        table.save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def _rows(task: PeerTask) -> Iterator[dict[str, object]]:
    for index, label in enumerate(task.labels.tolist()):
        image = task.pixels(index).tobytes() if task.encoding == "npy" else {"bytes": task.jpeg_file(index)}
        yield {"image": image, "label": label}
