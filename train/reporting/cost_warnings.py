"""Warn about models that need far more arithmetic than the standard model of their name, or too much memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from configs.schema import ModelConfig
from train.engine.metrics import GIB
from train.engine.state import TrainState
from train.engine.warm_up import blank_batch

STANDARD_SIZE = 224
# Billions of multiply-adds per image of 224 pixels of torchvision's models.
STANDARD_GMACS = {
    "alexnet": 0.71, "resnet18": 1.81, "resnet34": 3.66, "resnet50": 4.09, "resnet101": 7.80, "resnet152": 11.51,
}  # fmt: skip
MAX_RATIO = 20
# ResNet-152 with the homework's stem saves 54 kB per pixel for its backward pass, the most of the built-in models.
MAX_BYTES_PER_PIXEL = 2**16


def cost_warnings(
    model: ModelConfig, state: TrainState, shapes: Sequence[tuple[int, int]], processes: int
) -> list[str]:
    """Return warnings about the arithmetic and the memory of a training step, usually none.

    Args:
        model: Config section `model`.
        state: Training state. The network is left in evaluation mode.
        shapes: Batch size per rank and image size in pixels of each stage.
        processes: Number of ranks on this machine.
    """
    samples, image_size = max(shapes, key=lambda shape: shape[0] * shape[1] ** 2)
    available = device_memory(state.device, processes)
    if image_size <= STANDARD_SIZE and samples * image_size**2 * MAX_BYTES_PER_PIXEL < available:
        return []  # small, so that a short run starts without delay
    gmacs, saved_bytes = count_image(state, image_size)
    is_resnet = model.name.startswith("resnet") and model.options.get("stem", "homework") == "homework"
    stem = "model.options.stem=imagenet, " if is_resnet else ""
    warnings = []
    standard = STANDARD_GMACS.get(model.name.removeprefix("timm/").split(".")[0])
    if standard is not None and gmacs > MAX_RATIO * standard:
        warnings.append(
            f"{model.name} needs {gmacs:.1f} GMACs (billions of multiply-adds) per image of {image_size} pixels, "
            f"{gmacs / standard:.0f} times the {standard} of the standard model at {STANDARD_SIZE} pixels; use {stem}"
            "smaller images (data.image_size) or a narrower model"
        )
    needed = samples * saved_bytes + sum(parameter.nbytes for parameter in state.network.parameters())
    if needed > available:
        place = "GPU" if state.device.type == "cuda" else "machine"
        share = f", shared by {processes} processes" if place == "machine" and processes > 1 else ""
        warnings.append(
            f"a step on {samples} images of {image_size} pixels needs about {needed / GIB:,.0f} GiB of memory, but the "
            f"{place} has {available / GIB:,.0f} GiB{share}; use {stem}a smaller data.batch_size (with more "
            "train.accumulation_steps) or smaller images (data.image_size)"
        )
    return warnings


def device_memory(device: torch.device, processes: int) -> float:
    """Return the memory of the GPU in bytes, or the share of the machine's memory of one of its `processes`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


def count_image(state: TrainState, image_size: int) -> tuple[float, int]:
    """Return the GMACs of convolutions and linear layers, and the bytes saved for the backward pass, per image.

    Forward passes of one and two images are run. Their difference excludes what is saved once per batch, such as
    weights and their copies under autocast. The meta device would need no arithmetic, but its import takes seconds.
    """
    network = state.network.eval()
    saved: dict[int, Tensor] = {}
    macs = 0

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # a reference keeps the address from being reused
        return tensor

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, Tensor)
        macs += output.numel() * module.weight[0].numel()

    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    counts = []
    try:
        for samples in (1, 2):
            saved, macs = {}, 0
            images = blank_batch(samples, image_size, state.device).images
            with saved_tensors_hooks(save, lambda tensor: tensor), state.plan.autocast():
                network(images)
            counts.append((macs, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())))
    finally:
        for handle in handles:
            handle.remove()
    (one_macs, one_bytes), (two_macs, two_bytes) = counts
    return (two_macs - one_macs) / 1e9, two_bytes - one_bytes
