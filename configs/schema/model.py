"""Settings of the model and of its initial weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from configs.schema.section import IsPath, Section, Texts


class ModelConfig(Section):
    name: str = Field(min_length=1)
    """lenet, alexnet, resnet18 … of models/, or timm/NAME for every model of timm."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of outputs; null: the data set's number of classes."""
    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability; null: the model's own."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid", "hardswish", "mish"] | None = (
        None
    )
    """Activation function, for the models of models/ and those of timm that take one; null: the model's own."""
    options: dict[str, Any] = Field(default={})
    """More arguments of the model's constructor, such as {width: 16} for a narrow resnet18 or {drop_path_rate: 0.1} for
    a model of timm."""
    pretrained: Annotated[bool | str, IsPath] = False
    """For models of timm: whether to start from its published weights, which must lie in the hub's cache on this
    machine, or the path of a file of weights (.safetensors, .pth); images are then normalised as they want them, as a
    config.json beside the file says it."""
    finetune: Annotated[str | None, IsPath] = Field(default=None, min_length=1)
    """Checkpoint of ours, or a run's folder, whose weights training starts from; a head for other classes is new."""
    freeze: Texts = ()
    """Patterns (as in a shell) of the names of parameters that are not trained, such as network.layer1.*; norms that
    are frozen whole keep their statistics."""
