"""Every setting: its type, default, allowed range and documentation. Knows nothing of files, DALI or torch.

A config is frozen, an unknown key is an error, and every field is read somewhere (a test says so). Loading is in
`configs/load.py`; `python -m configs.schema` prints all of this as a markdown table. `lr` is the peak learning rate at
the global batch: data.batch_size * world_size * train.accumulation_steps samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Strict: `epochs: "5"` and `epochs: true` are errors instead of 5 and 1; an integer is accepted for a float."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _two_numbers(value: Any) -> Any:
    numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
    if not numbers or len(value) != 2:
        raise ValueError("must be two numbers, such as [0.5, 1.0]")
    return tuple(value)


Pair = Annotated[tuple[float, float], BeforeValidator(_two_numbers)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class DataConfig(Section):
    path: str = Field(min_length=1)
    """Folder of the converted data set, the one that holds dataset.json, such as data/cifar10."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per rank and forward pass."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels that the model sees; null: the stored size (if it varies, a number is needed)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, in training and evaluation."""
    placement: Literal["auto", "host", "device"] = "auto"
    """Where the samples live: mapped files on the host, or whole in GPU memory; auto: by size and free memory."""
    order: Literal["random", "sequential-window"] = "random"
    """Training order: a global permutation per epoch, or shards in random order, shuffled within a window."""
    window_shards: int = Field(default=8, ge=1)
    """Shards per shuffle window of order sequential-window."""
    prefetch: int = Field(default=3, ge=1, le=16)
    """Batches prepared ahead of training."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per rank for images; null: the cores of this process divided by the ranks on this machine."""
    hw_decoder_load: float = Field(default=0.65, ge=0, le=1)
    """Share of JPEGs decoded by the GPU's hardware decoder; 0: the same decoder on every GPU."""
    train_split: str = Field(default="train", min_length=1)
    """Split to train on."""
    val_split: str = Field(default="val", min_length=1)
    """Split to evaluate on."""


class ColorJitterConfig(Section):
    """torchvision's ColorJitter: a strength b draws a factor from [max(0, 1 - b), 1 + b]."""

    brightness: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    contrast: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    saturation: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the colour circle, drawn from [-hue, hue]; 0: off."""


def color_jitter_section(value: Any) -> Any:
    """One number is the strength of brightness, contrast and saturation (hue stays off); all else is returned as is."""
    if type(value) not in (int, float):
        return value
    return {"brightness": value, "contrast": value, "saturation": value}


class AugConfig(Section):
    """Augmentation, in training only."""

    crop: Literal["none", "pad", "random-resized"] = "none"
    """Random crop: none, a crop of the padded image (pad), or torchvision's RandomResizedCrop (random-resized)."""
    padding: int = Field(default=4, ge=0)
    """Pixels on each side, for crop: pad; with padding_mode reflect less than the image's side."""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """What the padding holds, for crop: pad: black, or the image mirrored at its edge pixels."""
    scale: Pair = (0.08, 1.0)
    """Smallest and largest share of the image's area, for crop: random-resized."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Smallest and largest width / height, for crop: random-resized."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip; 0: none at all."""
    flip_mode: Literal["random", "alternating"] = "random"
    """Flips are drawn anew in every epoch, or once and then turned over from epoch to epoch (arXiv:2404.00498)."""
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    """One number (brightness, contrast and saturation) or the section."""
    cutout: int = Field(default=0, ge=0)
    """Side in pixels of a square inside the image that is painted in the data set's mean colour; 0: off."""

    @field_validator("color_jitter", mode="before")
    @classmethod
    def _number_to_section(cls, value: Any) -> Any:
        section = color_jitter_section(value)
        if not isinstance(section, dict | ColorJitterConfig):
            raise ValueError("must be one number or a section of brightness, contrast, saturation and hue")
        return section

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, pair: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < pair[0] <= pair[1]:
            raise ValueError("must be positive and in ascending order")
        if info.field_name == "scale" and pair[1] > 1:
            raise ValueError("must not exceed 1, the whole image")
        return pair


