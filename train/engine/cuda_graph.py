"""A training step as CUDA graphs: the host launches one thing per step instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.utils.errors import UserError
from pipelines.loader.batches import Batch, MixedBatch
from train.engine.state import TrainState
from train.engine.step import train_step


class CapturedStep:
    """train_step as CUDA graphs, and called like it, for batches of a few shapes. Replaying does not synchronise.

    A replay draws from the device's default generator as it stands then, as uncaptured kernels would: torch copies seed
    and offset to the device before each replay. So seeding it before a step works as it does without graphs.
    """

    def __init__(self, state: TrainState, batches: list[Batch], updates: list[bool], stream: torch.cuda.Stream) -> None:
        """batches: one of each shape; they become the graphs' input buffers."""
        self._batches = {batch.images.shape: batch for batch in batches}
        self._graphs = {(shape, update): torch.cuda.CUDAGraph() for shape in self._batches for update in updates}
        pool = torch.cuda.graph_pool_handle()  # one for all, since no graph leaves a result there for another
        try:
            for (shape, update), graph in self._graphs.items():
                # thread_local: what the loader's and NCCL's threads do meanwhile is no business of this capture
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    train_step(state, self._batches[shape], optimizer_step=update)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"this model's training step cannot be captured as a CUDA graph ({reason}); set train.cuda_graph=off"
            ) from error

    def __call__(self, state: TrainState, batch: Batch, *, optimizer_step: bool = True) -> None:
        del state  # the graphs know it
        shape = batch.images.shape
        buffers = self._batches.get(shape)
        if buffers is None:
            captured = ", ".join(str(tuple(one)) for one in self._batches)
            raise ValueError(f"a batch of shape {tuple(shape)} cannot take part in a step captured for {captured}")
        buffers.images.copy_(batch.images, non_blocking=True)
        buffers.labels.copy_(batch.labels, non_blocking=True)
        if isinstance(buffers, MixedBatch):
            assert isinstance(batch, MixedBatch)
            buffers.mix.copy_(batch.mix, non_blocking=True)
        self._graphs[shape, optimizer_step].replay()


@contextmanager
def side_stream(state: TrainState) -> Iterator[torch.cuda.Stream | None]:
    """A current stream that can be captured, as the default stream cannot; without graphs things stay as they are.

    The passes before a capture must run where it will, since libraries keep handles and workspaces per stream.
    """
    if not state.uses_cuda_graph:
        yield None
        return
    stream, current = torch.cuda.Stream(state.device), torch.cuda.current_stream(state.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield stream
    current.wait_stream(stream)
