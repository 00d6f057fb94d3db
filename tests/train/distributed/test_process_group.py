"""Data parallelism and the end of the process group."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.training import CPU, alone
from train.distributed import process_group

MIB_WEIGHTS = 2**18  # float32 weights of one MiB


def trained(steps: int, bucket_mb: int | None = None) -> nn.Module:
    """Return a model of four weights of one MiB each in DDP, after `steps` steps."""
    layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    with mock.patch.object(dist, "get_world_size", return_value=2):  # DDP itself reads the size of its process group
        model = process_group.data_parallel(layers, CPU, 1, bucket_mb)
    for _ in range(steps):
        model(torch.zeros(1, 512)).sum().backward()
        model.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize(("bucket_mb", "mebibytes"), [(None, [1, 3]), (2, [2, 2]), (100, [4])])
def test_gradients_are_summed_in_buckets_of_the_chosen_size(bucket_mb: int | None, mebibytes: list[int]) -> None:
    with alone():
        sizes = trained(4, bucket_mb)._get_ddp_logging_data()["rebuilt_bucket_sizes"]  # type: ignore[operator]
    assert [int(size) for size in sizes.split(", ")] == [4 * MIB_WEIGHTS * number for number in mebibytes]


def test_ddp_measures_no_step_after_its_first_ten() -> None:
    with alone():
        assert trained(101)._get_ddp_logging_data()["iteration"] == 10  # type: ignore[operator]


def test_graphs_are_released_before_the_process_group_is_destroyed() -> None:
    class Graph:
        def reset(self) -> None:
            assert dist.is_initialized()
            released.append(self)

    released: list[Graph] = []
    graph = Graph()
    with alone():
        process_group.release_at_end(graph)  # type: ignore[arg-type]
    assert released == [graph]
    assert not dist.is_initialized()
