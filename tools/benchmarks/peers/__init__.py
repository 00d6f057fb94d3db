"""Peers: loaders and training loops of other libraries, built from their public interfaces on the same images.

A loader is a function that takes a PeerTask and returns an endless iterator of (images [B, ...], labels [B]). Samples
are shuffled, and each occurs at most once per epoch. The function's docstring lists the settings of the library. Files
that a peer needs are written to a scratch folder, in the peer's fastest format, before timing starts. Each peer runs
with the number of worker processes or threads at which it is fastest (see `worker_sweep`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.engine.results import NOT_MEASURED
from tools.benchmarks.peers.task import Batches, PeerTask
from tools.benchmarks.peers.worker_sweep import close, fastest, worker_counts

__all__ = ["LOADERS", "LOOPS", "Batches", "PeerSpec", "PeerTask", "all_missing", "available", "loading", "missing"]


@dataclass(frozen=True)
class PeerSpec:
    """A peer: the library it requires, the function that builds it, and the encodings that it reads."""

    library: str  # module that must be importable
    function: str  # MODULE.NAME in tools/benchmarks/peers
    encodings: tuple[str, ...] = ("npy", "jpeg")
    least_workers: int = 0  # 1 for threads, 0 for processes: none means that the main process loads
    exceeds_cores: bool = True  # whether it accepts more workers than cores; FFCV does not, since Numba does not


LOADERS = {
    "FFCV": PeerSpec("ffcv", "ffcv_loader.ffcv", least_workers=1, exceeds_cores=False),
    "SPDL": PeerSpec("spdl.io", "spdl_loader.spdl_pipeline", least_workers=1),
    "DALI, its own readers": PeerSpec("nvidia.dali", "dali_loader.dali", least_workers=1),
    "torchvision v2 + DataLoader": PeerSpec("torchvision", "torch_loader.torchvision_v2"),
    "webdataset": PeerSpec("webdataset", "webdataset_loader.webdataset"),
    "LitData": PeerSpec("litdata", "litdata_loader.litdata_streaming"),
    "MosaicML Streaming": PeerSpec("streaming", "streaming_loader.mosaicml_streaming"),
    "Hugging Face datasets": PeerSpec("datasets", "huggingface_loader.huggingface_datasets"),
    "homework's DataLoader": PeerSpec("torchvision", "torch_loader.homework", ("npy",)),
}
LOOPS = {
    "homework's loop": PeerSpec("torchvision", "training_loops.homework"),
    "torchvision + DataLoader": PeerSpec("torchvision", "training_loops.torchvision_reference"),
    "timm's loop": PeerSpec("timm", "training_loops.timm"),
}


def available(table: dict[str, PeerSpec], encoding: str) -> dict[str, PeerSpec]:
    """Return the peers that read the encoding and whose library is installed.

    All but FFCV, which is built from source, are installed by the extra `peers`.
    """
    return {name: peer for name, peer in table.items() if encoding in peer.encodings and _installed(peer.library)}


def missing(table: dict[str, PeerSpec], encoding: str) -> dict[str, str]:
    """Return the reason for each peer that reads the encoding but whose library is not installed."""
    absent = {name: peer for name, peer in table.items() if encoding in peer.encodings and not _installed(peer.library)}
    return {name: f"{NOT_MEASURED}: {peer.library} is not installed" for name, peer in absent.items()}


def all_missing() -> list[str]:
    """Return the names of all peer loaders and peer training loops whose library is not installed."""
    return [name for name, peer in (LOADERS | LOOPS).items() if not _installed(peer.library)]


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # of the package of a module such as spdl.io
        return False


def load_function(peer: PeerSpec) -> Callable[..., Iterator[object]]:
    """Import and return the function that builds the peer."""
    module, name = peer.function.split(".")
    function: Callable[..., Iterator[object]] = getattr(import_module(f"{__name__}.{module}"), name)
    return function


@contextmanager
def loading(
    peer: PeerSpec, task: PeerTask, workers: Sequence[int] = (), seconds: float = 0.25
) -> Iterator[dict[str, Workload]]:
    """Build a workload that iterates over the peer's loader. The images are on `task.device`.

    Args:
        peer: The peer.
        task: The task, whose `workers` is ignored.
        workers: Numbers of worker processes or threads to try, or empty for those of `worker_counts`.
        seconds: Duration of each try.
    """
    with fastest_workload(peer, task, workers, seconds) as workload:
        yield {"": workload}


@contextmanager
def fastest_workload(
    peer: PeerSpec, task: PeerTask, workers: Sequence[int], seconds: float, *arguments: object
) -> Iterator[Workload]:
    """Build a workload of the peer with the number of workers at which it is fastest, and end its workers at the end.

    `arguments` are passed to the peer's function after the task.
    """
    function = load_function(peer)
    found = fastest(
        lambda count: function(replace(task, workers=count), *arguments),
        workers or worker_counts(peer.least_workers, exceed_cores=peer.exceeds_cores),
        task.batch_size,
        seconds,
    )
    yield Workload(found.items, task.batch_size, found.details, at_once=max(1, found.workers))
    close(found.items)
