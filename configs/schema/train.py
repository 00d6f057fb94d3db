"""Settings of training: epochs, learning rate, loss, precision and checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from configs.schema.optim import EmaConfig, LookaheadConfig, OptimizerConfig, ScheduleConfig
from configs.schema.section import Section


class ProxyConfig(Section):
    """A small network that trains beside the model and chooses the samples with the highest loss for it."""

    model: str | None = Field(default=None, min_length=1)
    """Name as in model.name; null: off, every sample is trained on."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of each batch that is chosen."""
    every_steps: int = Field(default=4, ge=1)
    """Steps between two updates of the small network, which learns from what it chooses."""


class TrainConfig(Section):
    epochs: int = Field(default=10, ge=1)
    """Passes over the train split."""
    first_epoch: int = Field(default=0, ge=0)
    """Epoch that a run which is not resumed begins with; its order, augmentation and learning rate are that epoch's."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate at the global batch, which lr_batch_size may say; without, it is never rescaled."""
    lr_batch_size: int | None = Field(default=None, ge=1)
    """Global batch that all learning rates are meant for; null: whatever it is."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How learning rates grow with the global batch from lr_batch_size on."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of schedules cosine, linear and polynomial, and the least of the others; at most lr."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs, also fractions, of linear warm-up from warmup_lr to lr; cut to epochs where it is longer."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the start of the warm-up; at most lr."""
    schedule: Literal["cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial", "plateau",
                      "one-cycle"] = "cosine"  # fmt: skip
    """Learning rate after the warm-up; linear with a warm-up is the triangular schedule; one-cycle has a warm-up of its
    own."""
    schedule_options: ScheduleConfig = Field(default=ScheduleConfig(), validate_default=True)
    """Settings of the schedules that need more than lr and min_lr."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and its settings."""
    lookahead: LookaheadConfig = LookaheadConfig()
    """Lookahead."""
    ema: EmaConfig = EmaConfig()
    """Moving average of the weights."""
    proxy: ProxyConfig = ProxyConfig()
    """Choice of the hard samples of each batch."""
    whiten_bias_epochs: int | None = Field(default=None, ge=0)
    """Epochs in which the bias of a whitening first layer is trained; null: all."""
    whiten_bias_anneal: bool = False
    """Whether its learning rate falls linearly to 0 over these epochs, instead of following schedule."""
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    """Cross-entropy, or binary cross-entropy for each class (arXiv:2110.00476)."""
    bce_threshold: float | None = Field(default=None, gt=0, lt=1)
    """Targets above it count as 1 and others as 0, for loss bce with mixed labels; null: targets stay as they are."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes, in training."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer update."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; null: no clipping."""
    clip_grad_value: float | None = Field(default=None, gt=0)
    """Largest absolute value of each element of the gradients; null: no clipping."""
    clip_grad_adaptive: float | None = Field(default=None, gt=0)
    """Largest ratio of a gradient's norm to its weight's, unit by unit (AGC, arXiv:2102.06171); null: no clipping."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast type; auto: bf16 on a GPU that has it, else fp16 on a GPU, float32 on the CPU. bf16 on a CPU without
    instructions for it, and fp16 on any CPU, are many times slower than float32."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = "auto"
    """Mode of torch.compile; auto: chosen by the device."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as one CUDA graph; auto: on one GPU, unless fp16 or compile=reduce-overhead forbid it."""
    channels_last: bool = True
    """Memory format NHWC, which convolutions on tensor cores want."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When a loss or weight becomes nan or infinite: end the run; leave out every update whose gradients are; or go
    back to the last checkpoint and from there pass over the steps in which it happened, a few times at most."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: every five minutes. One is also written at the end of an epoch."""
    save_every_epochs: int = Field(default=1, ge=1)
    """Epochs between the checkpoints at their ends; the last epoch always ends with one."""
    eval_every_epochs: int = Field(default=1, ge=1)
    """Epochs between evaluations."""

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
            raise ValueError(f"must be below train.epochs={info.data['epochs']}, the number of epochs in all")
        return first_epoch

    @field_validator("schedule")
    @classmethod
    def _one_warmup(cls, schedule: str, info: ValidationInfo) -> str:
        if schedule == "one-cycle" and info.data.get("warmup_epochs"):
            raise ValueError("has a warm-up of its own; set train.warmup_epochs to 0")
        return schedule

    @field_validator("bce_threshold")
    @classmethod
    def _of_bce(cls, threshold: float | None, info: ValidationInfo) -> float | None:
        if threshold is not None and info.data.get("loss") == "cross-entropy":
            raise ValueError("is for loss bce; set train.loss to bce or leave it out")
        return threshold

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
            raise ValueError(f"goes not with train.{others[0]}={info.data[others[0]]}; set one of them to null")
        return limit
