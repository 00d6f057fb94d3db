"""Process group, rank, reductions: the only file that knows torch.distributed.

There is always a process group, also for one process without torchrun, so that nothing branches on the world size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.utils.errors import UserError

# How long a rank waits for another one that neither joins nor fails: a stopped process, a machine that hangs. All ranks
# compile and tune at the same time, so that even minutes of that are hardly waited for.
GROUP_TIMEOUT = timedelta(minutes=10)
LAUNCH_ID_VARIABLE = "ZHU_START"  # in the environment: see `train.distributed.failure_channel`


@dataclass(frozen=True)
class Ranks:
    """Who this process is, from the environment that torchrun sets, or whoever starts the ranks; alone without it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing and os.environ.get("WORLD_SIZE", "1") != "1":  # alone, each rank would train a model of its own
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {' and '.join(missing)}; start with "
                f"torchrun, or set {', '.join(names)}, MASTER_ADDR and MASTER_PORT"
            )
        return cls() if missing else cls(*(int(os.environ[name]) for name in names))

    @classmethod
    def alone(cls, tool: str) -> Ranks:
        """For a tool that is one process; raises UserError under torchrun with several."""
        if cls.from_environment().world_size > 1:
            raise UserError(f"{tool} is one process; start it with python instead of torchrun")
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(ranks: Ranks) -> Iterator[torch.device]:
    """Set up the group for the lifetime of the context; gives this rank's device."""
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
    store = dist.HashStore() if ranks.world_size == 1 else _launch_store(open_store(ranks)[0])
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=GROUP_TIMEOUT)
    is_broken = False
    try:
        yield device
    except Exception:
        is_broken = ranks.world_size > 1
        raise
    finally:
        if not is_broken:  # it could wait for ever for ranks that are gone; the process ends anyhow
            dist.destroy_process_group()


def open_store(ranks: Ranks) -> tuple[dist.Store, str]:
    """A connection of its own to what all ranks can read and write, which torchrun keeps, or else the first rank; and
    the address of the machine that it lies on, as the first rank does. Waits for it."""
    try:
        store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=GROUP_TIMEOUT))
    except (ValueError, RuntimeError) as error:
        where = ", ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} found no rank 0 at {where} ({str(error).splitlines()[0]}); "
            "start all ranks together and give each the name of rank 0's machine and a port that is free there"
        ) from None
    return store, os.environ["MASTER_ADDR"]


def _launch_store(store: dist.Store) -> dist.Store:
    """The part of it that belongs to this start: torchrun keeps the addresses of ranks that were killed before."""
    return dist.PrefixStore(os.environ[LAUNCH_ID_VARIABLE], store) if LAUNCH_ID_VARIABLE in os.environ else store


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is how a collective or the store fails when another rank is gone or silent."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_timeout(error: BaseException) -> bool:
    """Of those: whether it is silent."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def data_parallel(model: nn.Module, device: torch.device, accumulation_steps: int) -> nn.Module:
    """The model with gradients averaged over ranks during backward; with one rank there is nothing to average."""
    if dist.get_world_size() == 1:
        return model
    parallel = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accumulation_steps == 1,
    )
    # Running statistics are made equal once before each evaluation instead. Set here, since the argument's name depends
    # on the version of torch.
    parallel.broadcast_buffers = False
    return parallel


def get_world_size() -> int:
    return dist.get_world_size()


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def is_data_parallel(model: nn.Module) -> bool:
    """Whether `data_parallel` wrapped the model."""
    return hasattr(model, "no_sync")


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside leave gradients on their rank: all but the last of an accumulated step."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()  # also of a compiled model, which passes the attributes of what it wraps on
