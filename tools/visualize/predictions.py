"""A trained model on a split: random predictions, the most confident mistakes, confusions, and each class's scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from pipelines.storage.split import load_dataset
from tools.common.tables import Row, make_folder, markdown, write_csv
from tools.inference.ensemble import predict
from tools.inference.image_sets import dataset_folder, load_split
from tools.inference.trained_model import load_trained_model
from tools.visualize.subset import load_images
from train.distributed.process_group import Ranks, process_group
from train.reporting import figures, image_grids

MAX_PRINTED_CLASSES = 20  # up to so many are printed, of more the best and the worst
BEST_AND_WORST = 5
MAX_PRINTED_PAIRS = 10  # printed


def show_predictions(
    checkpoint: Path, ranks: Ranks, split: str | None, data_path: str | None, count: int, seed: int, out: Path | None
) -> None:
    """All pictures of a labelled split, each with its CSV; of a split without labels only predictions."""
    with process_group(ranks) as device:
        trained = load_trained_model(checkpoint, device)
        split = split or trained.config.data.val_split
        path = dataset_folder(trained, data_path)
        images = load_split(split, [trained], [path])
        folder = make_folder(out or trained.path.parent / f"show-{split}")
        values, evaluations, _ = predict([trained], images, None, None)
        logits = torch.from_numpy(values)
        labels = torch.full((len(images),), -1) if images.labels is None else torch.from_numpy(images.labels)
        random = np.random.default_rng(seed).permutation(len(labels))[:count]
        worst = confident_mistakes(logits, labels)[:count]
        pixels = load_images(
            trained.eval_data_config(path), trained.config.eval, split, np.concatenate([random, worst]), device
        )

    title = f"{trained.config.name}, {split}"
    draw_predictions(folder, "predictions", pixels[: len(random)], random, logits, labels, trained.classes,
                     f"{title}: random samples")  # fmt: skip
    if not evaluations:
        splits = load_dataset(path)["splits"]
        labelled = ", ".join(name for name, entry in splits.items() if entry["labelled"]) or "none"
        print(f"split {split!r} of {path} has no labels, so there are no mistakes and no scores to show; "
              f"splits with labels: {labelled}\n{folder / 'predictions.png'} and .csv are drawn")  # fmt: skip
        return
    draw_predictions(folder, "mistakes", pixels[len(random) :], worst, logits, labels, trained.classes,
                     f"{title}: most confident mistakes")  # fmt: skip
    predicted, _ = image_grids.predicted_classes(logits)
    (evaluation,) = evaluations
    print(f"{trained.path}: {evaluation.sentence(split)}")
    write_scores(folder, labels, predicted, trained.classes, title)
    write_confusions(folder, labels, predicted, trained.classes, title)
    print(f"\npictures and their figures lie in {folder}")


def confident_mistakes(logits: Tensor, labels: Tensor) -> np.ndarray:
    """The samples whose prediction is wrong, the most probable first: int64 [mistakes]."""
    predicted, probabilities = image_grids.predicted_classes(logits)
    wrong = torch.nonzero((predicted != labels) & (labels >= 0))[:, 0]
    return wrong[probabilities[wrong].argsort(descending=True, stable=True)].numpy()


def draw_predictions(
    folder: Path,
    name: str,
    images: Tensor,
    samples: np.ndarray,
    logits: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    title: str,
) -> None:
    """NAME.png and NAME.csv of these samples; images are theirs, logits and labels those of the whole split."""
    logits, labels = logits[samples], labels[samples]
    figures.save(image_grids.prediction_grid(images, labels, logits, classes, title), folder / f"{name}.png")
    rows: list[Row] = []
    columns = (
        samples.tolist(),
        labels.tolist(),
        *(values.tolist() for values in image_grids.predicted_classes(logits)),
    )
    for sample, label, predicted, probability in zip(*columns, strict=True):
        truth = {"true_label": label, "truth": classes[label]} if label >= 0 else {"true_label": None, "truth": None}
        guess = {"predicted_label": predicted, "prediction": classes[predicted], "probability": probability}
        rows.append({"sample": sample, **truth, **guess})
    write_csv(folder / f"{name}.csv", rows)


def write_scores(folder: Path, labels: Tensor, predicted: Tensor, classes: tuple[str, ...], title: str) -> None:
    """classes.csv, classes.png and a short table: what cannot be computed, since a class never occurs, counts as 0."""
    scores = class_scores(labels, predicted, classes)
    means = mean_scores(scores)
    write_csv(folder / "classes.csv", scores + means)
    picture = figures.ranked_bars([row["f1"] for row in scores], classes, "F1", f"{title}: F1 of each class")
    figures.save(picture, folder / "classes.png")
    shown = scores
    if len(scores) > MAX_PRINTED_CLASSES:
        shown = sorted(scores, key=lambda row: (-row["f1"], -row["recall"]))
        print(f"\n{BEST_AND_WORST} best and {BEST_AND_WORST} worst of {len(scores)} classes:")
        shown = shown[:BEST_AND_WORST] + shown[-BEST_AND_WORST:]
    print(markdown(shown + means))


def class_scores(labels: Tensor, predicted: Tensor, classes: tuple[str, ...]) -> list[Row]:
    """A row per class: precision, recall, F1 and support (samples that have it)."""
    columns = precision_recall_fscore_support(
        labels.numpy(), predicted.numpy(), labels=range(len(classes)), zero_division=0
    )
    return [
        {"label": label, "class": name, "precision": precision, "recall": recall, "f1": f1, "support": int(support)}
        for label, (name, precision, recall, f1, support) in enumerate(
            zip(classes, *(column.tolist() for column in columns), strict=True)
        )
    ]


def mean_scores(scores: list[Row]) -> list[Row]:
    """Two rows: the mean over classes, and the mean weighted by their support."""
    support = [row["support"] for row in scores]
    names = ("precision", "recall", "f1")
    return [
        {"label": None, "class": name, **{key: float(np.average([row[key] for row in scores], weights=weights))
                                          for key in names}, "support": sum(support)}
        for name, weights in (("macro mean", None), ("weighted mean", support))
    ]  # fmt: skip


def write_confusions(folder: Path, labels: Tensor, predicted: Tensor, classes: tuple[str, ...], title: str) -> None:
    """confusion.png, confusion.csv (the matrix), and confused.csv: its cells off the diagonal, the fullest first."""
    counts = image_grids.confusion_counts(labels, predicted, len(classes))
    figures.save(figures.confusion_matrix(counts, classes, f"{title}: confusion"), folder / "confusion.png")
    columns = [f"{label} {name}" for label, name in enumerate(classes)]  # names alone need not differ
    matrix = [{"true class": name, **dict(zip(columns, row, strict=True))}
              for name, row in zip(columns, counts.tolist(), strict=True)]  # fmt: skip
    write_csv(folder / "confusion.csv", matrix)
    pairs = confused_pairs(counts, classes)
    write_csv(folder / "confused.csv", pairs)
    if pairs:
        print(f"\nmost often confused, of {len(pairs)} pairs:")
        print(markdown(pairs[:MAX_PRINTED_PAIRS]))


def confused_pairs(counts: np.ndarray, classes: tuple[str, ...]) -> list[Row]:
    """A row per pair of true and predicted class that occurs, the most frequent first; counts: int64 [C, C]."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = counts.sum(axis=1)
    cells = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return [
        {
            "truth": classes[true],
            "prediction": classes[guess],
            "samples": int(wrong[true, guess]),
            "share_of_true_class": float(wrong[true, guess] / totals[true]),
        }
        for true, guess in zip(*np.unravel_index(cells, wrong.shape), strict=True)
    ]
