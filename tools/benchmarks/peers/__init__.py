"""Peers: loaders and training loops of other libraries, built from their public interfaces on the same images.

A loader is a function that takes a PeerTask and returns an endless iterator of (images [B, ...], labels [B]). Samples
are shuffled, and each occurs at most once per epoch. The function's docstring lists the settings of the library. Files
that a peer needs are written to a scratch folder, in the peer's fastest format, before timing starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.peers.task import Batches, PeerTask

__all__ = ["LOADERS", "LOOPS", "Batches", "PeerSpec", "PeerTask", "all_missing", "available", "loading"]


@dataclass(frozen=True)
class PeerSpec:
    """A peer: the library it requires, the function that builds it, and the encodings that it reads."""

    library: str  # module that must be importable
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

    FFCV has to be installed by hand. webdataset is part of the extra `dev`.
    """
    return {name: peer for name, peer in table.items() if encoding in peer.encodings and _installed(peer.library)}


def all_missing() -> list[str]:
    """Return the names of all peer loaders and peer training loops whose library is not installed."""
    return [name for name, peer in (LOADERS | LOOPS).items() if not _installed(peer.library)]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def load_function(peer: PeerSpec) -> Callable[..., Iterator[object]]:
    """Import and return the function that builds the peer."""
    module, name = peer.function.split(".")
    function: Callable[..., Iterator[object]] = getattr(import_module(f"{__name__}.{module}"), name)
    return function


@contextmanager
def loading(peer: PeerSpec, task: PeerTask) -> Iterator[dict[str, Workload]]:
    """Build a workload that iterates over the peer's loader. The images are on `task.device`."""
    yield {"": Workload(load_function(peer)(task), task.batch_size)}
