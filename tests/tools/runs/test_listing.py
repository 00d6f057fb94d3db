"""zhu list: names with one-line descriptions, filtered and fitted to the terminal."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema.optim import BUILT_IN_OPTIMIZERS
from configs.utils.errors import UserError
from helpers.imports import ROOT
from helpers.run_dirs import make
from helpers.training import DIGITS, Run
from models import list_models
from tools.runs import listing


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Return the descriptions by name."""
    listing.main([*words])
    return dict((line.split(maxsplit=1)) for line in capsys.readouterr().out.splitlines())


def test_models_and_optimizers_have_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys, "models")
    assert models.keys() == {*list_models(), "timm/NAME", "FILE.py:NAME"}
    assert models["resnet18"].startswith("ResNet: images float")
    optimizers = listed(capsys, "optimizers")
    assert list(optimizers)[: len(BUILT_IN_OPTIMIZERS)] == list(BUILT_IN_OPTIMIZERS)
    assert {"lamb", "lion", "timm/muon"} <= optimizers.keys()


def test_patterns_select_names_or_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "models", "timm/resnet18*").keys() >= {"timm/resnet18", "timm/resnet18d"}
    assert listed(capsys, "augmentations", "CutMix").keys() == {"aug.mix.cutmix", "aug.mix.switch_probability"}
    assert listed(capsys, "configs", "digits") == {
        "configs/digits_lenet.yaml": "LeNet on scikit-learn's 1,797 digits: no download, for a first run and for tests "
        "on a CPU"
    }
    with pytest.raises(UserError, match=r"no configs that match \*\.yml"):
        listing.main(["configs", "*.yml"])


def test_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        listing.main(["runs", "--output", str(tmp_path)])
    assert str(error.value) == f"there are no runs in {tmp_path}; name another folder with --output"


def test_runs_have_epochs_accuracy_and_date(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(digits_run.folder, tmp_path / "sweep" / "lr=1")
    early = make(tmp_path / "early", "lock", config=load_config(DIGITS))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("model: 3")
    runs = listed(capsys, "runs", "--output", str(tmp_path))
    best = max(json.loads(line)["val_top1"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert runs[str(run)].startswith(f"2 of 2 epochs   best {100 * best:.2f} %  20")
    assert runs[str(run)].endswith("  digits_lenet")
    assert "config.yaml" in runs[str(tmp_path / "broken")]
    assert runs[str(early)].startswith("0 of 30 epochs  no accuracy")
    assert runs[str(early)].endswith("digits_lenet, failed or stopped before its first epoch")


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    listing.main(["augmentations"])
    assert "…" not in capsys.readouterr().out  # redirected
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    listing.main(["augmentations"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 60
    assert [line for line in lines if line.endswith("…")]


def test_first_sentences_keep_numbers_and_names() -> None:
    assert listing.first_sentence("Reaches 94.5 % on a GPU.\nMore.") == "Reaches 94.5 % on a GPU"
    assert listing.first_sentence("As by A. Author\n  et al. Then") == "As by A. Author et al"
    assert listing.first_sentence(None) == ""
