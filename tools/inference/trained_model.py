"""Load trained models from checkpoints. The data set that a model was trained on is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.load import parse_config
from configs.schema import Config, DataConfig
from configs.utils.errors import UserError
from pipelines.storage.dataset import ModelDataset
from train.build import build_all
from train.checkpoint import store
from train.checkpoint.finetune import inference_config, without_pretrained
from train.checkpoint.restore import restore_weights
from train.checkpoint.resume import find_checkpoints
from train.checkpoint.state import require_keys
from train.engine.state import TrainState


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, ready for evaluation. `state.network` takes uint8 images."""

    path: Path  # the checkpoint
    is_ema: bool  # the weights are the run's moving average
    config: Config
    name: str  # name of the training data set
    classes: tuple[str, ...]
    image_size: int  # height and width in pixels, as in training
    state: TrainState
    epochs: int  # completed epochs
    conversion: dict[str, Any] | None  # fields of the data set's Encoding (pipelines.convert), or None if not recorded
    stored_shape: tuple[int, int, int] | None  # shape of the stored images, or None if it varies or is unknown

    @property
    def title(self) -> str:
        """The path of the checkpoint, marked if the weights are the run's moving average."""
        return f"{self.path} (moving average)" if self.is_ema else str(self.path)

    def eval_data_config(self, folder: str | Path) -> DataConfig:
        """Return the run's data settings with the path set to `folder` and the image size set to that of training."""
        return self.config.data.model_copy(update={"path": str(folder), "image_size": self.image_size})


def load_trained_model(path: Path, device: torch.device, *, compiled: bool = False) -> TrainedModel:
    """Load a model for evaluation, with the weights that eval.weights in its config selects.

    Requires an initialized process group.

    Args:
        path: A run folder or a checkpoint. In a run folder, best.pt is preferred.
        device: Device to load the model to.
        compiled: Whether to compile the model as the run would on this machine, so that its logits are bitwise equal to
            those of the run's evaluations.

    Raises:
        UserError: There is no intact checkpoint, the checkpoint was written by another program or by an older version
            that did not record the classes, or its contents are invalid.
    """
    path, content = store.load_newest(find_checkpoints(path))
    facts = content.get("dataset")
    if facts is None:
        raise UserError(
            f"checkpoint {path} does not name its classes (it was written by an older version); train it again"
        )
    require_keys(content, ("model", "config", "position"), path)
    _check_dataset(facts, path)
    dataset = ModelDataset(facts["name"], tuple(facts["classes"]), _triple(facts["mean"]), _triple(facts["std"]))
    config = parse_config(content["config"], f"the config in {path}")
    train = config.train.model_copy(update={"cuda_graph": "off", **({} if compiled else {"compile": "off"})})
    config = without_pretrained(config.model_copy(update={"train": train}))
    state = build_all(inference_config(config), dataset, facts["image_size"], device, trains=False)
    is_average = restore_weights(state, content, path, config.eval.weights)
    state.network.eval()
    position = content["position"]
    return TrainedModel(
        path=path,
        is_ema=is_average,
        config=config,
        name=dataset.name,
        classes=dataset.classes,
        image_size=facts["image_size"],
        state=state,
        epochs=position["epoch"],
        conversion=facts.get("conversion"),
        stored_shape=(shape[0], shape[1], shape[2]) if (shape := facts.get("image_shape")) else None,
    )


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _check_dataset(facts: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the "dataset" entry of a checkpoint is incomplete or invalid."""
    require_keys(facts, ("name", "classes", "mean", "std", "image_size"), path)
    is_text = {"name": isinstance(facts["name"], str), "classes": _is_list_of(str, facts["classes"])}
    are_numbers = {name: _is_list_of((int, float), facts[name]) and len(facts[name]) == 3 for name in ("mean", "std")}
    is_size = {"image_size": type(facts["image_size"]) is int and facts["image_size"] > 0}
    if wrong := [name for name, is_right in (is_text | are_numbers | is_size).items() if not is_right]:
        raise UserError(
            f"checkpoint {path} cannot be read (its dataset's {wrong[0]!r} is {facts[wrong[0]]!r:.60}); use another one"
        )


def _is_list_of(kind: type | tuple[type, ...], values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(isinstance(value, kind) for value in values)


def check_same_classes(trained: TrainedModel, classes: tuple[str, ...], what: str) -> None:
    """Raise UserError unless the model was trained on `classes` in the same order.

    `what` is the name of the data set or checkpoint with these classes, for the message.
    """
    if trained.classes == classes:
        return
    numbers = f"{len(trained.classes)} and {len(classes)}"
    different = next(
        (i for i, pair in enumerate(zip(trained.classes, classes, strict=False)) if pair[0] != pair[1]), None
    )
    where = (
        f"number {different} is {trained.classes[different]!r} and {classes[different]!r}"
        if different is not None
        else "the others agree"
    )
    raise UserError(
        f"{trained.path} and {what} differ in their classes ({numbers} of them; {where}); use a checkpoint that was "
        "trained on these classes"
    )
