"""A typical DALI pipeline: DALI's readers, decoders, random operators and PyTorch iterator."""

from __future__ import annotations

from typing import Any

import torch
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

from tools.benchmarks.peers.task import Batches, PeerTask


def dali(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, H, W, 3].

    Settings: readers.webdataset with index files and a shuffle buffer of 1,024 samples; decoders.numpy or
    decoders.image (image_random_crop for a random-resized crop of JPEG); `task.workers` threads; 2 batches prefetched,
    the default; on a GPU, mixed decoding and GPU operators.
    """
    files = list(task.split.files)
    device_id = 0 if task.on_gpu else None
    pipeline = Pipeline(batch_size=task.batch_size, num_threads=task.workers, device_id=device_id, seed=0)
    with pipeline:
        images, labels = fn.readers.webdataset(  # type: ignore[misc]
            paths=[str(file) for file in files],
            index_paths=[str(file.with_suffix(".idx")) for file in files],
            ext=["npy" if task.encoding == "npy" else "jpg", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1024,
            name="reader",
        )
        images = _augmented(images, task)
        pipeline.set_outputs(images, labels)
    iterator = DALIGenericIterator(
        pipeline, ["images", "labels"], reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    while True:
        for batch in iterator:
            images, digits = batch[0]["images"], batch[0]["labels"]
            yield images, _parse_labels(digits).to(images.device, non_blocking=True)


def _parse_labels(digits: torch.Tensor) -> torch.Tensor:
    """Convert ASCII digits, uint8 [B, digits], to labels, int64 [B].

    DALI reads .cls members as bytes.
    """
    places = 10 ** torch.arange(digits.shape[1] - 1, -1, -1, device=digits.device)
    return ((digits.long() - ord("0")) * places).sum(1)


def _augmented(stored: DataNode, task: PeerTask) -> DataNode:
    aug, size, is_raw = task.aug, [task.image_size] * 2, task.encoding == "npy"
    device = "mixed" if task.on_gpu else "cpu"
    images: Any
    if is_raw:
        images = fn.reshape(fn.decoders.numpy(stored), layout="HWC")
        images = images.gpu() if task.on_gpu else images
    elif aug is not None and aug.crop == "random-resized":
        images = fn.decoders.image_random_crop(
            stored, device=device, random_area=list(aug.scale), random_aspect_ratio=list(aug.ratio)
        )
    else:
        images = fn.decoders.image(stored, device=device)
    if task.evaluation is not None:
        images = fn.resize(images, resize_shorter=task.resized_side)
        return fn.crop(images, crop=size)
    if aug is None:
        return images
    if aug.crop == "random-resized" and is_raw:
        images = fn.random_resized_crop(
            images, size=size, random_area=list(aug.scale), random_aspect_ratio=list(aug.ratio)
        )
    elif aug.crop == "pad":
        start = fn.random.uniform(range=[-aug.padding, aug.padding + 1], shape=[2])
        start = fn.cast(math.floor(start), dtype=types.DALIDataType.INT32)
        images = fn.slice(images, start=start, shape=size, axes=[0, 1], out_of_bounds_policy="pad")
    else:
        images = fn.resize(images, size=size)
    return fn.flip(images, horizontal=fn.random.coin_flip(probability=aug.flip)) if aug.flip > 0 else images
