"""SPDL: a pipeline of threads that decodes, crops and resizes JPEG with FFmpeg."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import spdl.io
import torch
from spdl.pipeline import PipelineBuilder
from spdl.source.local_directory import LocalDirectory
from spdl.source.utils import repeat_source
from torchvision.transforms import v2

from tools.benchmarks.peers.task import Batch, Batches, PeerTask, endless
from tools.benchmarks.peers.torch_loader import tensor_transform


def spdl_pipeline(task: PeerTask) -> Batches:
    """Yield batches of uint8 images, [B, H, W, 3] for JPEG and [B, 3, H, W] for raw pixels.

    Settings: LocalDirectory with a file per image, CLASS/NUMBER.jpg or .npy, shuffled in every epoch; one batch per
    task, as in SPDL's ImageNet example; `task.workers` threads; 3 batches buffered. JPEG is demuxed, decoded and
    filtered (crop, scale, hflip) by FFmpeg and converted to a batch by convert_frames. SPDL does not transform arrays,
    so raw pixels are read by load_npy and transformed by torchvision's transforms v2 in the same threads.
    """
    load = _JpegBatches(task) if task.encoding == "jpeg" else _RawBatches(task)
    pipeline = (
        PipelineBuilder()
        .add_source(repeat_source(LocalDirectory(_files(task), "*/*")))
        .aggregate(task.batch_size, drop_last=True)
        .pipe(load, concurrency=task.workers)
        .add_sink(3)
        .build(num_threads=task.workers)
    )
    with pipeline.auto_stop():
        yield from endless(pipeline, task.device)


def _files(task: PeerTask) -> Path:
    """Write a file per image to CLASS/NUMBER.jpg or .npy, unless present, and return the folder."""
    folder = task.file("-files")
    if folder.exists():
        return folder
    part = task.file("-files-part")
    for label in np.unique(task.labels):
        (part / str(label)).mkdir(parents=True)
    for index, label in enumerate(task.labels):
        path = part / str(label) / str(index)
        if task.encoding == "npy":
            np.save(path.with_suffix(".npy"), task.pixels(index))
        else:
            path.with_suffix(".jpg").write_bytes(task.jpeg_file(index))
    return part.rename(folder)


def _labels(paths: Sequence[Path]) -> torch.Tensor:
    return torch.tensor([int(path.parent.name) for path in paths])


class _RawBatches:
    """Load a batch of .npy files."""

    def __init__(self, task: PeerTask) -> None:
        self.transform = tensor_transform(task)

    def __call__(self, paths: Sequence[Path]) -> Batch:
        arrays = [spdl.io.load_npy(path.read_bytes()) for path in paths]
        return torch.stack([self.transform(array) for array in arrays]), _labels(paths)


class _JpegBatches:
    """Decode and augment a batch of JPEG files with FFmpeg."""

    def __init__(self, task: PeerTask) -> None:
        self.task = task

    def __call__(self, paths: Sequence[Path]) -> Batch:
        packets = [spdl.io.demux_image(str(path)) for path in paths]
        frames = [spdl.io.decode_packets(one, filter_desc=self._filters(one.codec)) for one in packets]
        return spdl.io.to_torch(spdl.io.convert_frames(frames)), _labels(paths)

    def _filters(self, codec: spdl.io.ImageCodec) -> str | None:
        """Return FFmpeg's filters for the crop and flip of an image, with random values drawn as torchvision does."""
        task, aug, size = self.task, self.task.aug, self.task.image_size
        width, height = codec.width, codec.height
        if task.evaluation is not None:
            side = task.resized_side
            scale = f"scale={side}:{side}:flags=bilinear:force_original_aspect_ratio=increase"
            return spdl.io.get_video_filter_desc(filter_desc=f"{scale},crop={size}:{size}")
        if aug is None:
            return spdl.io.get_video_filter_desc()
        scale = f"scale={size}:{size}:flags=bilinear"
        filters = [] if (width, height) == (size, size) else [scale]
        if aug.crop == "random-resized":
            image = torch.empty(0, height, width)
            top, left, rows, columns = v2.RandomResizedCrop(size, aug.scale, aug.ratio).make_params([image]).values()
            filters = [f"crop={columns}:{rows}:{left}:{top}:exact=1", scale]
        elif aug.crop == "pad":
            padding = aug.padding
            left, top = random.randint(0, 2 * padding), random.randint(0, 2 * padding)
            filters += [f"pad={size + 2 * padding}:{size + 2 * padding}:{padding}:{padding}"]
            filters += [f"crop={size}:{size}:{left}:{top}:exact=1"]
        if random.random() < aug.flip:
            filters.append("hflip")
        return spdl.io.get_video_filter_desc(filter_desc=",".join(filters) or None)
