"""Settings for the optimizer, the learning rate schedule and weight averaging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.schema.section import Section, as_tuple

BUILT_IN_OPTIMIZERS = ("adamw", "sgd", "adam", "rmsprop", "muon")  # all other names are timm's
# Values of null settings for built-in optimizers; timm optimizers have their own defaults.
OPTIMIZER_DEFAULTS: dict[str, object] = {"betas": (0.9, 0.999), "eps": 1e-8, "nesterov": True}


class OptimizerConfig(Section):
    """The optimizer and its parameter groups."""

    name: str = Field(default="adamw", min_length=1)
    """adamw, sgd, adam, rmsprop: torch's optimizers, fused if available; muon: Muon for convolution filters and sgd
    with Nesterov momentum for all other parameters; any other name, such as lamb, lion or timm/muon: a timm optimizer,
    with timm's defaults where betas, eps and nesterov are null."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay: decoupled from the gradient for adamw and muon's filters, added to the gradient for sgd, adam and
    rmsprop. Each step multiplies it by the scheduled train.lr, even for parameters with norm_bias_lr, bias_lr or
    linear_lr, and by the factors from layer_decay and lr_scales."""
    decay_biases: bool = False
    """Whether to apply weight decay to biases and norm parameters too."""
    betas: tuple[float, ...] | None = Field(default=None, validate_default=True)
    """Decay rates of the running means of the gradient and its square; null: [0.9, 0.999] for adamw and adam, the
    optimizer's default for timm optimizers."""
    eps: float | None = Field(default=None, gt=0, validate_default=True)
    """Term added to the denominator; null: 1e-8 for adamw, adam and rmsprop, the optimizer's default for timm
    optimizers."""
    nesterov: bool | None = Field(default=None, validate_default=True)
    """Whether to use Nesterov momentum; null: true for sgd and muon's filters, the optimizer's default for timm
    optimizers."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for sgd, rmsprop, muon's filters, and timm optimizers that have momentum."""
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the parameters that muon leaves to sgd."""
    newton_schulz_steps: int = Field(default=5, ge=1)
    """Newton-Schulz iterations that orthogonalize an update, for muon."""
    normalize_filters: bool = False
    """Whether muon scales a convolution's weight to the norm sqrt(filters) before each update, for networks with a norm
    layer after every convolution; filters then have no weight decay."""
    norm_bias_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of biases of norm layers; null: train.lr."""
    bias_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of all other biases; null: train.lr."""
    linear_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of weights of linear layers; null: train.lr."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Layer-wise decay: factor that scales the learning rate and weight decay from each layer to the one below it,
    starting at the head; null: 1."""
    lr_scales: dict[str, float] = Field(default={})
    """Factors for the learning rate and weight decay of parameters whose names match a shell pattern, such as
    {"network.layer1.*": 0.1}; the last matching pattern wins."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of the optimizer's constructor, such as {alpha: 0.9} for rmsprop."""

    @field_validator(*OPTIMIZER_DEFAULTS, mode="before")
    @classmethod
    def _default(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.data.get("name") in BUILT_IN_OPTIMIZERS:
            return OPTIMIZER_DEFAULTS[str(info.field_name)]
        return value

    @field_validator("betas", mode="before")
    @classmethod
    def _numbers_below_one(cls, betas: Any, info: ValidationInfo) -> Any:
        betas, counts = as_tuple(betas), (2,) if info.data.get("name") in BUILT_IN_OPTIMIZERS else (2, 3)
        if betas is None:
            return None
        is_valid = isinstance(betas, tuple) and len(betas) in counts
        if not is_valid or not all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas):
            three = ", or three for an optimizer of timm that has three" if 3 in counts else ""
            raise ValueError(f"must be two numbers of at least 0 and below 1{three}")
        return betas

    @field_validator("momentum")
    @classmethod
    def _nesterov_needs_momentum(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum == 0 and info.data.get("name") in ("sgd", "muon") and info.data.get("nesterov"):
            raise ValueError("must be above 0 with nesterov=true; set nesterov to false to do without momentum")
        return momentum


class ScheduleConfig(Section):
    """Settings for the schedules step, multistep, exponential, polynomial, plateau and one-cycle."""

    epochs: float = Field(default=30.0, gt=0)
    """Epochs (fractions allowed) between two decays, counted from the start of training, for step."""
    rate: float = Field(default=0.1, gt=0, le=1)
    """Factor of each decay, for step, multistep and plateau; factor per epoch after the warm-up, for exponential."""
    milestones: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = ()
    """Epochs of the decays, for multistep."""
    power: float = Field(default=1.0, gt=0)
    """Exponent of the remaining share of training, for polynomial."""
    metric: Literal["val_loss", "val_top1", "train_loss"] = "val_loss"
    """Metric to monitor, at the end of each epoch that has it, for plateau."""
    patience: int = Field(default=10, ge=0)
    """Number of epochs without improvement to tolerate, for plateau; one more decays the learning rate."""
    threshold: float = Field(default=1e-4, ge=0)
    """Minimum change that counts as an improvement, in units of the metric, for plateau."""
    peak: float = Field(default=0.3, gt=0, lt=1)
    """Share of optimizer steps in which the learning rate rises, for one-cycle."""
    div_factor: float = Field(default=25.0, ge=1)
    """train.lr divided by the first learning rate, for one-cycle."""
    final_div_factor: float = Field(default=1e4, ge=1)
    """First learning rate divided by the last one, for one-cycle."""
    per_epoch: bool = False
    """Whether to change the learning rate only at the start of each epoch, like a torch scheduler stepped once per
    epoch; does not apply to one-cycle or the warm-up."""


class EmaConfig(Section):
    """An exponential moving average of the weights (timm's ModelEmaV3), evaluated in addition to the weights."""

    decay: float | None = Field(default=None, ge=0, lt=1)
    """Share of the average that an update keeps; null: no average."""
    warmup: bool = False
    """Whether an update keeps min(decay, 1 - (1 + updates) ** (-2 / 3)), which starts low and rises to decay."""
    every_steps: int = Field(default=1, ge=1)
    """Optimizer steps between two updates of the average."""


class LookaheadConfig(Section):
    """Lookahead (arXiv:1907.08610): slow weights that follow the trained weights and periodically replace them."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between two synchronizations of slow and trained weights; null: off."""
    decay: float = Field(default=0.75, ge=0, lt=1)
    """Share of the slow weights that a synchronization keeps at the end of training; it grows from 0 with the cube of
    the finished fraction of training."""
