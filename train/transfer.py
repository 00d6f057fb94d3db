"""Training that starts from a checkpoint of another run. Knows checkpoints' contents, and nothing of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from configs.schema import Config
from models.weights import head_of, take_weights
from train import checkpoint
from train.run_folder import find_checkpoint


def without_start(config: Config) -> Config:
    """The same model with weights as they are drawn, for what loads a checkpoint over them: a resumed run, a tool.

    The files that a run started from need not be there any more.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False, "finetune": None})})


def load_finetune(model: nn.Module, source: str, classes: Sequence[str]) -> str:
    """Load the weights of a checkpoint or run folder, mean and std of the pixels included; in words what was taken.

    Of a run with a moving average it is that which counts. The head starts anew where the checkpoint's classes are
    others than `classes`, also where there are equally many. Raises UserError for anything else that does not fit.
    """
    path = find_checkpoint(Path(source))
    content = checkpoint.load(path)
    weights = {**content["model"], **(content.get("ema") or {})}
    theirs = content.get("dataset", {}).get("classes")
    other_classes = theirs is not None and list(theirs) != list(classes)
    taken = take_weights(model, weights, head_of(model), f"the weights of {path}", new_head=other_classes)
    return f"fine-tunes: {taken.sentence(path)}"
