"""Tests of tools/show.py: plots and tables agree with the model, the data loader and the data set."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from helpers.memory_source import MemoryRows, write
from helpers.training import CPU, DIGITS, Run, alone
from pipelines import build_eval_loader, build_train_loader
from pipelines.convert.source import Source
from pipelines.interfaces import Position
from pipelines.loader.batches import MixedBatch
from pipelines.storage.open import open_split
from tools import show
from tools.visualize.samples import augmented_samples
from tools.visualize.subset import load_images
from train.engine.evaluate import evaluate, predictions
from train.engine.losses import mix_images, swap_pairs
from train.reporting import figures, image_grids
from train.trained_model import load_trained_model


def run_tool(*arguments: str | Path) -> dict[str, Figure]:
    """Run the tool in this process on the CPU. Return the saved figures by file name."""
    drawn: dict[str, Figure] = {}
    save = figures.save

    def note(figure: Figure, path: Path) -> None:
        drawn[path.name] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["show.py", *map(str, arguments)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(figures, "save", note)
        show.main()
    return drawn


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class Shown:
    """Results of the tool on the digits, and the same model's predictions by the functions of train/."""

    def __init__(self, run: Run, folder: Path, output: str, drawn: dict[str, Figure]) -> None:
        self.folder, self.output, self.drawn = folder, output, drawn
        with alone() as device:
            trained = load_trained_model(run.folder, device)
            loader = build_eval_loader(trained.config.data, trained.config.eval, device=device)
            self.evaluation = evaluate(trained.state, loader, 360)
            pairs = list(predictions(trained.state, loader))
        self.classes = trained.dataset.classes
        self.logits, self.labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        self.predicted = self.logits.argmax(1)


