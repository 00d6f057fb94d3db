"""FFCV: its file format, decoders and compiled augmentation."""

from __future__ import annotations

import numpy as np
import torch

from configs.utils.errors import UserError
from tools.benchmarks.engine.datasets import QUALITY
from tools.benchmarks.peers.task import Batches, PeerTask, endless


def ffcv(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, H, W, 3].

    Settings: write_mode raw, or jpg with quality QUALITY; order RANDOM; os_cache; `task.workers` workers; 3 batches
    prefetched, the default; on a GPU, ToDevice(non_blocking). Pad-and-crop follows FFCV's CIFAR recipe
    (RandomHorizontalFlip, RandomTranslate) without Cutout. A random-resized crop follows FFCV's ImageNet recipe
    (RandomResizedCropRGBImageDecoder), and an evaluation its validation loader (CenterCropRGBImageDecoder).

    Raises:
        UserError: The augmentation resizes images without a random-resized crop, which FFCV does not support.
    """
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToDevice, ToTensor

    _write(task)
    on_device = [ToDevice(torch.device("cuda:0"), non_blocking=True)] if task.on_gpu else []
    threads = torch.get_num_threads()  # FFCV's loader lowers the number for the whole process
    loader = Loader(
        str(task.file(".beton")),
        batch_size=task.batch_size,
        num_workers=task.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [*_decoded(task), ToTensor(), *on_device],
            "label": [IntDecoder(), ToTensor(), *on_device],
        },
    )
    torch.set_num_threads(threads)
    return endless(loader, "cpu")


def _decoded(task: PeerTask) -> list[object]:
    from ffcv.fields.decoders import (
        CenterCropRGBImageDecoder,
        RandomResizedCropRGBImageDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate

    aug, size = task.aug, task.image_size
    if task.evaluation is not None:
        return [CenterCropRGBImageDecoder((size, size), ratio=size / task.resized_side)]
    if aug is None:
        return [SimpleRGBImageDecoder()]
    flip = [RandomHorizontalFlip(aug.flip)] if aug.flip > 0 else []
    if aug.crop == "random-resized":
        return [RandomResizedCropRGBImageDecoder((size, size), scale=aug.scale, ratio=aug.ratio), *flip]
    if task.split.heights.max() != size:
        raise UserError(f"FFCV has no operator that resizes {task.split.heights.max()} to {size} pixels without a crop")
    return [SimpleRGBImageDecoder(), *flip, *([RandomTranslate(aug.padding)] if aug.crop == "pad" else [])]


def _write(task: PeerTask) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = task.file(".beton")
    if path.exists():
        return

    class Rows:
        def __len__(self) -> int:
            return len(task.split)

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.ascontiguousarray(task.pixels(index)), int(task.labels[index])

    mode = {"write_mode": "raw"} if task.encoding == "npy" else {"write_mode": "jpg", "jpeg_quality": QUALITY}
    writer = DatasetWriter(str(path), {"image": RGBImageField(**mode), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(Rows())
