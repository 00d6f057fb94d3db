"""The settings of training: optimizer, schedule, averages of weights; see `configs.schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.schema.section import Section, as_tuple

BUILT_IN = ("adamw", "sgd", "adam", "rmsprop", "muon")  # optimizers; all other names are timm's
# Of the built-in optimizers where the config says null; timm's have defaults of their own.
DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "nesterov": True}


class OptimizerConfig(Section):
    name: str = Field(default="adamw", min_length=1)
    """adamw, sgd, adam, rmsprop: torch's, fused where it has that; muon: for the filters of convolutions, and sgd with
    Nesterov momentum for all else; any other name, such as lamb, lion or timm/muon, is timm's optimizer of that
    name, with its own betas, eps and nesterov where these are null."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay: decoupled from the gradient for adamw, added to it for sgd. Each step takes away train.lr times
    this share, also from parameters with norm_bias_lr, bias_lr or linear_lr; layer_decay and lr_scales scale it too."""
    decay_biases: bool = False
    """Whether weight decay holds for biases and norms too."""
    betas: tuple[float, ...] | None = Field(default=None, validate_default=True)
    """Decay of the running means of gradient and squared gradient; null: [0.9, 0.999] for adamw and adam, for timm's
    optimizers their own, as many as they have."""
    eps: float | None = Field(default=None, gt=0, validate_default=True)
    """Added to the denominator; null: 1e-8 for adamw, adam and rmsprop, for timm's optimizers their own."""
    nesterov: bool | None = Field(default=None, validate_default=True)
    """Nesterov momentum; null: true for sgd and muon's filters, for timm's optimizers their own choice."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for sgd, rmsprop, muon's filters, and timm's optimizers that have one."""
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of what muon leaves to sgd."""
    newton_schulz_steps: int = Field(default=5, ge=1)
    """Iterations that make an update orthogonal, for muon."""
    normalize_filters: bool = False
    """Whether muon scales a convolution's weight to the norm sqrt(filters) before each update, which suits networks
    with a norm after every convolution; weight decay then leaves the filters out."""
    norm_bias_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the biases of norms; null: train.lr."""
    bias_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of all other biases; null: train.lr."""
    linear_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the weights of linear layers; null: train.lr."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor of the learning rate, and so of what weight decay takes away, from each layer to the one below it, counted
    from the head; null: 1."""
    lr_scales: dict[str, float] = Field(default={})
    """Factors of the learning rate, and so of what weight decay takes away, by patterns (as in a shell) of the names of
    parameters, such as {"network.layer1.*": 0.1}; of several that match, the last holds."""
    options: dict[str, Any] = Field(default={})
    """More arguments of the optimizer's constructor, such as {alpha: 0.9} for rmsprop."""

    @field_validator(*DEFAULTS, mode="before")
    @classmethod
    def _default(cls, value: Any, info: ValidationInfo) -> Any:
        return DEFAULTS[str(info.field_name)] if value is None and info.data.get("name") in BUILT_IN else value

    @field_validator("betas", mode="before")
    @classmethod
    def _numbers_below_one(cls, betas: Any, info: ValidationInfo) -> Any:
        if betas is None:
            return None
        numbers = isinstance(betas, list | tuple) and all(type(beta) in (int, float) for beta in betas)
        counts = (2,) if info.data.get("name") in BUILT_IN else (2, 3)
        if not numbers or len(betas) not in counts or not all(0 <= beta < 1 for beta in betas):
            three = ", or three for an optimizer of timm that has three" if 3 in counts else ""
            raise ValueError(f"must be two numbers of at least 0 and below 1{three}")
        return tuple(betas)

    @field_validator("momentum")
    @classmethod
    def _nesterov_needs_momentum(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum == 0 and info.data.get("name") in ("sgd", "muon") and info.data.get("nesterov"):
            raise ValueError("must be above 0 with nesterov=true; set nesterov to false to do without momentum")
        return momentum


class ScheduleConfig(Section):
    """What the schedules step, multistep, exponential, polynomial, plateau and one-cycle need."""

    epochs: float = Field(default=30.0, gt=0)
    """Epochs, also fractions, between two decays, for step; counted from the start of training."""
    rate: float = Field(default=0.1, gt=0, le=1)
    """Factor of each decay, for step, multistep and plateau; of every epoch after the warm-up, for exponential."""
    milestones: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = ()
    """Epochs at which multistep decays."""
    power: float = Field(default=1.0, gt=0)
    """Exponent of the share that is left, for polynomial."""
    metric: Literal["val_loss", "val_top1", "train_loss"] = "val_loss"
    """What plateau watches, at the end of each epoch that has it."""
    patience: int = Field(default=10, ge=0)
    """Epochs without improvement that plateau lets pass before it decays."""
    threshold: float = Field(default=1e-4, ge=0)
    """Smallest improvement that plateau takes for one, in units of the metric."""
    peak: float = Field(default=0.3, gt=0, lt=1)
    """Share of the updates in which one-cycle rises."""
    div_factor: float = Field(default=25.0, ge=1)
    """train.lr divided by one-cycle's first learning rate."""
    final_div_factor: float = Field(default=1e4, ge=1)
    """One-cycle's first learning rate divided by its last."""
    per_epoch: bool = False
    """Whether the learning rate changes at the start of each epoch only, as torch's schedulers change it when they are
    stepped once per epoch; not for one-cycle, nor within the warm-up."""


class EmaConfig(Section):
    """An exponential moving average of the weights, evaluated beside them (timm's ModelEmaV3)."""

    decay: float | None = Field(default=None, ge=0, lt=1)
    """Share of the average that an update keeps; null: no average."""
    warmup: bool = False
    """Whether the share rises to decay with the number of updates, as 1 - (1 + updates) ** (-2 / 3)."""
    every_steps: int = Field(default=1, ge=1)
    """Optimizer steps between two updates of the average."""


class LookaheadConfig(Section):
    """A slow copy of the weights that follows the trained ones and is put back in their place (arXiv:1907.08610)."""

    every_steps: int | None = Field(default=None, ge=1)
    """Updates between two meetings of both; null: off."""
    decay: float = Field(default=0.75, ge=0, lt=1)
    """Share of the slow copy that a meeting keeps, at the end of training; it grows with the cube of the progress."""


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
