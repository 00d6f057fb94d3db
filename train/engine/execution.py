"""Decide how the steps of a network run on a device: precision, compilation and CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from configs.schema import TrainConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from models.cpu.compilation import keep_compiled_code
from models.cpu.precision import slow_precision_reason
from train.distributed.process_group import get_world_size
from train.engine.cpu_settings import keep_freed_memory
from train.optim.factory import capture_obstacle, is_fused

AUTO_COMPILE_MODE = "default"  # train.compile=auto on a GPU, and on a CPU if it saves time
MAX_COMPILED_MODELS = 64  # models compiled in one process, for benchmarks; torch's default is 8

Compiled = TypeVar("Compiled")


@dataclass(frozen=True)
class ExecutionPlan:
    """How the steps of a network run. Checkpoints do not depend on it, except for rounding."""

    device: torch.device
    trains: bool  # whether backward passes are run
    mixes: bool  # whether batches are MixedBatch
    amp: torch.dtype | None  # dtype of autocast, or None for float32
    compile_mode: str  # mode of torch.compile, or "off"
    compiles_optionally: bool  # to save time on a CPU: the training step only, and only if that succeeds
    needs_warmup: bool  # whether to compile, tune or capture the step before training
    uses_cuda_graph: bool  # whether the step is replayed as CUDA graphs
    static_grads: bool  # whether gradients keep their storage, since the graphs of all micro-steps share it
    capture_stream: torch.cuda.Stream | None = None  # on which steps are captured, and run before the capture
    note: str | None = None  # for the log: why a GPU does not replay CUDA graphs

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def compiled(self, function: Compiled) -> Compiled:
        """Compile a function or module as planned, or return it unchanged."""
        if self.compile_mode == "off":
            return function
        # Compile kernels for each shape, since there are few shapes and dynamic kernels are slower.
        compile_module: Any = torch.compile  # typed for functions only
        compiled: Compiled = compile_module(function, mode=self.compile_mode, dynamic=False)
        return compiled

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Make `capture_stream` current inside the context, since the default stream cannot be captured.

        No-op without CUDA graphs. DDP and the steps before a capture must run on the stream of the capture: libraries
        keep handles and workspaces per stream, and autograd accumulates gradients on the stream on which DDP was built.
        """
        if (stream := self.capture_stream) is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


def build_plan(
    config: TrainConfig,
    device: torch.device,
    *,
    mixes: bool = False,
    trains: bool = True,
    compiles_on_cpu: bool = False,
) -> ExecutionPlan:
    """Decide how the steps of a network run on a device, and set the process-wide options for it.

    Warn if autocast is slower than float32 on this CPU.

    Args:
        config: Config section `train`.
        device: Device of the network.
        mixes: Whether batches use mixup or CutMix.
        trains: Whether backward passes will be run.
        compiles_on_cpu: Whether train.compile=auto compiles the training step on a CPU.

    Raises:
        UserError: train.cuda_graph is "on", but CUDA graphs cannot be used.
    """
    on_gpu, amp = device.type == "cuda", amp_dtype(config.amp, device)
    captures, note = uses_cuda_graph(config, device, amp), None
    if on_gpu and trains and config.cuda_graph == "auto" and not captures:
        reasons = " and ".join(graph_obstacles(config, device, amp))
        note = f"training steps are not replayed as CUDA graphs, since {reasons}"
    mode: str = config.compile
    if mode == "auto":
        mode = AUTO_COMPILE_MODE if on_gpu or compiles_on_cpu else "off"
    elif mode == "max-autotune" and captures:
        mode = "max-autotune-no-cudagraphs"  # graphs cannot be nested
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # shapes are static, so the fastest convolution is searched once
        torch.set_float32_matmul_precision("high")  # TF32 for operations that autocast leaves in float32
    else:
        keep_freed_memory()
        if (reason := slow_precision_reason(amp, trains)) is not None:
            warn(
                f"train.amp={config.amp} takes 2 to 1,000 times as long as float32 here, since {reason}; "
                "use train.amp=auto"
            )
    if mode != "off":
        keep_compiled_code()
        torch._dynamo.config.recompile_limit = MAX_COMPILED_MODELS
        # As in pipelines.gpu.triton_ops. Compile workers inherit the variable.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return ExecutionPlan(
        device=device,
        trains=trains,
        mixes=mixes,
        amp=amp,
        compile_mode=mode,
        compiles_optionally=config.compile == "auto" and mode != "off" and not on_gpu,
        needs_warmup=on_gpu or mode != "off",
        uses_cuda_graph=captures,
        static_grads=captures and config.accumulation_steps > 1,
        capture_stream=torch.cuda.Stream(device) if captures and on_gpu else None,
        note=note,
    )


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
    reasons = graph_obstacles(config, device, amp)
    if config.cuda_graph == "on" and reasons:
        raise UserError(
            f"train.cuda_graph=on is not possible, since {' and '.join(reasons)}; "
            "use auto or off, or a GPU without fp16 and without compile=reduce-overhead"
        )
    return config.cuda_graph != "off" and not reasons


def graph_obstacles(config: TrainConfig, device: torch.device, amp: torch.dtype | None) -> list[str]:
    """Return the reasons against replaying training steps as CUDA graphs. See `uses_cuda_graph` for the arguments."""
    ranks = get_world_size()
    obstacles = {
        f"the device is a {device.type}": device.type != "cuda",
        f"there are {ranks} ranks, for which only train.cuda_graph=on uses graphs": ranks > 1
        and config.cuda_graph != "on",
        "fp16 checks gradients on the host before every step": amp == torch.float16,
        "compile=reduce-overhead captures its own graphs": config.compile == "reduce-overhead",
        f"on_nonfinite=skip checks the gradients of {config.optimizer.name} on the host before every step": (
            config.on_nonfinite == "skip" and not is_fused(config.optimizer)
        ),
    }
    if (obstacle := capture_obstacle(config.optimizer)) is not None:
        obstacles[obstacle] = True
    return [reason for reason, holds in obstacles.items() if holds]
