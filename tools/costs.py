"""What one training step of a model costs: parameters, FLOPs, memory. Knows tensors, not configs' files or tables.

Counted on fake tensors, which have shapes and strides but no memory, so that any batch size can be asked for on any
machine; measured on a GPU. FLOPs are 2 per multiply-add and those of convolutions, matrix products and attention, as
torch.utils.flop_counter counts them: pooling, norms and activations are left out.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from configs.schema import TrainConfig
from train.lookahead import build_lookahead
from train.loop import build_training, loss_and_counts, run_step
from train.optim import build_optimizer
from train.warm_up import blank_batch

MEASURED_STEPS = 2
LOSS = "loss"


@dataclass
class Layer:
    """One call of a module: what it does itself, without the modules that it calls; of the whole batch."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    parameters: int = 0  # at the first call only, and of shared ones where they are met first
    flops: int = 0
    saved_bytes: int = 0  # kept for the backward pass, and by no earlier layer


@dataclass(frozen=True)
class Costs:
    """Sums over `layers` where those have the quantity; FLOPs and bytes of a step with the whole batch."""

    parameters: int
    trainable: int
    forward_flops: int
    training_flops: int  # forward and backward
    weight_bytes: int  # parameters, buffers, and the copies of weights that autocast makes for the step
    gradient_bytes: int
    optimizer_bytes: int  # with Lookahead's slow copy
    activation_bytes: int  # what the forward pass, loss included, keeps for the backward pass
    layers: tuple[Layer, ...]

    @property
    def memory_bytes(self) -> int:
        """All kinds at once. No more is held at a time, but for temporary buffers: gradients come as activations go."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def count_costs(
    network: nn.Module,
    config: TrainConfig,
    *,
    batch_size: int,
    image_size: int,
    device: torch.device,
    amp: torch.dtype | None,
) -> Costs:
    """Of a training step of `network`, which takes uint8 and lies on `device` in its memory format. Computes nothing.

    The proxy of train.proxy is not counted. What torch raises for a model that looks at values comes through.
    """
    with FakeCopyMode(mode := FakeTensorMode()):
        network = copy.deepcopy(network).train()
    tensors = [*network.parameters(), *network.buffers()]
    weight_bytes = bytes_of(tensors)
    with mode:
        batch = blank_batch(batch_size, image_size, device)
        optimizer = build_optimizer(network, config.optimizer, config.lr)
        lookahead = build_lookahead(network, config.lookahead)
        casts = _WeightCasts(network)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward_flops})
        tracer = _Tracer(counter, casts, tensors)
        with counter, casts:
            with tracer.watch(network), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                loss, _ = loss_and_counts(network, batch, config.label_smoothing)
            forward_flops = counter.get_total_flops()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        slow = list(lookahead.slow.values()) if lookahead is not None else []
    layers = (*tracer.layers, *_not_called(network, tracer))
    return Costs(
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        forward_flops=forward_flops,
        training_flops=counter.get_total_flops(),
        weight_bytes=weight_bytes + casts.bytes,
        gradient_bytes=bytes_of([p.grad for p in network.parameters() if p.grad is not None]),
        optimizer_bytes=bytes_of(state + slow),
        activation_bytes=sum(layer.saved_bytes for layer in layers),
        layers=layers,
    )


def measure_memory(
    network: nn.Module, config: TrainConfig, *, batch_size: int, image_size: int, device: torch.device
) -> int:
    """Most bytes that were allocated on the GPU at a time during real training steps of `network`, which lies there.

    Uncompiled, so that it can be compared with what is counted. The first step, in which cuDNN tries its algorithms, is
    not looked at. Everything else on the device counts as well: `free_device_memory` before.
    """
    eager = config.model_copy(update={"compile": "off", "cuda_graph": "off"})
    training = build_training(network, build_optimizer(network, eager.optimizer, eager.lr), eager, device)
    training.lookahead = build_lookahead(network, eager.lookahead)
    training.forward.train()
    batch = blank_batch(batch_size, image_size, device)
    for number in range(1 + MEASURED_STEPS):
        if number == 1:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        run_step(training, batch, number, updates=True)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def free_device_memory() -> None:
    """Give back what dead models held, cycles included."""
    gc.collect()
    torch.cuda.empty_cache()


def bytes_of(tensors: list[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({_identity(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _backward_flops(grad_shape: Any, x_shape: Any, w_shape: Any, *arguments: Any, **_: Any) -> int:
    """Of a convolution's backward pass: as many as forward for each gradient, also with groups, which torch's own
    formula counts as one."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = arguments[:8]
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    forward = 2 * int(x_shape[0]) * positions * math.prod(w_shape)
    return forward * sum(wanted[:2])


class _WeightCasts(TorchDispatchMode):
    """Notes the copies of weights in autocast's type: they are kept for the backward pass, but are no activations."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._parameters = {_identity(parameter) for parameter in network.parameters()}
        self._copies: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _identity(args[0]) in self._parameters:
            self._copies[_identity(result)] = result  # kept, so that no other storage gets its identity
        return result

    def __contains__(self, identity: int) -> bool:
        return identity in self._copies

    @property
    def bytes(self) -> int:
        return bytes_of(list(self._copies.values()))


@dataclass
class _Tracer:
    """Follows a forward pass: which call is running, so that each FLOP and each kept storage has one owner."""

    counter: FlopCounterMode
    casts: _WeightCasts
    weights: list[Tensor]
    layers: list[Layer] = field(default_factory=list)
    counted: set[nn.Parameter] = field(default_factory=set)
    _stack: list[Layer] = field(default_factory=list)
    _seen_flops: int = 0

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[None]:
        """Everything inside is traced; what happens outside of the network is the row `loss`."""
        self._kept: dict[int, Tensor] = {_identity(tensor): tensor for tensor in self.weights}
        handles: list[RemovableHandle] = []
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leaving))
        loss = Layer(LOSS, "CrossEntropy", ())
        self._stack = [loss]
        try:
            with saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._settle()
        self.layers.append(loss)

    def _settle(self) -> None:
        """Book the FLOPs since the last change of the running call to it."""
        total = self.counter.get_total_flops()
        self._stack[-1].flops += total - self._seen_flops
        self._seen_flops = total

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, _: Any) -> None:
            self._settle()
            own = [p for p in module.parameters(recurse=False) if p not in self.counted]
            self.counted.update(own)
            self._stack.append(Layer(name, type(module).__name__, parameters=sum(p.numel() for p in own)))

        return enter

    def _leaving(self, module: nn.Module, _: Any, output: Any) -> None:
        self._settle()
        layer = self._stack.pop()
        is_leaf = next(module.children(), None) is None
        layer.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
        if is_leaf or layer.parameters or layer.flops or layer.saved_bytes:
            layer.type += "" if is_leaf else ", own operations"
            self.layers.append(layer)

    def _keep(self, tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in self._kept and identity not in self.casts:
            self._kept[identity] = tensor
            self._stack[-1].saved_bytes += tensor.untyped_storage().nbytes()
        return tensor


def _not_called(network: nn.Module, tracer: _Tracer) -> Iterator[Layer]:
    """Parameters whose module was not called: used by another module, or not at all."""
    for name, module in network.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in tracer.counted]
        tracer.counted.update(own)
        if own:
            yield Layer(name, f"{type(module).__name__}, not called", parameters=sum(p.numel() for p in own))
