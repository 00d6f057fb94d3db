"""Tests of tools.runs.records."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from helpers.run_folders import make_run, metrics_line
from helpers.training import DIGITS
from tools.runs.records import comparison_rows, find_runs, read_run, run_labels


def test_table_has_differing_settings_and_results(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", "aug.flip=0", "train.optimizer.betas=[0.9,0.95]", batch=256),
        make_run(
            tmp_path / "b", "aug.flip=0.5", "data.threads=1", lines=[metrics_line(0), metrics_line(1, epoch_time_s=6.0)]
        ),
    ]
    first, second = comparison_rows([read_run(folder) for folder in folders], ["a", "b"])
    assert list(first) == [
        "run", "status", "model", "lr", "optimizer", "weight_decay", "epochs", "global_batch", "aug.flip",
        "train.optimizer.betas", "best_val_top1", "best_epoch", "train_top1", "train_loss", "training_time_s",
        "images_per_s", "memory_gib", "time_ratio",
    ]  # fmt: skip
    assert (first["aug.flip"], first["train.optimizer.betas"], first["global_batch"]) == (0.0, "[0.9,0.95]", 256)
    assert (first["best_val_top1"], first["best_epoch"]) == (0.4, 3)
    assert (second["training_time_s"], second["images_per_s"], second["memory_gib"]) == (8.0, 150.0, 2.0)


def test_unrecorded_global_batch_falls_back_to_batch_per_rank(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", batch=None), make_run(tmp_path / "b", "train.accumulation_steps=2")]
    rows = comparison_rows([read_run(folder) for folder in folders], ["a", "b"])
    assert [row["batch_per_rank"] for row in rows] == [64, 128]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"lenet": ["train.lr=1e-3"], "alexnet": ["train.lr=1e-2"]}, ["lenet", "alexnet"]),
        ({"x" * 40: ["train.lr=1e-3"], "y" * 40: ["train.lr=1e-2"]}, ["train.lr=0.001", "train.lr=0.01"]),
        ({"run": ["name=run", "seed=1"], "run-2": ["name=run", "seed=2"]}, ["seed=1", "seed=2"]),
        ({"run": ["name=run"], "run-2": ["name=run"]}, ["run", "run-2"]),
        ({"a/run": ["aug.flip=0"], "b/run": ["aug.flip=0.5"]}, ["aug.flip=0", "aug.flip=0.5"]),
    ],
    ids=["short names", "long names", "numbered names", "nothing differs", "same names"],
)
def test_labels_show_differing_settings(runs: dict[str, list[str]], expected: list[str], tmp_path: Path) -> None:
    records = []
    for name, settings in runs.items():
        folder = make_run(tmp_path / name)
        named = {"name": Path(name).name} if not any(text.startswith("name=") for text in settings) else {}
        config = load_config(DIGITS, settings, output=str(folder.parent), **named)
        (folder / "config.yaml").write_text(to_yaml(config))
        records.append(read_run(folder))
    assert run_labels(records) == expected


def test_folder_of_runs_is_expanded_in_natural_order_without_duplicates(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("run-10", "run-2", "lr=0.001", "lr=1e-05")]
    (tmp_path / "no run").mkdir()
    assert find_runs([tmp_path]) == folders[::-1]
    assert find_runs([folders[0], tmp_path]) == [folders[0], folders[3], folders[2], folders[1]]
