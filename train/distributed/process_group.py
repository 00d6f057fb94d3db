"""Process group, ranks and data parallelism.

A process group always exists, even for a single process without torchrun, so that other code need not handle a missing
group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.utils.errors import UserError

# Limit for a rank that neither joins nor fails, e.g. a stopped process or a machine that hangs. Compilation and
# autotuning hardly count, since all ranks do them at the same time.
GROUP_TIMEOUT = timedelta(minutes=10)
LAUNCH_ID_VARIABLE = "ZHU_START"  # launch id, see `train.distributed.failure_channel`
NEVER = 2**31 - 1  # steps between two measurements of DDP
_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # of `release_at_end`


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes, over all machines and on this machine (local)."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read the ranks from the variables that torchrun sets. If any is missing, this process is the only rank.

        Raises:
            UserError: WORLD_SIZE is set to a value other than 1 while another variable is missing, or a variable is not
                a non-negative integer.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing and os.environ.get("WORLD_SIZE", "1") != "1":  # otherwise each rank would train a separate model
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {' and '.join(missing)}; start with "
                f"torchrun, or set {', '.join(names)}, MASTER_ADDR and MASTER_PORT"
            )
        if missing:
            return cls()
        if wrong := [f"{name}={os.environ[name]}" for name in names if not os.environ[name].isdecimal()]:
            raise UserError(f"{', '.join(wrong)} must be whole numbers from 0; start with torchrun, which sets them")
        return cls(*(int(os.environ[name]) for name in names))

    @classmethod
    def alone(cls, tool: str) -> Ranks:
        """Return the `Ranks` of a tool that runs as a single process.

        Raises:
            UserError: torchrun started several processes, or its variables are invalid, see `from_environment`.
        """
        if cls.from_environment().world_size > 1:
            raise UserError(f"{tool} is one process; start it with python instead of torchrun")
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(ranks: Ranks) -> Iterator[torch.device]:
    """Initialize the process group for the lifetime of the context, and yield the device of this rank.

    Raises:
        UserError: This machine has GPUs, but fewer than `local_world_size`, the shared store cannot be reached, or this
            process already has a group.
    """
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if ranks.local_world_size > gpus:
            raise UserError(
                f"{ranks.local_world_size} processes were started on a machine with {gpus} GPUs; "
                f"use --nproc_per_node={gpus} at most"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if dist.is_initialized():
        raise UserError(
            "this process already has a torch.distributed process group, of another run or of your own code; wait for "
            "that run, or call torch.distributed.destroy_process_group()"
        )
    store = dist.HashStore() if ranks.world_size == 1 else _launch_store(open_store(ranks))
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=GROUP_TIMEOUT)
    is_broken = False
    try:
        yield device
    except Exception:
        is_broken = ranks.world_size > 1
        raise
    finally:
        if not is_broken:  # destroying the group could wait forever for lost ranks
            for graph in list(_graphs):
                graph.reset()
            dist.destroy_process_group()


def release_at_end(graph: torch.cuda.CUDAGraph) -> None:
    """Release a CUDA graph before the process group is destroyed, since NCCL waits for graphs with its kernels."""
    _graphs.add(graph)


def open_store(ranks: Ranks) -> dist.Store:
    """Wait for the store that all ranks share, and return a new connection to it.

    The store is at MASTER_ADDR, the machine of rank 0. It is hosted by torchrun, or by rank 0 without torchrun.

    Raises:
        UserError: The store cannot be reached.
    """
    try:
        store: dist.Store = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=GROUP_TIMEOUT))[0]
    except (ValueError, RuntimeError) as error:
        where = ", ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} found no rank 0 at {where} ({str(error).splitlines()[0]}); "
            "start all ranks together, each with the address of rank 0's machine and a free port there"
        ) from None
    return store


def _launch_store(store: dist.Store) -> dist.Store:
    """Return the part of the store that belongs to this start or restart of the ranks.

    torchrun keeps its store across restarts, including the addresses of ranks that were killed.
    """
    return dist.PrefixStore(os.environ[LAUNCH_ID_VARIABLE], store) if LAUNCH_ID_VARIABLE in os.environ else store


def is_lost_peer(error: BaseException) -> bool:
    """Return True if a collective or the store failed because another rank was lost or did not respond."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_timeout(error: BaseException) -> bool:
    """Return True if an error that satisfies `is_lost_peer` is a timeout."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def data_parallel(
    model: nn.Module, device: torch.device, accumulation_steps: int, bucket_mb: int | None = None
) -> nn.Module:
    """Wrap the model in DistributedDataParallel, unless there is only one rank.

    On a GPU, training steps can be captured if this function and the steps run on the stream of the capture.

    Args:
        model: The model, on its device.
        device: Device of this rank.
        accumulation_steps: Micro-steps per optimizer step.
        bucket_mb: Size of a bucket of gradients, see train.bucket_mb.
    """
    if dist.get_world_size() == 1:
        return model
    parallel = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accumulation_steps == 1,
        bucket_cap_mb=bucket_mb,
    )
    # By default, DDP waits for the device in every hundredth step to measure the step. A capture does not allow it.
    parallel._set_ddp_runtime_logging_sample_rate(NEVER)
    # Running statistics are broadcast once before each evaluation instead, see `collectives.broadcast_buffers`. The
    # name of the constructor's argument depends on the torch version.
    parallel.broadcast_buffers = False
    return parallel


def get_world_size() -> int:
    return dist.get_world_size()


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def is_data_parallel(model: nn.Module) -> bool:
    """Return True if `data_parallel` wrapped the model."""
    return hasattr(model, "no_sync")


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes do not reduce gradients. Use it for all micro-steps except the last."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()  # a compiled model forwards the attribute
