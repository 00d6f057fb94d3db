"""Peers: loaders and training loops of other libraries, built from their public interfaces on the same images.

A loader is a function (task: PeerTask) -> endless iterator of (images [B, ...], labels [B]), shuffled, each sample at
most once per epoch. Its docstring lists its settings. Files that a peer needs are written to a scratch folder, in the
peer's fastest format, before timing starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.peers.task import Batches, PeerTask

__all__ = ["LOADERS", "LOOPS", "Batches", "Loader", "PeerSource", "available", "loading", "missing"]


@dataclass(frozen=True)
class PeerSpec:
    """Description of a peer: the function that builds it and the encodings that it reads."""

    library: str  # required
    function: str  # MODULE.NAME in tools/benchmarks/peers
    encodings: tuple[str, ...] = ("npy", "jpeg")


LOADERS = {
    "FFCV": PeerSpec("ffcv", "ffcv_loader.ffcv"),
    "DALI, its own readers": PeerSpec("nvidia.dali", "dali_loader.dali"),
    "torchvision v2 + DataLoader": PeerSpec("torchvision", "torch_loader.torchvision_v2"),
    "webdataset": PeerSpec("webdataset", "webdataset_loader.webdataset"),
    "homework's DataLoader": PeerSpec("torchvision", "torch_loader.homework", ("npy",)),
}
LOOPS = {
    "homework's loop": PeerSpec("torchvision", "training_loops.homework"),
    "torchvision + DataLoader": PeerSpec("torchvision", "training_loops.torchvision_reference"),
    "timm's loop": PeerSpec("timm", "training_loops.timm"),
}


def available(table: dict[str, PeerSpec], encoding: str) -> dict[str, PeerSpec]:
    """Return the peers that read the encoding and whose library is installed.

    FFCV has to be built by hand; webdataset is in the extra `dev`.
    """
    return {name: peer for name, peer in table.items() if encoding in peer.encodings and _installed(peer.library)}


def missing(table: dict[str, PeerSpec]) -> list[str]:
    """Return the names of the peers whose library is not installed."""
    return [name for name, peer in table.items() if not _installed(peer.library)]


def all_missing() -> list[str]:
    """Return the names of all loaders and loops whose library is not installed."""
    return [*missing(LOADERS), *missing(LOOPS)]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def load_function(peer: PeerSpec) -> Any:
    """Import and return the peer's function."""
    module, name = peer.function.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


@contextmanager
def loading(peer: PeerSpec, task: PeerTask) -> Iterator[dict[str, Workload]]:
    """Measure the peer's loader, with batches on the device of training."""
    yield {"": Workload(load_function(peer)(task), task.batch_size)}
