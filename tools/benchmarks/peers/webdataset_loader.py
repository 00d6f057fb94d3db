"""The loader of the webdataset library. It reads our shards directly, since they follow its naming convention."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from tools.benchmarks.peers.task import Batches, PeerTask, endless
from tools.benchmarks.peers.torch_loader import tensor_transform


def webdataset(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, 3, H, W].

    Settings: shuffled shards and a shuffle buffer of 1,000 samples; torchvision's transforms v2 on tensors (npy) or PIL
    images (JPEG); at most `task.workers` workers, which also build the batches; on a GPU, pinned memory and
    non_blocking copies.
    """
    import webdataset as wds

    split = task.shards_for_workers()
    files = [str(file) for file in split.files]
    raw = task.encoding == "npy"
    transform = tensor_transform(task) if raw else v2.Compose([v2.PILToTensor(), tensor_transform(task)])
    dataset = wds.WebDataset(files, shardshuffle=len(files), nodesplitter=None).shuffle(1000)
    dataset = dataset.decode() if raw else dataset.decode("pil")
    dataset = dataset.to_tuple("npy" if raw else "jpg", "cls").map_tuple(transform, int)
    dataset = dataset.batched(task.batch_size, collation_fn=torch.utils.data.default_collate, partial=False)
    workers = min(task.workers, len(files))  # each worker takes whole shards
    loader = wds.WebLoader(
        dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0, pin_memory=task.on_gpu
    )
    return endless(loader, task.device)
