"""What other loaders reach on the same images: the peers of `tools/benchmark.py loader --peers`.

Each peer is a function (source: PeerSource) -> endless iterator of (images uint8 [B, ...], labels [B]), shuffled, from
files written once into a scratch folder in the peer's own best format. Built from their public interfaces.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pipelines.shards import Split


@dataclass(frozen=True)
class PeerSource:
    """One npy split, a scratch folder, and the sizes all loaders share."""

    split: Split
    scratch: Path
    batch_size: int
    workers: int

    def pixels(self) -> np.ndarray:
        """All images: uint8 [samples, H, W, 3]."""
        view, rows = self.split.pixel_rows()
        shape = self.split.image_shape or ()
        return torch.from_numpy(view).index_select(0, torch.from_numpy(rows)).numpy().reshape(len(rows), *shape)

    def labels(self) -> np.ndarray:
        """int64 [samples]; zeros where the split has none."""
        return np.zeros(len(self.split), np.int64) if self.split.labels is None else self.split.labels


Batches = Iterator[tuple[Any, Any]]


class _Hdf5Rows(torch.utils.data.Dataset):
    """One row of an open HDF5 file per sample, as the homework's loader for MediumImageNet reads."""

    def __init__(self, path: Path, samples: int) -> None:
        self.path, self.samples = path, samples
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return torch.from_numpy(self.file["images-train"][index]), int(self.file["labels-train"][index])


class _PickledImages(torch.utils.data.Dataset):
    """All images in memory from a pickle, one array per sample, as torchvision's CIFAR-10 reads."""

    def __init__(self, path: Path) -> None:
        content = pickle.loads(path.read_bytes())  # written by `dataloader_pickle` just before
        self.images, self.labels = content["data"], content["labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]), self.labels[index]


def _dataloader(dataset: torch.utils.data.Dataset, source: PeerSource) -> Batches:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=source.batch_size,
        shuffle=True,
        num_workers=source.workers,
        drop_last=True,
        persistent_workers=source.workers > 0,
    )
    while True:
        yield from loader


def dataloader_h5py(source: PeerSource) -> Batches:
    """torch DataLoader, one h5py read per sample."""
    path = source.scratch / "images.hdf5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file["images-train"] = source.pixels().transpose(0, 3, 1, 2)
            file["labels-train"] = source.labels()
    return _dataloader(_Hdf5Rows(path, len(source.split)), source)


def dataloader_pickle(source: PeerSource) -> Batches:
    """torch DataLoader over images unpickled into memory."""
    path = source.scratch / "images.pickle"
    if not path.exists():
        path.write_bytes(pickle.dumps({"data": source.pixels(), "labels": source.labels().tolist()}, protocol=4))
    return _dataloader(_PickledImages(path), source)


def webdataset(source: PeerSource) -> Batches:
    """The webdataset library over our own shards, with its shuffle buffer."""
    import webdataset as wds

    files = [str(file) for file in source.split.files]
    workers = min(source.workers, len(files))  # the library gives each worker whole shards
    dataset = wds.WebDataset(files, shardshuffle=len(files), nodesplitter=None).shuffle(1000).decode()
    dataset = dataset.to_tuple("npy", "cls").batched(source.batch_size, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def dali_webdataset(source: PeerSource) -> Batches:
    """DALI's own webdataset reader over our own shards and indices, through DALI's iterator for PyTorch."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    files = list(source.split.files)
    pipeline = Pipeline(batch_size=source.batch_size, num_threads=source.workers, device_id=None)
    with pipeline:
        images, labels = fn.readers.webdataset(  # type: ignore[misc]
            paths=[str(file) for file in files],
            index_paths=[str(file.with_suffix(".idx")) for file in files],
            ext=["npy", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1024,
            name="reader",
        )
        pipeline.set_outputs(fn.decoders.numpy(images), labels)
    iterator = DALIGenericIterator(
        pipeline, ["images", "labels"], reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    while True:
        for batch in iterator:
            yield batch[0]["images"], batch[0]["labels"]


def ffcv(source: PeerSource) -> Batches:
    """FFCV's raw mode: one file of uncompressed images, cached by the system, shuffled globally."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    path = source.scratch / "images.beton"
    if not path.exists():
        pixels, labels = source.pixels(), source.labels()

        class Rows:
            def __len__(self) -> int:
                return len(labels)

            def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
                return pixels[index], int(labels[index])

        writer = DatasetWriter(
            str(path), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1
        )
        writer.from_indexed_dataset(Rows())
    threads = torch.get_num_threads()  # which FFCV's loader lowers for the whole process
    loader = Loader(
        str(path),
        batch_size=source.batch_size,
        num_workers=source.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
    torch.set_num_threads(threads)
    while True:
        yield from loader


PEERS: dict[str, Callable[[PeerSource], Batches]] = {
    "DataLoader over h5py": dataloader_h5py,
    "DataLoader over pickle": dataloader_pickle,
    "webdataset library": webdataset,
    "DALI readers.webdataset": dali_webdataset,
    "FFCV raw": ffcv,
}
MODULES = {"webdataset library": "webdataset", "FFCV raw": "ffcv"}


def importable() -> dict[str, Callable[[PeerSource], Batches]]:
    """The peers whose library is installed; webdataset is in the extra `dev`, FFCV is built by hand."""
    return {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(MODULES.get(name, "torch"))}
