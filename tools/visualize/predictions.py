"""Plot a trained model's predictions: random samples, the most confident mistakes, confusions and class scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from pipelines.storage.dataset import load_dataset
from tools.common.tables import Row, make_folder, markdown, write_csv
from tools.inference.ensemble import predict
from tools.inference.image_sets import dataset_folder, load_split
from tools.inference.trained_model import load_trained_model
from tools.visualize.subset import load_images
from train.distributed.process_group import Ranks, process_group
from train.reporting import figures, image_grids

MAX_PRINTED_CLASSES = 20  # if there are more, only the best and the worst are printed
BEST_AND_WORST = 5
MAX_PRINTED_PAIRS = 10


def show_predictions(
    checkpoint: Path, ranks: Ranks, split: str | None, data_path: str | None, count: int, seed: int, out: Path | None
) -> None:
    """Plot the predictions for a split, write a CSV file for each plot, and print scores and confusions.

    If the split has no labels, only random samples are plotted.

    Args:
        checkpoint: A run folder or a checkpoint.
        ranks: Rank and world size of this process. The world size must be 1.
        split: The split to predict, or None for the run's data.val_split.
        data_path: Folder of the data set, or None for the run's data.path.
        count: Maximum number of images per plot.
        seed: Seed for the choice of random samples.
        out: Output folder, or None for show-SPLIT beside the checkpoint.

    Raises:
        UserError: The checkpoint or the split cannot be read or do not match, or a file cannot be written.
    """
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
    classes = trained.classes
    random_title = f"{title}: random samples"
    draw_predictions(folder, "predictions", pixels[: len(random)], random, logits, labels, classes, random_title)
    if not evaluations:
        splits = load_dataset(path).splits
        labelled = ", ".join(name for name, entry in splits.items() if entry.labelled) or "none"
        print(
            f"split {split!r} of {path} has no labels, so there are no mistakes and no scores to show; splits with "
            f"labels: {labelled}\nwrote {folder / 'predictions.png'} and .csv"
        )
        return
    mistakes_title = f"{title}: most confident mistakes"
    draw_predictions(folder, "mistakes", pixels[len(random) :], worst, logits, labels, classes, mistakes_title)
    predicted, _ = image_grids.predicted_classes(logits)
    (evaluation,) = evaluations
    print(f"{trained.path}: {evaluation.sentence(split)}")
    write_scores(folder, labels, predicted, classes, title)
    write_confusions(folder, labels, predicted, classes, title)
    print(f"\nplots and their data are in {folder}")


def confident_mistakes(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return the indices of the misclassified samples, int64 [N], in order of decreasing confidence.

    Samples without a label are ignored.
    """
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
    """Write the images with their predictions as NAME.png, and the predictions as NAME.csv.

    Args:
        folder: Output folder.
        name: File name without suffix.
        images: Images of `samples`, uint8 [N, 3, H, W].
        samples: Indices of the samples in the split, int64 [N].
        logits: Logits of the whole split.
        labels: Labels of the whole split, -1 if unknown.
        classes: Names of the classes.
        title: Title of the figure.
    """
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
    """Write the scores of each class to classes.csv, plot F1 in classes.png, and print a table of the scores."""
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
    """Return a row per class with precision, recall, F1 and support (number of samples). Undefined scores are 0."""
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
    """Return two rows: the unweighted mean of each score over the classes, and the mean weighted by support."""
    support = [row["support"] for row in scores]
    rows: list[Row] = []
    for name, weights in (("macro mean", None), ("weighted mean", support)):
        keys = ("precision", "recall", "f1")
        means = {key: float(np.average([row[key] for row in scores], weights=weights)) for key in keys}
        rows.append({"label": None, "class": name, **means, "support": sum(support)})
    return rows


def write_confusions(folder: Path, labels: Tensor, predicted: Tensor, classes: tuple[str, ...], title: str) -> None:
    """Write confusion.png, confusion.csv (the matrix) and confused.csv (pairs of classes, most often confused first).

    Also print the most frequent pairs.
    """
    counts = image_grids.confusion_counts(labels, predicted, len(classes))
    figures.save(figures.confusion_matrix(counts, classes, f"{title}: confusion"), folder / "confusion.png")
    columns = [f"{label} {name}" for label, name in enumerate(classes)]  # names alone may not be unique
    matrix = [
        {"true class": name, **dict(zip(columns, row, strict=True))}
        for name, row in zip(columns, counts.tolist(), strict=True)
    ]
    write_csv(folder / "confusion.csv", matrix)
    pairs = confused_pairs(counts, classes)
    write_csv(folder / "confused.csv", pairs)
    if pairs:
        print(f"\nmost often confused, of {len(pairs)} pairs:")
        print(markdown(pairs[:MAX_PRINTED_PAIRS]))


def confused_pairs(counts: np.ndarray, classes: tuple[str, ...]) -> list[Row]:
    """Return a row for each pair of true class and wrongly predicted class that occurs, the most frequent first.

    `counts` is the confusion matrix, int64 [C, C], with a row per true class.
    """
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
