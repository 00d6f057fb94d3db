"""MosaicML Streaming: MDS shards and StreamingDataset, in torch's DataLoader."""

from __future__ import annotations

import torch
from streaming import MDSWriter, StreamingDataset
from torchvision.transforms import v2

from tools.benchmarks.peers.task import Batches, PeerTask, endless
from tools.benchmarks.peers.torch_loader import tensor_transform, uint8_transforms


def mosaicml_streaming(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, 3, H, W].

    Settings: MDS shards of 64 MiB, the default, in a local folder; column types jpeg, decoded by Pillow, and ndarray;
    shuffle with the default algorithm; torchvision's transforms v2 in __getitem__, as in Streaming's vision data sets,
    on PIL images (JPEG) or tensors; `task.workers` persistent workers; on a GPU, pinned memory and non_blocking copies.
    """
    _write(task)
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        _Images(task),
        batch_size=task.batch_size,
        num_workers=task.workers,
        drop_last=True,
        pin_memory=task.on_gpu,
        persistent_workers=task.workers > 0,
    )
    return endless(loader, task.device)


class _Images(StreamingDataset):
    def __init__(self, task: PeerTask) -> None:
        super().__init__(local=str(task.file("-mds")), shuffle=True, batch_size=task.batch_size)
        self.transform = tensor_transform(task) if task.encoding == "npy" else v2.Compose(uint8_transforms(task))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self.transform(sample["image"]), sample["label"]


def _write(task: PeerTask) -> None:
    folder, raw = task.file("-mds"), task.encoding == "npy"
    if (folder / "index.json").exists():
        return
    shape = ",".join(map(str, task.split.image_shape or ()))
    columns = {"image": f"ndarray:uint8:{shape}" if raw else "jpeg", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for index in range(len(task.split)):
            image = task.pixels(index) if raw else task.jpeg_file(index)
            writer.write({"image": image, "label": int(task.labels[index])})
