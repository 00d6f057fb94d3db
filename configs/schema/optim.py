"""Settings of the optimizer, the learning-rate schedule and averages of the weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.schema.section import Section, as_tuple

BUILT_IN_OPTIMIZERS = ("adamw", "sgd", "adam", "rmsprop", "muon")  # optimizers; all other names are timm's
# Of the built-in optimizers where the config says null; timm's have defaults of their own.
OPTIMIZER_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "nesterov": True}


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

    @field_validator(*OPTIMIZER_DEFAULTS, mode="before")
    @classmethod
    def _default(cls, value: Any, info: ValidationInfo) -> Any:
        return (
            OPTIMIZER_DEFAULTS[str(info.field_name)]
            if value is None and info.data.get("name") in BUILT_IN_OPTIMIZERS
            else value
        )

    @field_validator("betas", mode="before")
    @classmethod
    def _numbers_below_one(cls, betas: Any, info: ValidationInfo) -> Any:
        if betas is None:
            return None
        numbers = isinstance(betas, list | tuple) and all(type(beta) in (int, float) for beta in betas)
        counts = (2,) if info.data.get("name") in BUILT_IN_OPTIMIZERS else (2, 3)
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
