"""LitData: chunks written by optimize, and its StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch

from tools.benchmarks.peers.task import Batches, PeerTask, endless
from tools.benchmarks.peers.torch_loader import ToPlanes, tensor_transform


def litdata_streaming(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, 3, H, W].

    Settings: chunks of 64 MB, the size in LitData's documentation, in local files; JPEG stored as litdata.Jpeg, which
    keeps the bytes and decodes with torchvision.io, raw pixels as tensors; shuffle; torchvision's transforms v2 on
    tensors; `task.workers` persistent workers; on a GPU, pinned memory and non_blocking copies.
    """
    transform = tensor_transform(task)
    dataset = litdata.StreamingDataset(
        str(_chunks(task)), shuffle=True, drop_last=True, transform=partial(_transformed, transform)
    )
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=task.batch_size,
        num_workers=task.workers,
        drop_last=True,
        pin_memory=task.on_gpu,
        persistent_workers=task.workers > 0,
    )
    return endless(loader, task.device)


def _transformed(transform: torch.nn.Module, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    return transform(sample["image"]), sample["label"]


def _chunks(task: PeerTask) -> Path:
    """Write the chunks in another process, unless present, and return their folder."""
    folder = task.file("-litdata")
    if not (folder / "index.json").exists():
        process = multiprocessing.Process(target=_optimize, args=(task, folder))  # optimize leaves threads behind
        process.start()
        process.join()
    return folder


def _optimize(task: PeerTask, folder: Path) -> None:
    inputs = list(range(len(task.split)))
    litdata.optimize(
        partial(_sample, task),
        inputs,
        str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def _sample(task: PeerTask, index: int) -> dict[str, object]:
    label = int(task.labels[index])
    if task.encoding == "npy":
        return {"image": ToPlanes()(task.pixels(index)), "label": label}
    return {"image": litdata.Jpeg(bytes=task.jpeg_file(index)), "label": label}
