"""The step, `train_epoch` and `evaluate`. Batches arrive on the device; nothing here waits for it between log lines."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import TrainConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from models.cpu_precision import slow_precision_reason
from models.onednn import avoid_narrow_strided_convs
from models.speedrun import find_whitening
from pipelines.loader.batches import Batch
from pipelines.loader.train_loader import TrainLoader
from pipelines.rng import hash64, stream
from train.distributed import collectives
from train.distributed.process_group import data_parallel, get_world_size, is_data_parallel, without_reduction
from train.engine.accounting import check_full_coverage
from train.engine.losses import LossAndCounts, build_loss
from train.engine.tta import mean_logits
from train.optim.clipping import clip_gradients, clips_gradients
from train.optim.ema import Ema
from train.optim.factory import capture_obstacle, is_fused, make_capturable, set_learning_rate
from train.optim.freeze import set_training_mode
from train.optim.guard import SkipNonFinite
from train.optim.lookahead import Lookahead
from train.optim.schedule import Timeline, learning_rate, lr_factor, whitening_learning_rate

if TYPE_CHECKING:
    from train.engine.hard_samples import HardSampleSelector

GPU_COMPILE_MODE = "default"  # what train.compile=auto means there; the CPU runs uncompiled
MAX_COMPILED_MODELS = 64  # in one process, as benchmarks have them: torch runs the ninth model of a function uncompiled


@dataclass
class TrainState:
    """What a step changes, and the functions it runs. `network` holds the weights; `forward` and `infer` are it."""

    network: nn.Module
    forward: nn.Module  # data-parallel
    loss_and_counts: LossAndCounts  # of `forward`, compiled
    infer: nn.Module  # for evaluation: compiled, not data-parallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: torch.dtype | None
    config: TrainConfig
    device: torch.device
    sums: torch.Tensor  # float64 [3] on the device: loss * samples, correct, samples since the epoch began
    step: Callable[..., None]  # train_step, or it captured; called like it
    compiled: Callable[[Any], Any]  # compiles a function as the settings say, or gives it back
    needs_warmup: bool  # there is something to compile, tune or capture before the first step
    uses_cuda_graph: bool  # the step shall be replayed as CUDA graphs
    static_grads: bool  # several graphs add to the gradients of one update, and must find them where they lay
    mixes: bool = False  # its batches are a MixedBatch
    guard: SkipNonFinite | None = None  # leaves out updates that are not finite
    lookahead: Lookahead | None = None
    ema: Ema | None = None
    proxy: HardSampleSelector | None = None
    is_fresh_init: bool = True  # weights start as torch drew them, so that a whitening layer is still to be fitted
    notes: tuple[str, ...] = ()  # what the log shall say of how the network was made

    def parts(self) -> list[TrainState]:
        """Return this state and, where there is one, that of the proxy."""
        return [self] if self.proxy is None else [self, self.proxy.state]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def build_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    *,
    mixes: bool = False,
    trains: bool = True,
) -> TrainState:
    """Wrap a network that is on its device (`memory_format` applied) for training.

    mixes: with mixup or CutMix. trains: False where only forward passes are made.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are static: the fastest convolution is looked for once
        torch.set_float32_matmul_precision("high")  # TF32, for what autocast leaves in float32
    else:
        keep_freed_memory()
    note = avoid_narrow_strided_convs(network) if trains and device.type == "cpu" else None
    amp = amp_dtype(config.amp, device)
    if device.type == "cpu" and (reason := slow_precision_reason(amp, trains)) is not None:
        warn(
            f"train.amp={config.amp} takes 2 to 1,000 times as long as float32 here, since {reason}; use train.amp=auto"
        )
    mode = config.compile if config.compile != "auto" else (GPU_COMPILE_MODE if device.type == "cuda" else "off")
    if mode != "off":
        torch._dynamo.config.recompile_limit = MAX_COMPILED_MODELS
        # As in pipelines.device_kernels; the processes that compile inherit it.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    captures = uses_cuda_graph(config, device, amp)
    if captures:
        make_capturable(optimizer, device)
        if mode == "max-autotune":
            mode = "max-autotune-no-cudagraphs"  # the whole step is the graph; the compiler's own cannot lie inside
    parallel = data_parallel(network, device, config.accumulation_steps)

    def compiled(function: Any) -> Any:
        # Each shape has kernels of its own: those for any shape are slower, and there are few.
        return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)

    return TrainState(
        network=network,
        forward=parallel,
        loss_and_counts=compiled(build_loss(config, mixes)),
        infer=compiled(network),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        amp=amp,
        config=config,
        device=device,
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        step=train_step,
        compiled=compiled,
        needs_warmup=device.type == "cuda" or mode != "off",
        uses_cuda_graph=captures,
        static_grads=captures and config.accumulation_steps > 1,
        mixes=mixes,
        guard=SkipNonFinite(network, optimizer) if config.on_nonfinite == "skip" else None,
        notes=() if note is None else (note,),
    )


