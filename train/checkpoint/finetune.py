"""Load the weights of another run for fine-tuning, and derive configs for models that load a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from configs.load import parse_config
from configs.schema import Config, EmaConfig, LookaheadConfig, ModelConfig, OptimizerConfig, ProxyConfig
from configs.utils.errors import UserError
from models.weights import copy_weights, head_layers
from train.checkpoint import store
from train.checkpoint.code import find_code
from train.checkpoint.resume import find_checkpoints
from train.checkpoint.state import Checkpoint, require_keys


def without_pretrained(config: Config) -> Config:
    """Return the config without model.pretrained and model.finetune, for a model that loads a checkpoint later.

    The weights that these settings refer to may no longer exist, and the checkpoint replaces them anyway.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False, "finetune": None})})


def inference_config(config: Config) -> Config:
    """Return the config without pretrained weights and without the settings that only training needs.

    The optimizer, for example, may be expensive to build, or unavailable on this machine.
    """
    bare = {
        "optimizer": OptimizerConfig(),
        "ema": EmaConfig(),
        "lookahead": LookaheadConfig(),
        "proxy": ProxyConfig(),
        "loss": "cross-entropy",
        "class_weights": None,
        "cuda_graph": "off",
    }
    train, model = config.train.model_copy(update=bare), config.model.model_copy(update={"freeze": ()})
    aug = config.aug.model_copy(update={"custom": None})
    return without_pretrained(config.model_copy(update={"train": train, "model": model, "aug": aug}))


def from_checkpoint(config: Config, checkpoint: Checkpoint, classes: Sequence[str], path: Path) -> Config:
    """Return the config for inference with a checkpoint, see `inference_config`.

    Args:
        config: Config with the data and evaluation settings. Its section `model` is replaced by the checkpoint's, with
            an output for each of `classes`.
        checkpoint: Contents of the checkpoint, from `store.load`.
        classes: Class names of the data set.
        path: Path of the checkpoint, for error messages.

    Raises:
        UserError: The model was trained on different classes, or the checkpoint has no weights or no valid config.
    """
    trained = checkpoint.get("dataset", {}).get("classes")
    if trained is not None and list(trained) != list(classes):
        raise UserError(
            f"{path} was trained on the classes {_summary(trained)}, but the data set in {config.data.path} has "
            f"{_summary(classes)}; give the data set that it was trained on, or start from it with "
            f"model.finetune={path}"
        )
    require_keys(checkpoint, ("model", "config"), path)
    model = parse_config(checkpoint["config"], f"the config in {path}").model
    model = model.model_copy(update={"num_classes": len(classes)})
    return find_code(inference_config(config.model_copy(update={"model": model})), checkpoint, path)


def _summary(classes: Sequence[str]) -> str:
    """Return the first three class names, followed by the number of classes."""
    return f"{', '.join(classes[:3])}{' …' if len(classes) > 3 else ''} ({len(classes)})"


def load_finetune(model: nn.Module, source: str, classes: Sequence[str], settings: ModelConfig | None = None) -> str:
    """Load the weights of a checkpoint into a model, including the mean and std of the pixel normalization.

    If the checkpoint has a moving average, the eval.weights setting in the checkpoint's config decides which weights
    are loaded. The head keeps its initial values if its shape or the class names differ.

    Args:
        model: The model to load into.
        source: A checkpoint or run folder.
        classes: Class names of the data set.
        settings: Model settings of this run. The activation is compared with that of the checkpoint, since the weights
            do not reveal a difference. If None, the activation is not checked.

    Returns:
        A message for the log about the loaded weights.

    Raises:
        UserError: `source` does not contain an intact checkpoint of this program, or the checkpoint is incomplete or
            does not match the model.
    """
    path, checkpoint = store.load_newest(find_checkpoints(Path(source)))
    require_keys(checkpoint, ("model",), path)
    if settings is not None and "config" in checkpoint:
        saved = parse_config(checkpoint["config"], f"the config in {path}").model
        if saved.activation != settings.activation:
            names = [activation or "null" for activation in (saved.activation, settings.activation)]
            raise UserError(
                f"model.finetune={source} was trained with model.activation={names[0]}, this config has {names[1]}; "
                f"set model.activation={names[0]}"
            )
    weights = checkpoint["model"]
    average = checkpoint.get("ema")  # missing in checkpoints of older versions
    if average:
        require_keys(checkpoint, ("config",), path)
    if average and parse_config(checkpoint["config"], f"the config in {path}").eval.weights != "raw":
        weights = average
    trained = checkpoint.get("dataset", {}).get("classes")
    has_other_classes = trained is not None and list(trained) != list(classes)
    loaded = copy_weights(model, weights, head_layers(model), f"the weights of {path}", new_head=has_other_classes)
    return f"fine-tunes: {loaded.summary(path)}"