class ModelConfig(Section):
    name: str = Field(min_length=1)
    """lenet, alexnet, resnet18 … of models/, or timm/NAME for every model of timm."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of outputs; null: the data set's number of classes."""
    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability; null: the model's own."""


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """Optimizer; muon: for the filters of convolutions, and sgd with Nesterov momentum for all else."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay: decoupled from the gradient for adamw, added to it for sgd. Each step takes away train.lr times
    this share, also from parameters with a learning rate of their own."""
    decay_biases: bool = False
    """Whether weight decay holds for biases and norms too."""
    betas: Pair = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient, for adamw."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator, for adamw."""
    nesterov: bool = True
    """Nesterov momentum, for sgd and muon's filters."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for sgd and muon's filters."""
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

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers of at least 0 and below 1")
        return betas

    @field_validator("momentum")
    @classmethod
    def _nesterov_needs_momentum(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum == 0 and info.data.get("name") != "adamw" and info.data.get("nesterov"):
            raise ValueError("must be above 0 with nesterov=true; set nesterov to false to do without momentum")
        return momentum


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
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, at the global batch; it is not rescaled when the batch size or the world size changes."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of schedules cosine and linear; at most lr."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs, also fractions, of linear warm-up from warmup_lr to lr; at most epochs."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the start of the warm-up; at most lr."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; linear with a warm-up is the triangular schedule."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and its settings."""
    lookahead: LookaheadConfig = LookaheadConfig()
    """Lookahead."""
    proxy: ProxyConfig = ProxyConfig()
    """Choice of the hard samples of each batch."""
    whiten_bias_epochs: int | None = Field(default=None, ge=0)
    """Epochs in which the bias of a whitening first layer is trained; null: all."""
    whiten_bias_anneal: bool = False
    """Whether its learning rate falls linearly to 0 over these epochs, instead of following schedule."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes, in training."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer update."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; null: no clipping."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast type; auto: bf16 on a GPU that has it, else fp16 on a GPU, float32 on the CPU."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = "auto"
    """Mode of torch.compile; auto: chosen by the device."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as one CUDA graph; auto: on one GPU, unless fp16 or compile=reduce-overhead forbid it."""
    channels_last: bool = True
    """Memory format NHWC, which convolutions on tensor cores want."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: every five minutes. One is also written at the end of an epoch."""
    save_every_epochs: int = Field(default=1, ge=1)
    """Epochs between the checkpoints at their ends; the last epoch always ends with one."""
    eval_every_epochs: int = Field(default=1, ge=1)
    """Epochs between evaluations."""

    @field_validator("min_lr", "warmup_lr", "warmup_epochs")
    @classmethod
    def _at_most(cls, value: float, info: ValidationInfo) -> float:
        limit = "epochs" if info.field_name == "warmup_epochs" else "lr"
        if limit in info.data and value > info.data[limit]:
            raise ValueError(f"must not exceed train.{limit}={info.data[limit]}")
        return value


class EvalConfig(Section):
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass; null: data.batch_size."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side that the centre crop keeps: it is resized to round(image_size / crop_fraction)."""
    tta: Literal["none", "flip", "flip-translate"] = "none"
    """Test-time augmentation: logits are means over the image and its mirror image (flip), and also over both shifted
    by a pixel up-left and down-right, which weigh half in all (flip-translate)."""


class WandbConfig(Section):
    project: str | None = Field(default=None, min_length=1)
    """Weights & Biases project; null: W&B is off, except under `wandb agent`, which names the project."""
    entity: str | None = None
    """User or team; null: the login's default."""
    group: str | None = None
    """Group of runs; null: none."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto: online with a login, else offline; a server that does not answer or refuses the key makes a run offline as
    well. The environment variable WANDB_MODE (online, offline, disabled) goes first."""
    tags: Texts = ()
    """Tags of the run."""


class LogConfig(Section):
    every_steps: int = Field(default=50, ge=1)
    """Steps between two lines of training metrics, and between two points of the trackers' curves against step."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Whether to write OUTPUT/NAME/tensorboard, for `tensorboard --logdir OUTPUT`."""
    images: bool = True
    """Whether W&B and TensorBoard, where they are on, get pictures as well: augmented samples at the start,
    predictions and a confusion matrix at the end, which take one more pass over the validation split."""


class Config(Section):
    data: DataConfig
    """The data set and how it is read."""
    aug: AugConfig = AugConfig()
    """Augmentation, in training only."""
    model: ModelConfig
    """What is trained."""
    train: TrainConfig = TrainConfig()
    """Optimisation, precision, checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    log: LogConfig = LogConfig()
    """Console, metrics file, W&B, TensorBoard."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Fixes the initial weights, the order of the samples and their augmentation."""
    output: str = Field(default="output", min_length=1)
    """Folder of all runs; this run writes to OUTPUT/NAME."""
    name: str | None = None
    """Name of the run, a plain file name; null: the config file's name without its ending."""

    @field_validator("name")
    @classmethod
    def _plain_file_name(cls, name: str | None) -> str | None:
        if name is not None and (name in ("", ".", "..") or set(name) & set("/\\\0\n")):
            raise ValueError("must be a plain file name without slashes")
        return name


def is_section(field: FieldInfo) -> bool:
    """Whether the field is a section with fields of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def walk(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of this file; a section is followed by its fields."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from walk(field.annotation, f"{prefix}{name}.")


def documentation() -> str:
    """Return a markdown table of all settings."""
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, field in walk():
        allowed = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", str(field.annotation))
        bounds = [str(bound) for bound in field.metadata if not isinstance(bound, BeforeValidator)]
        default = "required" if field.is_required() else str(field.default).replace("None", "null")
        if is_section(field):
            allowed, default = "section", ""
        cells = (f"`{key}`", ", ".join([allowed, *bounds]).replace("None", "null"), default, field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "or") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(documentation())
