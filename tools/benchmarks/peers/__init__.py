"""Other loaders and other training loops, built from their public interfaces as their users would, on the same images.

A loader is a function (source: PeerSource) -> endless iterator of (images [B, ...], labels [B]), shuffled, each sample
at most once per epoch; its docstring says which settings it has. Files that a peer needs are written into a scratch
folder, in the peer's own best format, before anything is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tools.benchmarks.engine.interleaved import Stream
from tools.benchmarks.peers.source import Batches, PeerSource

__all__ = ["LOADERS", "LOOPS", "Batches", "Loader", "PeerSource", "available", "loading", "missing"]


@dataclass(frozen=True)
class Loader:
    """Where a peer's function lies, and what it reads."""

    library: str  # that it needs
    function: str  # of tools/benchmarks/peers, MODULE.NAME
    encodings: tuple[str, ...] = ("npy", "jpeg")


LOADERS = {
    "FFCV": Loader("ffcv", "ffcv_loader.ffcv"),
    "DALI, its own readers": Loader("nvidia.dali", "dali_loader.dali"),
    "torchvision v2 + DataLoader": Loader("torchvision", "torch_loader.torchvision_v2"),
    "webdataset": Loader("webdataset", "webdataset_loader.webdataset"),
    "homework's DataLoader": Loader("torchvision", "torch_loader.homework", ("npy",)),
}
LOOPS = {
    "homework's loop": Loader("torchvision", "training_loops.homework"),
    "torchvision + DataLoader": Loader("torchvision", "training_loops.torchvision_reference"),
    "timm's loop": Loader("timm", "training_loops.timm"),
}


def available(table: dict[str, Loader], encoding: str) -> dict[str, Loader]:
    """Those that read the encoding and whose library is installed; FFCV is built by hand, webdataset is in extra
    `dev`."""
    return {name: peer for name, peer in table.items() if encoding in peer.encodings and _installed(peer.library)}


def missing(table: dict[str, Loader]) -> list[str]:
    """Those whose library is not installed."""
    return [name for name, peer in table.items() if not _installed(peer.library)]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def function_of(peer: Loader) -> Any:
    module, name = peer.function.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


@contextmanager
def loading(peer: Loader, source: PeerSource) -> Iterator[dict[str, Stream]]:
    """The peer's batches, on the device that training would want them on."""
    yield {"": Stream(function_of(peer)(source), source.batch_size)}
