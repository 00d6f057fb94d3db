"""Resolve train.amp and train.cuda_graph for a device."""

from __future__ import annotations

import torch

from configs.schema import TrainConfig
from configs.utils.errors import UserError
from train.distributed.process_group import get_world_size
from train.optim.factory import capture_obstacle, is_fused

GPU_COMPILE_MODE = "default"  # train.compile=auto on a GPU; the CPU runs uncompiled
MAX_COMPILED_MODELS = 64  # models compiled in one process, for benchmarks; torch's default is 8


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for a value of train.amp on this device, or None for float32."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def uses_cuda_graph(config: TrainConfig, device: torch.device, amp: torch.dtype | None) -> bool:
    """Return True if training steps are replayed as CUDA graphs.

    Args:
        config: Config section `train`.
        device: Device of the model.
        amp: Autocast dtype returned by `amp_dtype`.

    Raises:
        UserError: train.cuda_graph is "on", but CUDA graphs cannot be used. The message gives the reasons.
    """
    obstacles = {
        f"the device is a {device.type}": device.type != "cuda",
        f"there are {get_world_size()} ranks": get_world_size() > 1,
        "fp16 checks gradients on the host before every step": amp == torch.float16,
        "compile=reduce-overhead captures its own graphs": config.compile == "reduce-overhead",
        f"on_nonfinite=skip checks the gradients of {config.optimizer.name} on the host before every step": (
            config.on_nonfinite == "skip" and not is_fused(config.optimizer)
        ),
    }
    if (obstacle := capture_obstacle(config.optimizer)) is not None:
        obstacles[obstacle] = True
    reasons = [reason for reason, holds in obstacles.items() if holds]
    if config.cuda_graph == "on" and reasons:
        raise UserError(
            f"train.cuda_graph=on is not possible, since {' and '.join(reasons)}; "
            "use auto or off, or one GPU without fp16 and without compile=reduce-overhead"
        )
    return config.cuda_graph != "off" and not reasons
