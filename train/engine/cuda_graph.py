"""A training step captured as CUDA graphs.

A graph contains the forward and backward pass of a micro-step, the metric sums and, in the last micro-step, the weight
update. Graphs read their inputs from static buffers. The host launches one graph per micro-step instead of hundreds of
kernels.
"""

from __future__ import annotations

import torch

from configs.utils.errors import UserError
from pipelines.loader.batches import Batch, MixedBatch
from train.distributed.process_group import is_data_parallel, release_at_end
from train.engine.state import TrainState
from train.engine.step import train_step


class CapturedStep:
    """`train_step` as CUDA graphs, for batches of a few shapes. A replay does not synchronize.

    Before each replay, torch copies the seed and offset of the default generator to the device, so seeding the
    generator before a step takes effect in the replay.
    """

    def __init__(self, state: TrainState, batches: list[Batch], optimizer_steps: list[bool]) -> None:
        """Capture a graph for each shape and each kind of micro-step.

        Args:
            state: Training state.
            batches: One batch of each shape. The batches become the input buffers of the graphs.
            optimizer_steps: Kinds of micro-steps to capture: True for micro-steps that update the weights, False for
                micro-steps that do not.

        Raises:
            UserError: The step cannot be captured.
        """
        self._batches = {batch.images.shape: batch for batch in batches}
        kinds = [(shape, optimizer_step) for shape in self._batches for optimizer_step in optimizer_steps]
        self._graphs = {kind: torch.cuda.CUDAGraph() for kind in kinds}
        pool = torch.cuda.graph_pool_handle()  # shared, since no graph reads another's results
        try:
            for (shape, optimizer_step), graph in self._graphs.items():
                # thread_local, so that calls in loader and NCCL threads do not invalidate the capture
                stream, mode = state.plan.capture_stream, "thread_local"
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                    train_step(state, self._batches[shape], optimizer_step=optimizer_step)
                if is_data_parallel(state.forward):
                    release_at_end(graph)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"this model's training step cannot be captured as a CUDA graph ({reason}); set train.cuda_graph=off"
            ) from error

    def __call__(self, state: TrainState, batch: Batch, *, optimizer_step: bool = True) -> None:
        del state  # the graphs hold its tensors
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
