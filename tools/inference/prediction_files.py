"""Build and write the output of tools/predict.py: predictions.npz, predictions.csv and metrics.json."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from tools.common.tables import csv_text, write_file
from tools.inference.image_sets import ImageSet
from train.engine.evaluate import Evaluation
from train.trained_model import TrainedModel


def write_arrays(
    path: Path,
    images: ImageSet,
    classes: Sequence[str],
    logits: np.ndarray,
    top_classes: np.ndarray,
    top_probabilities: np.ndarray,
) -> None:
    """Write predictions.npz: the arrays, the labels and rows of the images, and the names of all classes.

    Unknown labels are -1. Raises UserError if the file cannot be written.
    """
    save = partial(
        np.savez,
        labels=np.full(len(images), -1, np.int64) if images.labels is None else images.labels,
        rows=images.rows,
        classes=np.array(classes),
        logits=logits,
        top_classes=top_classes,
        top_probabilities=top_probabilities,
    )
    write_file(path, save)


def format_table(images: ImageSet, numbers: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """Return the text of predictions.csv.

    The text is written row by row, since a list of dicts takes gigabytes for a large split.

    Args:
        images: The predicted images.
        numbers: The most probable classes of each image, int64 [N, K].
        probabilities: The probabilities of these classes, float32 [N, K].
        classes: The names of all classes.
    """
    best = [f"{what}_{place}" for place in range(1, numbers.shape[1] + 1) for what in ("class", "probability")]

    def line(sample: int, row: int) -> list[object]:
        file = images.files[row] if images.files else ""
        label = classes[int(images.labels[sample])] if images.labels is not None else ""
        pairs = zip(numbers[sample].tolist(), probabilities[sample].tolist(), strict=True)
        cells = [cell for number, probability in pairs for cell in (classes[number], f"{probability:.6g}")]
        return [row, file, label, int(numbers[sample, 0]), *cells]

    lines = (line(sample, row) for sample, row in enumerate(images.rows.tolist()))
    return csv_text(itertools.chain([["row", "file", "label", "number", *best]], lines))


def build_metrics(
    models: Sequence[TrainedModel],
    images: ImageSet,
    tta: str | None,
    each: Sequence[Evaluation],
    mean: Evaluation | None,
) -> dict[str, object]:
    """Return the contents of metrics.json.

    Args:
        models: The models that predicted the images.
        images: The predicted images.
        tta: Test-time augmentation, or None for the eval.tta of each model's config.
        each: The evaluation of each model. Empty if there are no labels.
        mean: The evaluation of the averaged predictions, or None if there are no labels.
    """
    used_tta = [tta or model.config.eval.tta for model in models]
    checkpoints = [
        {
            "path": str(model.path),
            "model": model.config.model.name,
            "image_size": model.dataset.image_size,
            "tta": used_tta[place],
            "data": None if images.files else str(folder),  # converted pictures are deleted
            **_scores(each[place] if each else None),
        }
        for place, (model, folder) in enumerate(zip(models, images.folders, strict=True))
    ]
    return {
        **_scores(mean),
        "samples": len(images),
        "tta": ", ".join(dict.fromkeys(used_tta)),
        "checkpoints": checkpoints,
        "unreadable": [asdict(sample) for sample in images.unreadable],
    }


def _scores(evaluation: Evaluation | None) -> dict[str, float | None]:
    return {key: getattr(evaluation, key, None) for key in ("loss", "top1", "top5")}
