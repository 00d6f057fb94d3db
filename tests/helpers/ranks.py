"""Run groups of processes that end like those of train/ddp.py, and collect their exit codes and output."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.training import free_port
from train.distributed.launcher import run_distributed
from train.distributed.process_group import Ranks

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["helpers.training", "pipelines.build", "torch._dynamo"]
)  # same as in on_ranks, to share one server


@dataclass(frozen=True)
class Ended:
    codes: list[int]  # exit code of each rank; -9: killed
    printed: str

    @property
    def lines(self) -> list[str]:
        return self.printed.splitlines()


def end_of(
    world_size: int,
    main: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    stopped: int = -1,
    timeout_s: float = 60,
) -> Ended:
    """Call run_distributed(main) on each rank without torchrun; it calls main(ranks, *arguments).

    Fails if a rank hangs, except for a rank that stops itself, which is killed at the end.
    """
    printed = folder / "printed"
    port = free_port()
    processes = [
        FORKED.Process(target=_member, args=(Ranks(rank, rank, world_size, world_size), port, printed, main, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        waited_for = {rank: process for rank, process in enumerate(processes) if rank != stopped}
        for process in waited_for.values():
            process.join(timeout_s)
        hanging = [rank for rank, process in waited_for.items() if process.is_alive()]
        assert not hanging, f"ranks {hanging} hang; printed so far: {printed.read_text()}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended([process.exitcode for process in processes], printed.read_text())


def _member(ranks: Ranks, port: int, printed: Path, main: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    names = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size,
             "LOCAL_WORLD_SIZE": ranks.local_world_size, "MASTER_PORT": port}  # fmt: skip
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = printed.open("a")
    run_distributed(lambda: main(ranks, *arguments))
