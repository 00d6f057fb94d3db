"""Build the model that --eval evaluates, from a checkpoint of train/ddp.py or weights written by another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from configs.load import parse_config
from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from models import build_from_config
from models.weights import copy_weights, head_layers, read_weights
from train.build import Job
from train.checkpoint import store
from train.checkpoint.finetune import from_checkpoint, inference_config
from train.checkpoint.restore import restore_weights
from train.checkpoint.resume import resolve_resume
from train.checkpoint.store import load_newest_on_all_ranks
from train.distributed import collectives
from train.engine.evaluate import evaluate
from train.engine.state import TrainState
from train.optim.param_groups import inner_network
from train.trained_model import note_limit

# Means and standard deviations used by the homework, for pixel values from 0 to 1. The homework divides the pixels of
# MediumImageNet by 256, not 255, before it subtracts ImageNet's mean.
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_STATS = (
    (0.485 * 256 / 255, 0.456 * 256 / 255, 0.406 * 256 / 255),
    (0.229 * 256 / 255, 0.224 * 256 / 255, 0.225 * 256 / 255),
)


def print_evaluation(job: Job, resume: str | None) -> None:
    """Evaluate the checkpoint to which --resume refers, and print the result on rank 0. All ranks must call this.

    Raises:
        UserError: See `build_for_evaluation`; or the data cannot be read or have changed.
    """
    config, val_loader = job.config, job.val_loader()
    _, candidates = collectives.from_first_rank(lambda: resolve_resume(config, resume))
    state, which = build_for_evaluation(job, candidates, val_loader.image_size)
    result = evaluate(state, val_loader, len(val_loader.split), config.eval.tta)
    if job.ranks.is_first:
        print(f"{which}: {result.sentence(config.data.val_split)}")


def build_for_evaluation(job: Job, candidates: Sequence[Path], image_size: int) -> tuple[TrainState, str]:
    """Build the model to evaluate, and return its training state and a description of its weights for messages.

    Weights written by another program come without a config. For such weights, the model is built from the job's
    config, with as many outputs as their head has, and pixels are normalized as in the homework. All ranks must call
    this function.

    Args:
        job: Config, data set and device of the evaluation.
        candidates: Checkpoints in order of preference. The first intact one is used.
        image_size: Height and width of the images in pixels.

    Raises:
        UserError: There is no intact checkpoint, the model cannot be built, the weights do not match the model or the
            data set, or eval.weights is "ema" but the checkpoint does not contain a moving average.
    """
    config = job.config
    if len(candidates) == 1 and store.is_foreign(candidates[0]):
        return _build_foreign(job, candidates[0], image_size), str(candidates[0])
    if not candidates:
        raise UserError(f"no run {config.name!r} in {config.output!r} has a checkpoint; give --resume PATH")
    source, content = load_newest_on_all_ranks(candidates)
    trained = from_checkpoint(config, content, job.dataset.classes, source)
    if config.data.limit is None:
        note_limit(parse_config(content["config"], f"the config in {source}"), config.data.val_split)
    state = replace(job, config=trained).build_state(image_size, trains=False)
    is_average = restore_weights(state, content, source, config.eval.weights)
    return state, f"{source}{' (moving average)' if is_average else ''}"


def _build_foreign(job: Job, path: Path, image_size: int) -> TrainState:
    config, dataset, weights = job.config, job.dataset, read_weights(path)
    mean, std = CIFAR10_STATS if dataset.source.kind == "cifar10" else IMAGENET_STATS
    classes = len(dataset.classes)
    outputs = _outputs(config, weights, classes, image_size)
    if outputs < classes:
        raise UserError(
            f"the weights {path} have {outputs} outputs, but the data set in {config.data.path} has {classes} classes; "
            "give the data set that they were trained on, or start a run from them with model.pretrained"
        )
    settings = config.model.model_copy(update={"num_classes": outputs})
    homework = inference_config(config.model_copy(update={"model": settings}))
    job = replace(job, config=homework, dataset=replace(dataset, mean=mean, std=std))
    state = job.build_state(image_size, trains=False)
    copy_weights(inner_network(state.network)[1], weights, (), f"the weights {path}")
    extra = f", of which the data set uses the first {classes}" if outputs > classes else ""
    warn(
        f"{path} was written by another program: it is evaluated as {config.model.name} with {outputs} outputs{extra}, "
        f"and pixels are normalized as in the homework, by mean {_rounded(mean)} and std {_rounded(std)}"
    )
    return state


def _outputs(config: Config, weights: dict[str, Tensor], classes: int, image_size: int) -> int:
    """Return the number of outputs of the head in the weights, or `classes` if the weights do not include a head."""
    with torch.device("meta"):
        model = build_from_config(
            config.model, classes, image_size=image_size, mean=CIFAR10_STATS[0], std=CIFAR10_STATS[1]
        )
    for layer in head_layers(model.network):
        if (weight := weights.get(f"{layer}.weight")) is not None and weight.ndim > 0:
            return len(weight)
    return classes


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