def keep_freed_memory() -> None:
    """Let the C library reuse the memory of large tensors instead of giving it back to the system at every free.

    Each step's activations would else be mapped, zeroed and faulted in anew, page by page.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        mmap_threshold, trim_threshold = -3, -1
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that `train.amp` means on this device; None: float32."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def uses_cuda_graph(config: TrainConfig, device: torch.device, amp: torch.dtype | None) -> bool:
    """Whether the step is replayed as CUDA graphs. Raises UserError where train.cuda_graph=on cannot be had."""
    obstacles = {
        f"the device is a {device.type}": device.type != "cuda",
        f"there are {get_world_size()} ranks": get_world_size() > 1,
        "fp16 looks at its gradients on the host before every update": amp == torch.float16,
        "compile=reduce-overhead makes graphs of its own": config.compile == "reduce-overhead",
        f"on_nonfinite=skip looks at the gradients of {config.optimizer.name} on the host before every update": (
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


def train_step(state: TrainState, batch: Batch, *, optimizer_step: bool = True) -> None:
    """Forward and backward of one batch; with `optimizer_step` also the optimizer's step. Does not synchronise."""
    config = state.config
    with nullcontext() if optimizer_step else without_reduction(state.forward):
        with state.autocast():
            loss, counts = state.loss_and_counts(state.forward, batch, config.label_smoothing)
        state.scaler.scale(loss / config.accumulation_steps).backward()
    guard = state.guard
    state.sums += counts if guard is None else guard.mask_counts(counts)
    if optimizer_step:
        if clips_gradients(config) or guard is not None:
            state.scaler.unscale_(state.optimizer)
        if guard is not None:
            guard.check()
        if clips_gradients(config):
            clip_gradients(state.network, config)
        if guard is not None:
            guard.step(state.scaler)
        else:
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=not state.static_grads)


def run_step(state: TrainState, batch: Batch, step: int, *, optimizer_step: bool) -> None:
    """The step, captured or not, on the batch or on what the proxy chooses of it; step: of the run, from 0."""
    if state.proxy is not None:
        batch = state.proxy.select(batch, step)
    state.step(state, batch, optimizer_step=optimizer_step)


@dataclass(frozen=True)
class EpochTimes:
    """Host times of one epoch, or of the rest of it after a resume."""

    micro_steps: int
    time_s: float
    wait_s: float  # of it, for data


def update_averages(state: TrainState, update: int, timeline: Timeline) -> None:
    """What keeps copies of the weights sees them after optimizer update `update` of the run."""
    if state.lookahead is not None:
        state.lookahead.update(update, timeline.total)
    if state.ema is not None:
        state.ema.update(update + 1 - timeline.first(state.config.first_epoch))


