"""Training settings: epochs, learning rate, loss, precision, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.schema.optim import EmaConfig, LookaheadConfig, OptimizerConfig, ScheduleConfig
from configs.schema.section import IsCode, Resumable, Section, as_tuple
from configs.utils.code import FORMS, is_reference

LOSSES = ("cross-entropy", "bce")


class ProxyConfig(Section):
    """A small network, trained alongside the model, that selects the samples on which its own loss is highest."""

    model: Annotated[str | None, IsCode] = Field(default=None, min_length=1)
    """Name of the small network, as in model.name; null: off, train on every sample."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of each batch to select."""
    every_steps: int = Field(default=4, ge=1)
    """Optimizer steps between two updates of the small network, each on the selected samples."""


class TrainConfig(Section):
    """Training: epochs, learning rate, loss, precision, checkpoints."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    max_steps: Resumable[int | None] = Field(default=None, ge=1)
    """Optimizer steps, counted from epoch 0, after which the run stops with an evaluation and a checkpoint; null: train
    all epochs. The learning rate schedule still spans all epochs."""
    patience: Resumable[int | None] = Field(default=None, ge=1)
    """Epochs without a better eval.best_by after which the run stops early; null: train all epochs."""
    first_epoch: int = Field(default=0, ge=0)
    """Epoch at which a new run starts, with the order, augmentation and learning rate of that epoch."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate. If lr_batch_size is set, lr is rescaled to the global batch size
    (data.batch_size * ranks * accumulation_steps)."""
    lr_batch_size: int | None = Field(default=None, ge=1)
    """Global batch size for which all learning rates are given; null: do not rescale learning rates."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How to scale learning rates with the ratio of the global batch size to lr_batch_size."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the cosine, linear and polynomial schedules, and minimum of the others; at most lr."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs (fractions allowed) of linear warm-up from warmup_lr to lr; cut to epochs if longer."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the start of the warm-up; at most lr."""
    schedule: Literal[
        "cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial", "plateau", "one-cycle"
    ] = "cosine"
    """Learning rate after the warm-up. linear with a warm-up is the triangular schedule; one-cycle includes its own
    warm-up."""
    schedule_options: ScheduleConfig = Field(default=ScheduleConfig(), validate_default=True)
    """Settings of schedules that need more than lr and min_lr."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and its settings."""
    lookahead: LookaheadConfig = LookaheadConfig()
    """Lookahead."""
    ema: EmaConfig = EmaConfig()
    """Exponential moving average of the weights."""
    proxy: ProxyConfig = ProxyConfig()
    """Training on only the hard samples of each batch."""
    whiten_bias_epochs: int | None = Field(default=None, ge=0)
    """Number of epochs after which to stop training the bias of the whitening layer; null: never stop."""
    whiten_bias_anneal: bool = False
    """Whether the learning rate of the whitening layer's bias falls linearly from lr to 0 over whiten_bias_epochs, if
    set, instead of following schedule."""
    loss: Annotated[str, IsCode] = Field(default="cross-entropy", min_length=1)
    """cross-entropy; bce, binary cross-entropy per class (arXiv:2110.00476); or path/to/file.py:NAME or
    package.module:NAME for your own function (logits, labels) -> loss. The validation loss is always cross-entropy."""
    bce_threshold: float | None = Field(default=None, gt=0, lt=1)
    """Threshold above which targets become 1, while all others become 0, for the bce loss with mixed labels; null: keep
    soft targets."""
    class_weights: Annotated[Literal["balanced"] | tuple[float, ...] | None, BeforeValidator(as_tuple)] = None
    """Weights of the classes in the training loss, for cross-entropy and bce: one number per class, in their order; or
    balanced, samples / (classes * samples of the class); null: equal weights. The validation loss has no weights."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes, in training only."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Maximum global norm of the gradients; null: no clipping."""
    clip_grad_value: float | None = Field(default=None, gt=0)
    """Maximum absolute value of each gradient element; null: no clipping."""
    clip_grad_adaptive: float | None = Field(default=None, gt=0)
    """Maximum ratio of a gradient's norm to its weight's, unit by unit (AGC, arXiv:2102.06171); null: no clipping."""
    amp: Resumable[Literal["auto", "bf16", "fp16", "off"]] = "auto"
    """Autocast dtype; auto: bf16 on GPUs that support it, fp16 on other GPUs, float32 on the CPU. bf16 on a CPU without
    bf16 instructions, and fp16 on any CPU, are many times slower than float32."""
    compile: Resumable[Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]] = "auto"
    """Mode of torch.compile; auto: default on a GPU; on a CPU, default for the training steps of LeNet in runs of at
    least 500,000 images if there is a C++ compiler, and off otherwise."""
    cuda_graph: Resumable[Literal["auto", "on", "off"]] = "auto"
    """Whether to replay training steps as CUDA graphs; auto: on a single GPU, unless the run uses fp16,
    compile=reduce-overhead, an optimizer that cannot be captured, or on_nonfinite=skip with an unfused optimizer; on:
    also on several GPUs."""
    bucket_mb: Resumable[int | None] = Field(default=None, ge=1)
    """Size in MiB of the buckets in which several ranks sum their gradients during the backward pass; null: 1 for the
    first bucket and 25 for the others, as in torch."""
    channels_last: Resumable[bool] = True
    """Whether to use the channels_last (NHWC) memory format, preferred by convolutions on tensor cores."""
    on_nonfinite: Resumable[Literal["stop", "skip", "rewind"]] = "stop"
    """Action if a loss or weight becomes nan or infinite: end the run (stop); skip optimizer steps with non-finite
    gradients (skip); or return to the last checkpoint and skip the affected steps, at most a few times (rewind)."""
    save_every_steps: Resumable[int | None] = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; null: every five minutes. Checkpoints are also written at the end of epochs
    (see save_every_epochs)."""
    save_every_epochs: Resumable[int] = Field(default=1, ge=1)
    """Write a checkpoint at the end of every N-th epoch, and always after the last one."""
    keep_checkpoints: Resumable[str | None] = None
    """every:N keeps a checkpoint epoch-E.pt of every N-th epoch beside last.pt and best.pt; null: keep none."""
    eval_every_epochs: Resumable[int] = Field(default=1, ge=1)
    """Evaluate after every N-th epoch, and always after the last one."""

    @field_validator("min_lr", "warmup_lr")
    @classmethod
    def _at_most_lr(cls, value: float, info: ValidationInfo) -> float:
        if "lr" in info.data and value > info.data["lr"]:
            raise ValueError(f"must not exceed train.lr={info.data['lr']}")
        return value

    @field_validator("warmup_epochs")
    @classmethod
    def _within_the_run(cls, warmup_epochs: float, info: ValidationInfo) -> float:
        return min(warmup_epochs, float(info.data.get("epochs", warmup_epochs)))

    @field_validator("first_epoch")
    @classmethod
    def _below_epochs(cls, first_epoch: int, info: ValidationInfo) -> int:
        if "epochs" in info.data and first_epoch >= info.data["epochs"]:
            raise ValueError(f"must be below train.epochs={info.data['epochs']}, the total number of epochs")
        return first_epoch

    @field_validator("keep_checkpoints")
    @classmethod
    def _every_some_epochs(cls, keep: str | None) -> str | None:
        if keep is not None and not re.fullmatch("every:[1-9][0-9]{0,8}", keep):
            raise ValueError("must be every:N with a number of epochs, such as every:10, or null")
        return keep

    @field_validator("schedule")
    @classmethod
    def _one_warmup(cls, schedule: str, info: ValidationInfo) -> str:
        if schedule == "one-cycle" and info.data.get("warmup_epochs"):
            raise ValueError("includes its own warm-up; set train.warmup_epochs to 0")
        return schedule

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str) -> str:
        if loss not in LOSSES and not is_reference(loss):
            raise ValueError(f"must be {', '.join(LOSSES)}, or your own function as {FORMS}, e.g. my_losses.py:focal")
        return loss

    @field_validator("bce_threshold")
    @classmethod
    def _of_bce(cls, threshold: float | None, info: ValidationInfo) -> float | None:
        if threshold is not None and info.data.get("loss", "bce") != "bce":
            raise ValueError("applies to loss bce only; set train.loss to bce or leave it out")
        return threshold

    @field_validator("class_weights")
    @classmethod
    def _usable_weights(cls, weights: object, info: ValidationInfo) -> object:
        if weights is not None and info.data.get("loss", "bce") not in LOSSES:
            raise ValueError("applies to the losses cross-entropy and bce; weight the classes in your own loss instead")
        if isinstance(weights, tuple) and (min(weights, default=0) < 0 or max(weights, default=0) == 0):
            raise ValueError("must be balanced, or one weight of at least 0 per class and one of them above 0")
        return weights

    @field_validator("schedule_options")
    @classmethod
    def _milestones(cls, options: ScheduleConfig, info: ValidationInfo) -> ScheduleConfig:
        if info.data.get("schedule") == "multistep" and not options.milestones:
            raise ValueError("needs milestones for schedule multistep, such as {milestones: [30, 60]}")
        return options

    @field_validator("clip_grad_value", "clip_grad_adaptive")
    @classmethod
    def _one_kind_of_clipping(cls, limit: float | None, info: ValidationInfo) -> float | None:
        others = [name for name in ("clip_grad_norm", "clip_grad_value") if info.data.get(name) is not None]
        if limit is not None and others:
            raise ValueError(
                f"cannot be combined with train.{others[0]}={info.data[others[0]]}; set one of them to null"
            )
        return limit
