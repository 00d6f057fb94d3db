"""Trace a forward pass to count the parameters, FLOPs and saved bytes of each module call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

LOSS = "loss"  # name of the layer for operations outside the network


@dataclass
class Layer:
    """Costs of one call of a module for the whole batch, excluding the modules that it calls."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    parameters: int = 0  # counted in the first call of the first module that has them
    flops: int = 0
    saved_bytes: int = 0  # saved for the backward pass; a shared storage is counted once, in the first layer


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the total size of the tensors' storages in bytes. A shared storage is counted once."""
    return sum({_storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class WeightCasts(TorchDispatchMode):
    """Records the copies of weights that autocast makes. The backward pass needs them, but they are not activations."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._parameters = {_storage_id(parameter) for parameter in network.parameters()}
        self._copies: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage_id(args[0]) in self._parameters:
            self._copies[_storage_id(result)] = result  # a reference keeps the storage id from being reused
        return result

    def __contains__(self, storage_id: int) -> bool:
        return storage_id in self._copies

    @property
    def bytes(self) -> int:
        return storage_bytes(list(self._copies.values()))


@dataclass
class ForwardTracer:
    """Attributes the FLOPs and saved storages of a forward pass to the innermost running module call."""

    counter: FlopCounterMode
    casts: WeightCasts
    weights: list[Tensor]
    layers: list[Layer] = field(default_factory=list)
    counted: set[nn.Parameter] = field(default_factory=set)
    _stack: list[Layer] = field(default_factory=list)  # running calls, innermost last
    _seen_flops: int = 0

    @contextmanager
    def trace(self, network: nn.Module) -> Iterator[None]:
        """Trace the forward pass in this context. Operations outside the network are attributed to the layer `loss`."""
        self._saved: dict[int, Tensor] = {_storage_id(tensor): tensor for tensor in self.weights}
        handles: list[RemovableHandle] = []
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(self._entry_hook(name)))
            handles.append(module.register_forward_hook(self._exit_hook))
        loss = Layer(LOSS, "CrossEntropy", ())
        self._stack = [loss]
        try:
            with saved_tensors_hooks(self._save_hook, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._count_flops()
        self.layers.append(loss)

    def _count_flops(self) -> None:
        """Attribute all FLOPs since the previous call of this method to the innermost running module call."""
        total = self.counter.get_total_flops()
        self._stack[-1].flops += total - self._seen_flops
        self._seen_flops = total

    def _entry_hook(self, name: str) -> Callable[[nn.Module, object], None]:
        def enter(module: nn.Module, _: object) -> None:
            self._count_flops()
            own = [p for p in module.parameters(recurse=False) if p not in self.counted]
            self.counted.update(own)
            self._stack.append(Layer(name, type(module).__name__, parameters=sum(p.numel() for p in own)))

        return enter

    def _exit_hook(self, module: nn.Module, _: object, output: object) -> None:
        self._count_flops()
        layer = self._stack.pop()
        is_leaf = next(module.children(), None) is None
        layer.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
        if is_leaf or layer.parameters or layer.flops or layer.saved_bytes:
            layer.type += "" if is_leaf else ", own operations"
            self.layers.append(layer)

    def _save_hook(self, tensor: Tensor) -> Tensor:
        storage_id = _storage_id(tensor)
        if storage_id not in self._saved and storage_id not in self.casts:
            self._saved[storage_id] = tensor
            self._stack[-1].saved_bytes += tensor.untyped_storage().nbytes()
        return tensor


def uncalled_layers(network: nn.Module, tracer: ForwardTracer) -> Iterator[Layer]:
    """Yield a layer for each module whose parameters were not counted, since the module was never called.

    These parameters are used by another module or not at all.
    """
    for name, module in network.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in tracer.counted]
        tracer.counted.update(own)
        if own:
            yield Layer(name, f"{type(module).__name__}, not called", parameters=sum(p.numel() for p in own))
