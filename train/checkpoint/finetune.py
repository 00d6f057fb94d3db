"""Training that starts from a checkpoint of another run, and what a model is built from that one is loaded into.

Knows checkpoints' contents, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from configs.load import parse_config
from configs.schema import Config, EmaConfig, LookaheadConfig, ModelConfig, OptimizerConfig, ProxyConfig
from configs.utils.errors import UserError
from models.weights import copy_weights, head_layers
from train.checkpoint import store
from train.checkpoint.run_dir import find_checkpoints
from train.checkpoint.state import require_keys


def without_pretrained(config: Config) -> Config:
    """The same model with weights as they are drawn, for what loads a checkpoint over them: a resumed run, a tool.

    The files that a run started from need not be there any more.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False, "finetune": None})})


def inference_config(config: Config) -> Config:
    """The same model for evaluation alone: without what only training needs, which may be dear, or not to be had on
    this machine."""
    bare = {"optimizer": OptimizerConfig(), "ema": EmaConfig(), "lookahead": LookaheadConfig(), "proxy": ProxyConfig(),
            "cuda_graph": "off"}  # fmt: skip
    train, model = config.train.model_copy(update=bare), config.model.model_copy(update={"freeze": ()})
    return without_pretrained(config.model_copy(update={"train": train, "model": model}))


def from_checkpoint(config: Config, content: dict[str, Any], classes: Sequence[str], path: Path) -> Config:
    """`inference_config` with the model that the checkpoint holds, whatever the config says of it.

    Raises UserError where it was trained on other classes than the data set's.
    """
    theirs = content.get("dataset", {}).get("classes")
    if theirs is not None and list(theirs) != list(classes):
        raise UserError(
            f"{path} was trained on the classes {_some(theirs)}, but the data set in {config.data.path} has "
            f"{_some(classes)}; give the data set that it was trained on, or start from it with model.finetune={path}"
        )
    require_keys(content, ("model", "config"), path)
    model = parse_config(content["config"], f"the config in {path}").model
    return inference_config(config.model_copy(update={"model": model}))


def _some(classes: Sequence[str]) -> str:
    """The first ones and their number."""
    return f"{', '.join(classes[:3])}{' …' if len(classes) > 3 else ''} ({len(classes)})"


def load_finetune(model: nn.Module, source: str, classes: Sequence[str], settings: ModelConfig | None = None) -> str:
    """Load the weights of a checkpoint or run folder, mean and std of the pixels included; in words what was taken.

    Of a run with a moving average those that its eval.weights names. The head starts anew where the checkpoint's
    classes are others than `classes`, also where there are equally many. Raises UserError for anything else that does
    not fit, an activation other than that in `settings` included, which weights do not show.
    """
    path, content = store.load_newest(find_checkpoints(Path(source)))
    require_keys(content, ("model",), path)
    if settings is not None and "config" in content:
        then = parse_config(content["config"], f"the config in {path}").model
        if then.activation != settings.activation:
            names = [activation or "null" for activation in (then.activation, settings.activation)]
            raise UserError(
                f"model.finetune={source} was trained with model.activation={names[0]}, this config has {names[1]}; "
                f"set model.activation={names[0]}"
            )
    weights: dict[str, Any] = content["model"]
    average = content.get("ema")  # missing in checkpoints of older versions
    if average:
        require_keys(content, ("config",), path)
    if average and parse_config(content["config"], f"the config in {path}").eval.weights != "raw":
        weights = average
    theirs = content.get("dataset", {}).get("classes")
    other_classes = theirs is not None and list(theirs) != list(classes)
    taken = copy_weights(model, weights, head_layers(model), f"the weights of {path}", new_head=other_classes)
    return f"fine-tunes: {taken.summary(path)}"
