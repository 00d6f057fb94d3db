"""Work around 1x1 convolutions whose backward pass in oneDNN writes past the end of its workspace.

For the weight gradient of a strided 1x1 convolution, oneDNN copies the selected positions of the channels_last input
into a workspace of positions * in_channels values. However, it steps through the workspace in units of positions *
block, where `block` is the number of channels that fit into a vector register. If there are fewer input channels than
`block`, oneDNN writes past the end of the workspace. The process then crashes, hangs in an overwritten barrier, or
continues with wrong gradients. The bug (https://github.com/uxlfoundation/oneDNN/issues/6035) is present in the oneDNN
version of torch 2.15.

Without padding, a 1x1 convolution with stride s equals the same convolution with stride 1 applied to every s-th
position. With stride 1, oneDNN does not use this workspace.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor, nn

MAX_NAMES_SHOWN = 3  # names of layers in the note


def avoid_narrow_strided_convs(network: nn.Module, channels: int | None = None) -> str | None:
    """Move the stride of a CPU network's affected convolutions to a forward pre-hook.

    Affected layers get stride 1 and a hook that selects the positions. Parameters, names and results stay the same.

    Args:
        network: The network, changed in place.
        channels: Channels per block. If None, `block_channels()` is used.

    Returns:
        A note for the log, or None if no layer is affected.
    """
    channels = block_channels() if channels is None else channels
    convs = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    affected = [(name, module) for name, module in convs if is_affected(module, channels)]
    if not affected:
        return None
    for _, module in affected:
        height, width = module.stride
        module.register_forward_pre_hook(partial(_select_positions, height, width))
        module.stride = (1, 1)
    names = ", ".join([name for name, _ in affected[:MAX_NAMES_SHOWN]] + ["…"] * (len(affected) > MAX_NAMES_SHOWN))
    return (
        f"stride moved out of {len(affected)} of {len(convs)} convolutions ({names}): oneDNN's backward pass of a "
        f"strided 1x1 convolution with fewer than {channels} input channels corrupts memory on this CPU"
    )


def is_affected(module: nn.Module, channels: int) -> bool:
    """Return True if oneDNN's backward pass of this layer may write past the end of its workspace.

    `channels` is the number of channels per block, see `block_channels`. Batch size, bias, output channels and image
    size are not considered, since they only affect which memory is overwritten. The memory format is not considered
    either, since training batches are channels_last.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.in_channels < channels
    )


def block_channels() -> int:
    """Return the channels per block of the affected oneDNN kernel on this CPU, or 0 if the kernel is not used.

    The kernel exists for AVX-512 and for AVX2. With AVX or SSE4.1, oneDNN uses other implementations.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    limit, has = isa_limit(), torch.cpu.get_capabilities()
    if limit in ("sse41", "avx"):
        return 0
    if not limit.startswith("avx2") and all(has.get(f"avx512_{part}") for part in ("f", "bw", "vl", "dq")):
        return 16
    return 8 if has.get("avx2") else 0


def isa_limit() -> str:
    """Return the instruction set that the user limits oneDNN to, in lower case, or an empty string without a limit.

    The limit is read from ONEDNN_MAX_CPU_ISA, or from DNNL_MAX_CPU_ISA if that is unset or empty, as in oneDNN. oneDNN
    ignores case and unknown values, and never uses instructions that the CPU lacks. The variables are read directly,
    since torch does not export dnnl_get_effective_cpu_isa, and torch.backends.cpu.get_cpu_capability() follows
    ATEN_CPU_CAPABILITY, which does not limit oneDNN.
    """
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").lower()


def _select_positions(height: int, width: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Select every `height`-th row and every `width`-th column of a module's input. Used as a forward pre-hook."""
    del module
    return inputs[0][..., ::height, ::width]