@pytest.fixture(scope="module")
def shown(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
        drawn = run_tool("--checkpoint", digits_run.folder, "--count", "30", "--out", folder)
    return Shown(digits_run, folder, "\n".join(lines), drawn)


@pytest.mark.slow
def test_printed_accuracy_equals_evaluation(shown: Shown) -> None:
    result = shown.evaluation
    expected = f"val loss {result.loss:.4f}, top1 {result.top1:.4f}, top5 {result.top5:.4f} over 360 samples"
    assert expected in shown.output
    assert result.top1 == accuracy_score(shown.labels, shown.predicted)


@pytest.mark.parametrize("name", ["predictions", "mistakes"])
def test_tables_and_plots_show_each_samples_prediction(shown: Shown, digits_run: Run, name: str) -> None:
    rows = table(shown.folder / f"{name}.csv")
    samples = [int(row["sample"]) for row in rows]
    assert len(set(samples)) == len(samples) > 0
    assert [int(row["true_label"]) for row in rows] == shown.labels[samples].tolist()
    assert [int(row["predicted_label"]) for row in rows] == shown.predicted[samples].tolist()
    confidence = shown.logits.softmax(1).max(1).values[samples]
    assert torch.allclose(torch.tensor([float(row["probability"]) for row in rows]), confidence, atol=1e-5)

    axes = [axis for axis in shown.drawn[f"{name}.png"].axes if axis.get_images()]
    pixels, row_of = open_split(digits_run.data, "val").pixel_rows()
    assert len(axes) == len(rows)
    for axis, row, sample in zip(axes, rows, samples, strict=True):
        assert np.array_equal(axis.get_images()[0].get_array(), pixels[row_of[sample]].reshape(32, 32, 3))
        assert axis.get_title() == f"{float(row['probability']):.0%} {row['prediction']}\ntrue: {row['truth']}"
        right = row["prediction"] == row["truth"]
        assert axis.title.get_color() == (figures.RIGHT if right else figures.WRONG)


def test_mistakes_are_wrong_and_sorted_by_confidence(shown: Shown) -> None:
    rows = table(shown.folder / "mistakes.csv")
    confidence = [float(row["probability"]) for row in rows]
    wrong = shown.predicted != shown.labels
    assert all(row["truth"] != row["prediction"] for row in rows)
    assert confidence == sorted(confidence, reverse=True)
    assert len(rows) == min(30, int(wrong.sum()))
    assert confidence[0] == pytest.approx(float(shown.logits.softmax(1).max(1).values[wrong].max()), abs=1e-5)


def test_class_scores_equal_scikit_learn(shown: Shown) -> None:
    report: dict[str, Any] = classification_report(
        shown.labels, shown.predicted, labels=range(10), output_dict=True, zero_division=0
    )
    rows = table(shown.folder / "classes.csv")
    names = [str(label) for label in range(10)] + ["macro avg", "weighted avg"]
    assert [row["class"] for row in rows[:10]] == list(shown.classes)
    for row, name in zip(rows, names, strict=True):
        for column, key in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score"), ("support",) * 2):
            assert float(row[column]) == pytest.approx(report[name][key])
    bars = [bar.get_width() for bar in shown.drawn["classes.png"].axes[0].patches]
    assert bars == sorted((float(row["f1"]) for row in rows[:10]), reverse=True)
    assert "macro mean" in shown.output


def test_confusions_equal_scikit_learn(shown: Shown) -> None:
    expected = confusion_matrix(shown.labels, shown.predicted, labels=range(10))
    matrix = table(shown.folder / "confusion.csv")
    assert [[int(value) for value in list(row.values())[1:]] for row in matrix] == expected.tolist()
    pairs = table(shown.folder / "confused.csv")
    numbers = [int(row["samples"]) for row in pairs]
    assert numbers == sorted(numbers, reverse=True)
    assert sum(numbers) == expected.sum() - expected.trace()
    for row in pairs:
        true, guess = int(row["truth"]), int(row["prediction"])
        assert int(row["samples"]) == expected[true, guess]
        assert float(row["share_of_true_class"]) == pytest.approx(expected[true, guess] / expected[true].sum())


@pytest.mark.slow
def test_seed_selects_the_samples(shown: Shown, digits_run: Run, tmp_path: Path) -> None:
    chosen = {}
    for seed in (0, 1):
        run_tool("--checkpoint", digits_run.folder, "--count", "5", "--seed", str(seed), "--out", tmp_path)
        chosen[seed] = table(tmp_path / "predictions.csv")
    assert chosen[0] == table(shown.folder / "predictions.csv")[:5]
    assert chosen[1] != chosen[0]


def test_unlabelled_split_only_has_predictions(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = MemoryRows(20)
    labelled.labels = np.arange(20) % 10
    splits: Any = {"val": labelled, "test": MemoryRows(7, labelled=False)}
    write(Source("memory", "tests", tuple("0123456789"), "0" * 64, splits), tmp_path / "data")
    arguments = ("--checkpoint", digits_run.folder, "--data-path", tmp_path / "data", "--out", tmp_path / "out")
    run_tool(*arguments, "--split", "test")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.png", "predictions.csv"}
    rows = table(tmp_path / "out" / "predictions.csv")
    assert sorted(int(row["sample"]) for row in rows) == list(range(7))
    assert {row["truth"] for row in rows} == {""}
    printed = capsys.readouterr().out
    assert "has no labels" in printed
    assert "splits with labels: val" in printed
    with pytest.raises(UserError, match="has no split 'dev'"):
        run_tool(*arguments, "--split", "dev")


def test_data_set_with_other_classes_is_refused(digits_run: Run, npy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="differ in their classes"):
        run_tool("--checkpoint", digits_run.folder, "--data-path", npy_data, "--out", tmp_path)


def training_config(data: Path, **settings: Any) -> Config:
    """Return a config with random crops and batches of 64."""
    aug = {"aug.crop": "pad", "data.batch_size": 64, "data.path": str(data)}
    return load_config(DIGITS, [], **{**aug, **settings})


def test_samples_are_the_train_loaders_first_batch(npy_data: Path, tmp_path: Path) -> None:
    options = ("--epoch", "4", "--count", "12", "--opts", "aug.crop=pad", "data.batch_size=64", "seed=5")
    drawn = run_tool("--cfg", DIGITS, "--data-path", npy_data, "--out", tmp_path, *options)
    config = training_config(npy_data, seed=5)
    loader = build_train_loader(config.data, config.aug, seed=5, device=CPU)
    loader.position = Position(3)
    images, labels = next(iter(loader))
    rows = table(tmp_path / "samples.csv")
    assert [int(row["label"]) for row in rows] == labels[:12].tolist()
    assert [int(row["sample"]) for row in rows] == loader.plan.indices(3, 0)[:12].tolist()

    axes = [axis for axis in drawn["samples.png"].axes if axis.get_images()]
    shown = np.stack([axis.get_images()[0].get_array() for axis in axes if axis.get_title() == "epoch 4"])
    assert np.array_equal(shown, image_grids.to_numpy(images[:12]))
    names = [axis.get_title() for axis in axes if axis.get_title().startswith("class")]
    assert names == [row["class"] for row in rows]


def test_samples_in_several_epochs_equal_training(npy_data: Path) -> None:
    config = training_config(npy_data)
    samples, rows = augmented_samples(config, [3, 5, 0], 40, CPU)
    for epoch, row in zip((3, 5, 0), rows, strict=True):
        loader = build_train_loader(config.data, config.aug, seed=config.seed, device=CPU)
        loader.position = Position(epoch)
        trained = {
            int(sample): image
            for step, batch in enumerate(loader)
            for sample, image in zip(loader.plan.indices(epoch, step), batch.images.clone(), strict=True)
        }
        seen = [
            (image, trained[sample])
            for sample, image in zip(samples.tolist(), row.images, strict=True)
            if sample in trained
        ]
        assert len(seen) > 30  # the last samples of an epoch are dropped
        assert all(torch.equal(image, other) for image, other in seen)
    assert not torch.equal(rows[0].images, rows[1].images)


@pytest.mark.slow
def test_mixed_samples_show_model_input_and_mixed_classes(npy_data: Path, tmp_path: Path) -> None:
    mix = ["aug.mix.mixup=0.8", "aug.mix.cutmix=1", "aug.mix.mode=elem", "aug.mix.off_epoch=4"]
    options = ("--epoch", "4", "5", "--count", "13", "--opts", "aug.crop=pad", "data.batch_size=64", *mix)
    drawn = run_tool("--cfg", DIGITS, "--data-path", npy_data, "--out", tmp_path, *options)
    config = training_config(npy_data, **{"aug.mix": {"mixup": 0.8, "cutmix": 1, "mode": "elem", "off_epoch": 4}})
    loader = build_train_loader(config.data, config.aug, seed=config.seed, device=CPU)
    loader.position = Position(3)
    batch = next(iter(loader))
    assert isinstance(batch, MixedBatch)
    mixed = mix_images(batch.images, batch.mix).round().to(torch.uint8)[:13]
    axes = [axis for axis in drawn["samples.png"].axes if axis.get_images()]
    ours = [axis for axis in axes if axis.get_title().startswith("epoch 4")]
    assert np.array_equal(np.stack([axis.get_images()[0].get_array() for axis in ours]), image_grids.to_numpy(mixed))
    rows = table(tmp_path / "samples.csv")
    classes = open_split(npy_data, "train").classes
    for row, axis, label, other, share in zip(
        rows, ours, batch.labels, swap_pairs(batch.labels), batch.mix[:, 0], strict=False
    ):
        parts = f"{classes[label]} {share:.2f} + {classes[other]} {1 - share:.2f}"
        assert row["epoch 4"] == parts
        assert " ".join(axis.get_title().split()) == f"epoch 4 {parts}"
        assert row["epoch 5"] == row["class"]  # no longer mixed


def test_selected_samples_keep_the_given_order(npy_data: Path) -> None:
    config = training_config(npy_data)
    samples = np.random.default_rng(0).permutation(700)[:300]  # more than one batch
    pixels, row_of = open_split(npy_data, "train").pixel_rows()
    images = load_images(config.data, config.eval, "train", samples, CPU)
    assert np.array_equal(image_grids.to_numpy(images), pixels[row_of[samples]].reshape(-1, 32, 32, 3))


@pytest.mark.parametrize("data", ["npy_data", "jpeg_data"])
def test_class_counts_match_the_labels(
    data: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(data)
    drawn = run_tool("--data-path", path, "--out", tmp_path)
    rows = table(tmp_path / "class-counts.csv")
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        labels = open_split(path, split).labels
        assert labels is not None
        counts = np.bincount(labels, minlength=12)
        assert [int(row[f"{split} samples"]) for row in rows] == counts.tolist()
        line = next(line for line in printed.splitlines() if line.startswith(f"| {split} "))
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[5:8] == [str(counts.min()), f"{np.median(counts):.4g}", str(counts.max())]
    assert "test samples" not in rows[0]
    captions = [axis.get_title() for axis in drawn["examples.png"].axes if axis.get_images()]
    assert captions == [row["class"] for row in table(tmp_path / "examples.csv")] == [f"class {n}" for n in range(12)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --checkpoint RUN for predictions, a config FILE for training samples, or --data-path"),
        (["--checkpoint", "RUN", "--cfg", "FILE"], "--checkpoint and a config cannot be combined"),
        (["--cfg", "FILE", "--split", "val"], "--split goes with --checkpoint, not with --cfg; leave it out"),
        (["--checkpoint", "RUN", "--epoch", "1"], "--epoch goes with --cfg, not with --checkpoint"),
        (["--data-path", "DIR", "--opts", "seed=1"], "--opts goes with --cfg, not with --data-path"),
        (["--cfg", "FILE", "--seed", "1"], "--seed goes with --checkpoint or --data-path, not with --cfg; .* seed=1"),
        (["--data-path", "DIR", "--count", "0"], "--count=0 is not a positive whole number"),
        (["--data-path", "DIR", "--seed", "-1"], "--seed=-1 is negative"),
        (["--cfg", "FILE", "--epoch", "2", "-3"], "--epoch=-3 is not an epoch"),
        (["missing.yaml", "seed=1"], "missing.yaml cannot be read"),
        (["--checkpoint", "RUN", "FILE"], "--checkpoint and a config cannot be combined"),
        (["--checkpoint", "missing"], "missing"),
        (["--data-path", "missing"], "data set folder 'missing' does not exist .relative to /"),
    ],
)
def test_incompatible_options_are_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run_tool(*arguments)


def test_unwritable_output_folder_is_refused(npy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --out"):
        run_tool("--data-path", npy_data, "--out", tmp_path / "file" / "x")
