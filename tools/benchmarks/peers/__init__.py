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

from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.peers.task import Batches, PeerTask

__all__ = ["LOADERS", "LOOPS", "Batches", "Loader", "PeerSource", "available", "loading", "missing"]


@dataclass(frozen=True)
class PeerSpec:
    """Where a peer's function lies, and what it reads."""

    library: str  # that it needs
    function: str  # of tools/benchmarks/peers, MODULE.NAME
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
    """Those that read the encoding and whose library is installed; FFCV is built by hand, webdataset is in extra
    `dev`."""
    return {name: peer for name, peer in table.items() if encoding in peer.encodings and _installed(peer.library)}


def missing(table: dict[str, PeerSpec]) -> list[str]:
    """Those whose library is not installed."""
    return [name for name, peer in table.items() if not _installed(peer.library)]


def all_missing() -> list[str]:
    """Return the names of all loaders and loops whose library is not installed."""
    return [*missing(LOADERS), *missing(LOOPS)]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def load_function(peer: PeerSpec) -> Any:
    module, name = peer.function.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


@contextmanager
def loading(peer: PeerSpec, task: PeerTask) -> Iterator[dict[str, Workload]]:
    """The peer's batches, on the device that training would want them on."""
    yield {"": Workload(load_function(peer)(task), task.batch_size)}