def build_timeline(config: TrainConfig, loader: TrainLoader) -> Timeline:
    """Of a run with this loader; config: with learning rates at the global batch, see `schedule.scaled`.

    Where stages change the batch size, learning rates follow it as train.lr_scaling says.
    """
    accumulation = config.accumulation_steps
    loaders = [loader.at(epoch) for epoch in range(config.epochs)]
    factors = tuple(
        lr_factor(config, one.plan.batch_size * get_world_size() * accumulation) if len(loader.stages) > 1 else 1.0
        for one in loaders
    )
    updates = tuple(len(one) // accumulation for one in loaders)
    return Timeline(updates, factors if set(factors) != {1.0} else ())


def train_epoch(
    state: TrainState,
    loader: TrainLoader,
    *,
    seed: int,
    rank: int,
    after_step: Callable[[int, float], None],
    timeline: Timeline | None = None,
    decays: int = 0,
    skip_steps: Collection[int] = (),
) -> EpochTimes:
    """Train the rest of the loader's epoch; after_update(update, lr) follows every optimizer update, counted from 0.

    timeline: of the whole run; None: all epochs are as long as this one. decays: of schedule plateau so far.
    passed_over: updates that are not made, nor followed by anything.

    Dropout and the like draw from torch's generator, which is seeded for each batch: a resumed run draws the same.
    """
    set_training_mode(state.forward)
    set_whitening_bias_grad(state, loader.state["epoch"])
    on_gpu = state.device.type == "cuda"
    accumulation = state.config.accumulation_steps
    timeline = timeline or build_timeline(state.config, loader)
    epoch, first, steps = loader.state["epoch"], loader.state["step"], len(loader)
    # torch.manual_seed, which seeds all devices, and a hash at every batch would cost 0.15 ms per batch
    generator = torch.cuda.default_generators[state.device.index] if on_gpu else torch.default_generator
    seeds = hash64(np.arange(steps, dtype=np.uint64) ^ stream(seed, epoch, f"torch-{rank}")) >> np.uint64(1)
    begin, waited = time.perf_counter(), loader.wait_s
    for step, batch in enumerate(loader, first):
        update, micro = timeline.first(epoch) + step // accumulation, step % accumulation
        if update in skip_steps:
            continue
        lr = learning_rate(update, timeline, state.config, decays)
        whitening_lr = whitening_learning_rate(update, timeline, state.config, decays)
        for one in state.parts():
            set_learning_rate(one.optimizer, lr, whitening_lr)
        generator.manual_seed(int(seeds[step]))
        last = micro == accumulation - 1
        run_step(state, batch, update, optimizer_step=last)
        if last:
            update_averages(state, update, timeline)
            after_step(update, lr)
    if on_gpu:
        torch.cuda.synchronize(state.device)  # once per epoch, so that its time is its own
    return EpochTimes(steps - first, time.perf_counter() - begin, loader.wait_s - waited)


def set_whitening_bias_grad(state: TrainState, epoch: int) -> None:
    """Take the bias of a whitening layer out of the backward pass after `whiten_bias_epochs`.

    Its learning rate is 0 then anyhow, so that this only saves time: the gradient of the largest activations. DDP and
    captured graphs expect the same gradients in every step, and keep it.
    """
    whitening, epochs = find_whitening(state.network), state.config.whiten_bias_epochs
    if whitening is None or epochs is None or not is_trained(whitening.bias, state.optimizer):
        return
    if not state.uses_cuda_graph and not is_data_parallel(state.forward):
        whitening.bias.requires_grad_(epoch < epochs)


def is_trained(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer changes it: model.freeze holds for the whole run."""
    return any(parameter is one for group in optimizer.param_groups for one in group["params"])


@dataclass(frozen=True)
class Evaluation:
    """Means over a whole split; top1 and top5 are fractions."""

    loss: float
    top1: float
    top5: float
    samples: int

    def sentence(self, split: str) -> str:
        """As every command says it, of a split by this name."""
        return f"{split} loss {self.loss:.4f}, top1 {self.top1:.4f}, top5 {self.top5:.4f} over {self.samples} samples"


class EvaluationInterrupted(Exception):
    """An evaluation that was broken off, on all ranks alike."""


def predictions(state: TrainState, loader: Iterable[Batch], tta: str = "none") -> Iterator[tuple[Tensor, Tensor]]:
    """(logits float32 [B, num_classes], labels int64 [B], -1 where there is none) of each batch, in the loader's order.

    tta: test-time augmentation, eval.tta.

    The last batch is filled up to the size of the others, so that a compiled model sees one shape; the filling is cut
    off its logits.
    """
    collectives.broadcast_buffers(state.network)
    state.infer.eval()
    full = 0
    for images, labels in loader:
        full = max(full, len(labels))
        missing = full - len(labels)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), state.autocast():
            logits = mean_logits(state.infer, images, tta)
        yield logits[: len(labels)], labels


def evaluate(
    state: TrainState,
    loader: Iterable[Batch],
    samples: int,
    tta: str = "none",
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss and accuracy over all ranks' pieces of a split of `samples`; fails when they do not add up to it.

    is_interrupted: asked between batches; once it is true on any rank, all of them raise Interrupted.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=state.device)  # the last: ranks that were interrupted
    for logits, labels in predictions(state, loader, tta):
        if is_interrupted():
            sums[4] = 1
            break
        sums[:4] += loss_and_hits(logits, labels)
    loss_sum, top1, top5, count, interrupted = collectives.sum_over_ranks(sums).tolist()
    if interrupted:
        raise EvaluationInterrupted
    check_full_coverage(loader)
    if int(count) != samples:
        raise RuntimeError(f"evaluation counted {int(count)} samples of a split of {samples}")
    return Evaluation(loss_sum / samples, top1 / samples, top5 / samples, samples)


def loss_and_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 [4]: sums over the batch of loss, top-1 and top-5 hits, and labelled samples. Does not synchronise."""
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()]).double()
