"""Reduce and exchange values over all ranks. All ranks must call each function together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from configs.utils.errors import UserError
from train.distributed.process_group import Ranks

Result = TypeVar("Result")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place on every rank, and return it. All ranks must call this function."""
    dist.all_reduce(values)
    return values


def max_over_ranks(values: list[int]) -> list[int]:
    """Return the element-wise maximum of `values` over all ranks. All ranks must call this function.

    Waits for the other ranks, but does not synchronize the device.
    """
    numbers = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers]


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Copy all buffers, such as batch-norm statistics, from rank 0 to all ranks in one broadcast.

    All ranks must call this function.
    """
    # Sorted by descending element size, so that each part of the flat tensor is aligned for its dtype.
    buffers = sorted(model.buffers(), key=lambda buffer: -buffer.element_size())
    if dist.get_world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
    dist.broadcast(flat, 0)
    parts = flat.split([buffer.nbytes for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view(buffer.dtype).view(buffer.shape))


def from_first_rank(compute: Callable[[], Result]) -> Result:
    """Call `compute` on rank 0 and return its result on every rank. All ranks must call this function.

    Raises:
        UserError: `compute` raised a UserError. Every rank raises it with the same message. Other exceptions are
            raised only on rank 0.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise UserError(box[1])
    result: Result = box[0]
    return result


def from_all_ranks(value: str) -> list[str]:
    """Return the values passed by all ranks, in rank order. All ranks must call this function."""
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def count_machines(ranks: Ranks) -> int:
    """Return the number of machines, or 1 if they do not have equally many consecutive ranks.

    All ranks must call this function, and get the same result.
    """
    local = ranks.local_world_size
    found = from_all_ranks(f"{ranks.local_rank} of {local}")
    is_even = local > 0 and found == [f"{rank % local} of {local}" for rank in range(len(found))]
    return len(found) // local if is_even and len(found) % local == 0 else 1
