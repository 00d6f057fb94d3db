"""Count the parameters, FLOPs and memory of a training step.

Costs are counted on fake tensors, which have shapes and strides but no memory, so any batch size works on any machine.
Memory can also be measured on a GPU. A multiply-add in convolutions, matrix products and attention counts as 2 FLOPs,
as in torch.utils.flop_counter. Pooling, norms and activations are left out.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import TrainConfig
from tools.common.forward_tracer import ForwardTracer, Layer, WeightCasts, storage_bytes, uncalled_layers
from train.engine.execution import build_plan
from train.engine.losses import build_loss
from train.engine.state import build_state
from train.engine.step import run_step
from train.engine.warm_up import blank_batch
from train.optim.averaging import build_ema, build_lookahead
from train.optim.factory import build_optimizer
from train.optim.freeze import set_training_mode

MEASURED_STEPS = 2


@dataclass(frozen=True)
class Costs:
    """Counted costs of one training step on a whole batch."""

    parameters: int
    trainable: int
    forward_flops: int
    training_flops: int  # forward and backward
    weight_bytes: int  # parameters, buffers, and autocast's copies of weights
    gradient_bytes: int
    optimizer_bytes: int  # includes the weights that Lookahead and the moving average keep
    activation_bytes: int  # saved for the backward pass by the forward pass and the loss
    layers: tuple[Layer, ...]

    @property
    def memory_bytes(self) -> int:
        """Upper bound on the training memory in bytes, apart from temporary buffers.

        The actual peak is lower, since activations are released while gradients are allocated.
        """
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def count_costs(
    network: nn.Module,
    config: TrainConfig,
    batch_size: int,
    image_size: int,
    *,
    device: torch.device,
    amp: torch.dtype | None,
) -> Costs:
    """Count the costs of a training step without running it. The train.proxy network is not included.

    Args:
        network: Network that takes uint8 images, on `device` and in the memory format used for training. Not modified.
        config: Config section `train`, which selects the optimizer, loss, Lookahead and moving average.
        batch_size: Samples per step.
        image_size: Height and width of the images in pixels.
        device: Device of the network. Its autocast rules apply.
        amp: Dtype of autocast, or None if autocast is off.

    Raises:
        UserError: The optimizer cannot be built with these settings.
        Exception: The forward pass or the optimizer depends on tensor values. torch raises one of several exceptions.
    """
    with FakeCopyMode(mode := FakeTensorMode()):
        network = copy.deepcopy(network)
    set_training_mode(network)
    tensors = [*network.parameters(), *network.buffers()]
    weight_bytes = storage_bytes(tensors)
    with mode:
        batch = blank_batch(batch_size, image_size, device)
        optimizer = build_optimizer(network, config.optimizer, config.lr)
        lookahead = build_lookahead(network, config.lookahead)
        casts = WeightCasts(network)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward_flops})
        tracer = ForwardTracer(counter, casts, tensors)
        with counter, casts:
            with tracer.trace(network), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                loss, _ = build_loss(config, mixes=False)(network, batch, config.label_smoothing)
            forward_flops = counter.get_total_flops()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    state += lookahead.slow.values() if lookahead is not None else []
    layers = (*tracer.layers, *uncalled_layers(network, tracer))
    return Costs(
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        forward_flops=forward_flops,
        training_flops=counter.get_total_flops(),
        weight_bytes=weight_bytes + casts.bytes,
        gradient_bytes=storage_bytes([p.grad for p in network.parameters() if p.grad is not None]),
        optimizer_bytes=storage_bytes(state) + (weight_bytes if config.ema.decay is not None else 0),
        activation_bytes=sum(layer.saved_bytes for layer in layers),
        layers=layers,
    )


def measure_memory(
    network: nn.Module, config: TrainConfig, batch_size: int, image_size: int, *, device: torch.device
) -> int:
    """Train `network` for a few steps on a GPU, and return the peak allocated memory in bytes.

    The steps are not compiled, so that the result is comparable with `count_costs`. The peak covers MEASURED_STEPS
    steps after one warm-up step, in which cuDNN tries its algorithms. The peak includes all other tensors on the
    device, so call `free_device_memory` first.
    """
    eager = config.model_copy(update={"compile": "off", "cuda_graph": "off"})
    training = build_state(
        network, build_optimizer(network, eager.optimizer, eager.lr), eager, build_plan(eager, device)
    )
    training.lookahead = build_lookahead(network, eager.lookahead)
    training.ema = build_ema(network, eager.ema)
    set_training_mode(training.forward)
    batch = blank_batch(batch_size, image_size, device)
    for number in range(1 + MEASURED_STEPS):
        if number == 1:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        run_step(training, batch, number, optimizer_step=True)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def free_device_memory() -> None:
    """Release the GPU memory of deleted models, including those in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def _backward_flops(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *arguments: Any, **_: object
) -> int:
    """Return the FLOPs of a convolution's backward pass.

    Each required gradient, of the input or of the weight, costs as much as the forward pass. This formula replaces
    torch's, which ignores groups.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = arguments[:8]
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * x_shape[0] * positions * math.prod(w_shape) * sum(wanted[:2])
