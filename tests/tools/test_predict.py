"""Tests of tools/predict.py: predictions equal evaluation; submissions are complete and in order, or refused."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from helpers.memory_source import MemoryRows, jpeg_file, marked_image, memory_source, write
from helpers.training import DIGITS, ROOT, Run, alone
from pipelines import build_eval_loader
from pipelines.convert.source import Encoding
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from tools import convert, predict
from tools.inference import ensemble, predict_command
from train import ddp
from train.build import build_all
from train.checkpoint import store
from train.checkpoint.progress import dataset_entry
from train.engine.evaluate import evaluate
from train.trained_model import load_trained_model, picture_encoding, predicted_batches

TEST_ROWS = 41  # of npy_data


def run(*arguments: Any, main: Callable[[], None] = predict.main) -> None:
    """Run the command in this process, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        main()


def make_checkpoint(folder: Path, data: Path, seed: int = 0, image_size: int = 32, **settings: Any) -> Path:
    """Write a run folder with an untrained LeNet, whose logits differ between samples."""
    settings = {"data.path": str(data), "data.image_size": image_size, "seed": seed, **settings}
    config, dataset = load_config(DIGITS, **settings), load_dataset(data)
    folder.mkdir(parents=True, exist_ok=True)
    with alone() as device:
        training = build_all(config, dataset, image_size, device)
        about = {"config": to_yaml(config), "dataset": dataset_entry(dataset, image_size), "stream": {}}
        position = {"epoch": 0, "step": 0}
        store.save(folder / "last.pt", training, training.sums, position=position, progress={}, **about)
    return folder


@pytest.fixture
def model(npy_data: Path, tmp_path: Path) -> Path:
    """A run folder for the tiny data set, whose test split has no labels."""
    return make_checkpoint(tmp_path / "run", npy_data)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def logits_of(run_folder: Path, images: list[np.ndarray]) -> np.ndarray:
    """Apply the model to images [H, W, 3] one by one, without a data loader."""
    with alone() as device, torch.inference_mode():
        network = load_trained_model(run_folder, device).state.network
        batches = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in images]
        return torch.cat([network(batch) for batch in batches]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("tta", [None, "flip-translate"])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_metrics_equal_evaluation_bitwise(
    digits_run: Run, tmp_path: Path, tta: str | None, batch_size: int | None
) -> None:
    with alone() as device:
        trained = load_trained_model(digits_run.folder, device)
        settings = trained.config.eval.model_copy(update={"batch_size": batch_size})
        loader = build_eval_loader(trained.config.data, settings, device=device)
        result = evaluate(trained.state, loader, 360, tta or "none")
    options = (["--tta", tta] if tta else []) + (["--batch-size", batch_size] if batch_size else [])
    run("--checkpoint", digits_run.folder, "--split", "val", "--out", tmp_path, *options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = [metrics[key] for key in ("loss", "top1", "top5", "samples", "tta")]
    assert found == [result.loss, result.top1, result.top5, 360, tta or "none"]
    best = arrays(tmp_path)["logits"].argmax(1)
    assert (best == arrays(tmp_path)["labels"]).mean() == result.top1


def test_printed_metrics_equal_those_of_ddp_eval(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--checkpoint", digits_run.folder, "--split", "val", "--out", tmp_path)
    predicted = capsys.readouterr().out.splitlines()
    best = digits_run.folder / "best.pt"
    run("--cfg", digits_run.folder / "config.yaml", "--resume", best, "--eval", main=ddp.main)
    assert capsys.readouterr().out.splitlines()[-1] == predicted[0]
    assert predicted[0].startswith(f"{best}: val loss ")


def test_test_submission_has_all_source_rows_in_order(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--checkpoint", model, "--split", "test", "--batch-size", 16)
    out = model / "predictions-test"
    expected = logits_of(model, [marked_image(row) for row in range(TEST_ROWS)])
    np.testing.assert_allclose(arrays(out)["logits"], expected, atol=1e-5)
    header, *rows = table(out / "submission.csv")
    assert header == ["Id", "Category"]
    assert [int(id_) for id_, _ in rows] == list(range(1, TEST_ROWS + 1))
    assert [int(category) for _, category in rows] == expected.argmax(1).tolist()
    assert len(set(expected.argmax(1).tolist())) > 1, "one class for all would hide a shift of rows"
    assert (arrays(out)["labels"] == -1).all()
    assert json.loads((out / "metrics.json").read_text())["top1"] is None
    assert "checked 41 rows" in capsys.readouterr().out


def test_csv_and_npz_agree(npy_data: Path, model: Path, tmp_path: Path) -> None:
    run("--checkpoint", model, "--split", "train", "--out", tmp_path, "--top-k", 3)
    content, (header, *rows) = arrays(tmp_path), table(tmp_path / "predictions.csv")
    assert header[4:] == [f"{what}_{place}" for place in (1, 2, 3) for what in ("class", "probability")]
    probabilities = torch.from_numpy(content["logits"]).softmax(1).numpy()
    split = open_split(npy_data, "train")
    assert len(rows) == len(split)
    for sample in range(0, len(rows), 50):
        row, file, label, number, *best = rows[sample]
        order = (-probabilities[sample]).argsort()[:3]
        assert int(row) == content["rows"][sample] == split.source_rows()[sample]
        assert int(number) == order[0]
        assert best[::2] == content["classes"][order].tolist()
        assert content["top_classes"][sample].tolist() == order.tolist()
        assert content["top_probabilities"][sample] == pytest.approx(probabilities[sample][order], rel=1e-5)
        assert [float(text) for text in best[1::2]] == pytest.approx(probabilities[sample][order], rel=1e-4)
        assert (file, label) == ("", content["classes"][content["labels"][sample]])
    assert (content["labels"] == content["rows"] * 7 % 12).all()  # as memory_source labels its rows


def sample_file(path: Path, ids: list[Any], header: str = "image,class") -> Path:
    path.write_text("\n".join([header, *(f"{id_},0" for id_ in ids)]) + "\n")
    return path


def test_sample_submission_sets_columns_and_ids(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"test/{number:05d}.png" for number in range(100, 100 + TEST_ROWS)]
    for ids, said in ((range(TEST_ROWS), "ascending"), (names, "in the sample's order, assumed to be the rows' order")):
        sample = sample_file(tmp_path / "sample.csv", list(ids))
        run("--checkpoint", model, "--split", "test", "--sample-submission", sample, "--out", tmp_path)
        assert said in capsys.readouterr().out
        header, *rows = table(tmp_path / "submission.csv")
        assert header == ["image", "class"]
        assert [id_ for id_, _ in rows] == [str(id_) for id_ in ids]
        assert [int(category) for _, category in rows] == arrays(tmp_path)["logits"].argmax(1).tolist()


def test_numeric_ids_are_matched_in_any_order(model: Path, tmp_path: Path) -> None:
    numbers = sorted(range(1, TEST_ROWS + 1), key=str)
    names = [f"test/v2_{number}.png" for number in numbers]
    sample = sample_file(tmp_path / "sample.csv", names)
    run("--checkpoint", model, "--split", "test", "--sample-submission", sample, "--out", tmp_path, "--id-start", 1)
    best = arrays(tmp_path)["logits"].argmax(1)
    assert table(tmp_path / "submission.csv")[1:] == [
        [name, str(best[number - 1])] for name, number in zip(names, numbers, strict=True)
    ]


def test_pictures_are_matched_with_sample_by_name(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(1, 13):
        Image.fromarray(marked_image(number)).save(folder / f"img_{number}.png")
    command = ["--checkpoint", model, "--split", folder, "--submission", tmp_path / "mine.csv", "--out", tmp_path]
    with pytest.raises(
        UserError, match=r"numbered, but sorted by path .* \(img_1, img_10, img_11 …\); give a --sample"
    ):
        run(*command)
    sample = sample_file(tmp_path / "sample.csv", [f"img_{number}.png" for number in range(12, 0, -1)])
    run(*command, "--sample-submission", sample)
    expected = logits_of(model, [marked_image(number) for number in range(12, 0, -1)]).argmax(1)
    assert [int(category) for _, category in table(tmp_path / "mine.csv")[1:]] == expected.tolist()


def test_id_and_column_options_apply_to_any_ordered_split(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "mine.csv"
    columns = ("--id-column", "ID", "--category-column", "Label")
    run("--checkpoint", model, "--split", "val", "--submission", file, "--id-start", 0, *columns)
    header, *rows = table(file)
    assert (header, rows[0][0], rows[-1][0]) == (["ID", "Label"], "0", "106")
    run("--checkpoint", model, "--split", "test", "--submission", "none")
    assert not (model / "predictions-test/submission.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "train", "--submission", "x.csv"], "'train' is stored shuffled"),
        (["--split", "val", "--id-start", "0"], "--id-start belongs to a submission"),
        (["--split", "valid"], r"neither a split of .* \(it has train, val, test\) nor a folder"),
        (["--split", "test", "--fill", "12"], r"--fill=12 is not a class number; use 0..11"),
        (["--split", "test", "--top-k", "0"], "--top-k=0 is not a positive"),
        (["--split", "test", "--out", "file"], "cannot write into file"),
        (["--split", "test", "--data-path", "nowhere"], "--data-path: data set folder 'nowhere' does not exist"),
        (["--split", "test", "--submission", "."], "--submission . is a folder"),
        (["--split", "file"], "neither a split"),
        (["--split", "test", "--sample-submission", "short"], "40 rows below its header image,class for 41 images"),
        (["--split", "test", "--sample-submission", "zero", "--id-start", "1"], "start at 0; omit one of them"),
        (["--split", "test", "--sample-submission", "names", "--id-start", "1"], "do not count from 0 or 1"),
        (["--split", "test", "--sample-submission", "zero", "--id-column", "Id"], "has 'image' there"),
        (["--split", "test", "--sample-submission", "gap"], "neither from 0 or 1 without a gap nor in ascending order"),
        (["--split", "test", "--sample-submission", "twice"], "has the id '7' twice"),
        (["--split", "test", "--sample-submission", "wide"], "must have two columns.*but its row 1 is 'a,b,c'"),
        (["--split", "test", "--sample-submission", "file"], "must have two columns.*it is empty"),
        (["--split", "test", "--sample-submission", "missing"], "cannot be read"),
        (["--split", "test", "--sample-submission", "zero", "--submission", "zero"], "is the sample submission itself"),
    ],
)
def test_invalid_options_are_refused_before_predicting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict_command, "predict", lambda *_: pytest.fail("predicted"))
    numbers = list(range(1, TEST_ROWS + 1))
    Path("file").touch()
    sample_file(Path("short"), numbers[:-1])
    sample_file(Path("zero"), list(range(TEST_ROWS)))
    sample_file(Path("names"), [f"img{number + 100}" for number in numbers])
    sample_file(Path("gap"), [42, *numbers[:-1]])
    sample_file(Path("twice"), [*numbers[:-1], 7])
    sample_file(Path("wide"), numbers, header="a,b,c")
    zero = Path("zero").read_text()
    with pytest.raises(UserError, match=message):
        run("--checkpoint", model, *options)
    assert Path("zero").read_text() == zero


def test_differing_classes_are_refused(model: Path, digits_run: Run) -> None:
    with pytest.raises(UserError, match="differ in their classes"):
        run("--checkpoint", model, "--split", "val", "--data-path", digits_run.data)
    with pytest.raises(UserError, match=r"last\.pt and checkpoint .*best\.pt differ in their classes"):
        run("--checkpoint", model, digits_run.folder, "--split", "val")


@pytest.fixture
def holey(tmp_path: Path) -> Path:
    """JPEG data whose test rows 2 and 5 of 9 are not images."""
    files: list[np.ndarray | bytes] = [jpeg_file(row) for row in range(9)]
    files[2] = files[5] = b"no image"
    test = MemoryRows(files, labelled=False)
    write(
        memory_source(train=MemoryRows(12, files=True), val=MemoryRows(9, files=True), test=test),
        tmp_path / "d",
        "jpeg",
    )
    return tmp_path / "d"


def test_unreadable_test_rows_are_refused_or_filled_without_shift(holey: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "run", holey)
    with pytest.raises(UserError, match=r"2 of 9 images cannot be read.*row 2 \(row\[2\]: cannot be .*row 5 .*--fill"):
        run("--checkpoint", model, "--split", "test")
    run("--checkpoint", model, "--split", "test", "--fill", 11)
    run("--checkpoint", model, "--split", "val")  # the same files, all intact
    out, whole = arrays(model / "predictions-test"), arrays(model / "predictions-val")
    kept = [0, 1, 3, 4, 6, 7, 8]
    assert out["rows"].tolist() == kept
    assert [int(line[0]) for line in table(model / "predictions-test/predictions.csv")[1:]] == kept
    np.testing.assert_allclose(out["logits"], whole["logits"][kept], atol=1e-5)  # val's broken rows are noise
    categories = whole["logits"].argmax(1)
    categories[[2, 5]] = 11
    rows = table(model / "predictions-test/submission.csv")[1:]
    assert rows == [[str(row + 1), str(category)] for row, category in enumerate(categories)]
    unreadable = json.loads((model / "predictions-test/metrics.json").read_text())["unreadable"]
    assert [entry["row"] for entry in unreadable] == [2, 5]


def test_pictures_of_raw_split_are_predicted_like_the_split(digits_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    split = open_split(digits_run.data, "val")
    pixels, places = split.pixel_rows()
    for sample in range(30):
        (folder / f"{sample % 3}").mkdir(parents=True, exist_ok=True)
        image = pixels[places[sample]].reshape(32, 32, 3)
        Image.fromarray(image).save(folder / f"{sample % 3}" / f"{sample:02d}.png")
    run("--checkpoint", digits_run.folder, "--split", folder, "--out", tmp_path / "own")
    run("--checkpoint", digits_run.folder, "--split", "val", "--out", tmp_path / "val")
    order = sorted(range(30), key=lambda sample: (sample % 3, sample))
    np.testing.assert_allclose(arrays(tmp_path / "own")["logits"], arrays(tmp_path / "val")["logits"][order], atol=1e-5)
    rows = table(tmp_path / "own/predictions.csv")[1:]
    assert [row[1] for row in rows] == [f"{sample % 3}/{sample:02d}.png" for sample in order]
    names = sorted(file.name for file in (tmp_path / "own").iterdir())
    assert names == ["metrics.json", "predictions.csv", "predictions.npz"]


@pytest.mark.parametrize("options", [(), ("--encoding", "npy", "--size", "40")])
def test_pictures_of_any_format_are_predicted_as_if_converted(
    tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    for row in range(12):
        for name in (f"train/{'ab'[row % 2]}/{row}.jpg", f"val/{'ab'[row % 2]}/{row}.jpg"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(jpeg_file(row))
    (root / "test").mkdir()
    for row in range(12, 20):
        image = Image.open(io.BytesIO(jpeg_file(row)))
        image.save(root / "test" / f"{row}.png") if row % 2 else (root / f"test/{row}.jpg").write_bytes(jpeg_file(row))
    (root / "test" / "15.png").write_bytes(b"broken")
    convert.main(["imagefolder", "--source", str(root), "--out", str(tmp_path / "data"), *options])
    model = make_checkpoint(tmp_path / "run", tmp_path / "data", **{"eval.crop_fraction": 0.9})
    run("--checkpoint", model, "--split", root / "test")
    assert "no prediction for row 3, 15.png: cannot be decoded" in capsys.readouterr().err
    run("--checkpoint", model, "--split", "test", "--submission", "none")
    own, split = arrays(model / "pictures-test"), arrays(model / "predictions-test")
    assert (own["logits"] == split["logits"]).all()
    assert own["rows"].tolist() == split["rows"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    files = [row[1] for row in table(model / "pictures-test/predictions.csv")[1:]]
    assert files == ["12.jpg", "13.png", "14.jpg", "16.jpg", "17.png", "18.jpg", "19.png"]


def test_single_files_are_predicted_and_printed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more/deep").mkdir(parents=True)
    for number, name in enumerate(("one.png", "photo", "more/2.png", "more/deep/1.png")):
        Image.fromarray(marked_image(number)).save(tmp_path / name, "PNG")
    (tmp_path / "link.png").symlink_to(tmp_path / "photo")
    run("one.png", "--checkpoint", model, "--top-k", 2)
    out = model / "pictures-one.png"
    expected = logits_of(model, [marked_image(0)])
    np.testing.assert_allclose(arrays(out)["logits"], expected, atol=1e-5)
    best, second = arrays(out)["classes"][(-expected[0]).argsort()[:2]]
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"one\.png: {best} [0-9.]+%, {second} [0-9.]+%", lines[0])
    assert lines[1] == f"{out}: predictions of 1 image in predictions.npz and .csv"
    assert json.loads((out / "metrics.json").read_text())["split"] == "pictures"

    run("photo", tmp_path / "link.png", "more", "one.png", "--checkpoint", model)
    assert [row[1] for row in table(model / "pictures/predictions.csv")[1:]] == [
        "photo", str(tmp_path / "link.png"), "more/2.png", "more/deep/1.png", "one.png",
    ]  # fmt: skip
    images = [marked_image(number) for number in (1, 1, 2, 3, 0)]
    np.testing.assert_allclose(arrays(model / "pictures")["logits"], logits_of(model, images), atol=1e-5)
    run("more", "--checkpoint", model)
    assert [row[1] for row in table(model / "pictures-more/predictions.csv")[1:]] == ["2.png", "deep/1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg", "--checkpoint", "RUN"], r"cannot read picture none.jpg \(No such file"),
        (["pipe", "--checkpoint", "RUN"], "picture pipe is not a regular file"),
        (
            ["text.txt", "--checkpoint", "RUN"],
            r"^no picture could be decoded \(text.txt: cannot be decoded: not an image",
        ),
        (["one.jpg", "--checkpoint", "RUN", "--split", "val"], r"both pictures \(one.jpg\) and --split val are given"),
        (["--checkpoint", "RUN"], "nothing to predict"),
        (
            ["--checkpoint", "RUN", "one.jpg"],
            "one.jpg follows --checkpoint, .*; write pictures first: zhu predict one.jpg --check",
        ),
        (["--checkpoint", "RUN", "photos"], r"photos follows --checkpoint, .*: zhu predict photos --checkpoint .*run"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("text.txt").write_text("text")
    Path("photos/deep").mkdir(parents=True)
    Path("photos/deep/1.JPG").touch()
    before = set(model.iterdir())
    with pytest.raises(UserError, match=message):
        run(*[str(model) if word == "RUN" else word for word in arguments])
    assert set(model.iterdir()) == before


def test_best_class_of_many_pictures_is_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(22):
        Image.fromarray(marked_image(number)).save(tmp_path / f"{number:02}.png")
    run(tmp_path, "--checkpoint", model, "--out", tmp_path / "out")
    rows = table(tmp_path / "out/predictions.csv")[1:]
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    for line, row in zip(lines, rows, strict=False):
        assert re.fullmatch(rf"{row[1]}: {row[4]} [0-9.]+%", line)
    assert "predictions of 22 images" in last


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
def test_photos_are_turned_as_in_the_training_data(tmp_path: Path, orientation: str) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            (tmp_path / f"photos/{split}/a").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"photos/{split}/a/{number}.jpg").write_bytes(jpeg_file(number))
    data = tmp_path / "data"
    options = ["--orientation", orientation, "--encoding", "npy", "--size", "32"]
    convert.main(["imagefolder", "--source", str(tmp_path / "photos"), "--out", str(data), *options])
    model = make_checkpoint(tmp_path / "run", data)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(marked_image(1)).save(tmp_path / "turned.png", exif=turned)
    run(tmp_path / "turned.png", "--checkpoint", model, "--out", tmp_path / "out")
    upright = np.rot90(marked_image(1), -1 if orientation == "apply" else 0)
    np.testing.assert_allclose(arrays(tmp_path / "out")["logits"], logits_of(model, [upright.copy()]), atol=1e-5)


def test_links_out_of_a_folder_of_pictures_need_a_flag(model: Path, tmp_path: Path) -> None:
    Image.fromarray(marked_image(1)).save(tmp_path / "outside.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/1.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"leads out of the source folder.*give --follow-links"):
        run(tmp_path / "folder", "--checkpoint", model)
    run(tmp_path / "folder", "--checkpoint", model, "--follow-links")
    assert len(arrays(model / "pictures-folder")["rows"]) == 1


def test_broken_links_and_other_files_among_pictures_are_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("1.png", "2.PGM", "._1.png", "__MACOSX/1.png"):
        Image.fromarray(marked_image(3)).convert("L").save(folder / name, "PPM" if name == "2.PGM" else "PNG")
    (folder / "3.png").symlink_to("nothing.png")
    run("--checkpoint", model, "--split", folder, "--out", tmp_path / "out")
    assert [row[1] for row in table(tmp_path / "out/predictions.csv")[1:]] == ["1.png", "2.PGM"]
    assert "note: skipped 1 entry: 1 .png, link that leads nowhere (3.png)" in capsys.readouterr().err


def test_split_precedes_folder_and_data_set_is_refused(
    npy_data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    for name in ("10.png", "9.png"):
        Image.fromarray(marked_image(3)).save(tmp_path / "test" / name)
    run("--checkpoint", model, "--split", "test", "--out", "split")
    run("--checkpoint", model, "--split", "./test", "--out", "own")
    assert len(arrays(tmp_path / "split")["rows"]) == TEST_ROWS
    assert arrays(tmp_path / "own")["logits"] == pytest.approx(arrays(tmp_path / "split")["logits"][[3, 3]], abs=1e-5)
    with pytest.raises(UserError, match=r"not in the order of their numbers \(10, 9 …\)"):
        run("--checkpoint", model, "--split", "./test", "--submission", "x.csv")
    with pytest.raises(UserError, match=re.escape(f"give --data-path {npy_data} and one of its splits")):
        run("--checkpoint", model, "--split", npy_data)


def test_checkpoints_are_averaged_in_probability_at_their_own_size(npy_data: Path, tmp_path: Path) -> None:
    models = [
        make_checkpoint(tmp_path / "a", npy_data),
        make_checkpoint(tmp_path / "b", npy_data, seed=1, image_size=34, **{"eval.tta": "flip", "data.batch_size": 30}),
    ]
    for name, chosen in (("a", models[:1]), ("b", models[1:]), ("both", models)):
        run("--checkpoint", *chosen, "--split", "val", "--out", tmp_path / "out" / name)
    one, other, both = (torch.from_numpy(arrays(tmp_path / "out" / name)["logits"]) for name in ("a", "b", "both"))
    mean = (one.double().softmax(1) + other.double().softmax(1)) / 2
    torch.testing.assert_close(both.double(), mean.log(), atol=1e-5, rtol=0)
    labels = torch.from_numpy(arrays(tmp_path / "out/both")["labels"])
    metrics = json.loads((tmp_path / "out/both/metrics.json").read_text())
    assert metrics["loss"] == pytest.approx(-mean[torch.arange(107), labels].log().mean().item(), abs=1e-5)
    assert metrics["top1"] == (mean.argmax(1) == labels).double().mean().item()
    assert [entry["tta"] for entry in metrics["checkpoints"]] == ["none", "flip"]
    with alone() as device:
        trained = load_trained_model(models[1], device)
        loader = build_eval_loader(trained.config.data, trained.config.eval, device=device)
        alone_b = evaluate(trained.state, loader, 107, "flip")
    assert loader.image_size == 34
    assert metrics["checkpoints"][1]["loss"] == alone_b.loss


def test_averaging_over_different_images_is_refused(npy_data: Path, tmp_path: Path) -> None:
    splits = {"train": MemoryRows(20), "val": MemoryRows(107), "test": MemoryRows(TEST_ROWS, labelled=False)}
    write(memory_source(**splits), tmp_path / "same", "npy")
    write(memory_source(**{**splits, "val": MemoryRows(106)}), tmp_path / "other", "npy")
    first = make_checkpoint(tmp_path / "a", npy_data)
    second, third = (make_checkpoint(tmp_path / f"run-{name}", tmp_path / name) for name in ("same", "other"))
    run("--checkpoint", first, second, "--split", "val", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="contain different images"):
        run("--checkpoint", first, third, "--split", "val", "--out", tmp_path / "out")


def test_non_finite_logits_are_refused_naming_the_image(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*arguments: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, (logits, labels) in enumerate(predicted_batches(*arguments)):
            changed = logits.clone()
            if number == 1:
                changed[6, 3] = float("inf")
            yield changed, labels

    monkeypatch.setattr(ensemble, "predicted_batches", diverged)
    with pytest.raises(UserError, match="not finite for row 70 of split 'val': its weights"):
        run("--checkpoint", model, "--split", "val", "--batch-size", 64)
    assert not (model / "predictions-val/predictions.npz").exists()


def test_pictures_are_encoded_like_the_data_set(npy_data: Path, model: Path) -> None:
    with alone() as device:
        trained = load_trained_model(model, device)
    assert picture_encoding(trained) == Encoding("npy", size=32), "raw pixels of one size"

    def encoding(**changes: Any) -> Encoding:
        return picture_encoding(replace(trained, dataset=replace(trained.dataset, **changes)))

    recorded = trained.dataset.conversion
    assert recorded is not None
    assert encoding(conversion=replace(recorded, name="jpeg", quality=80)) == Encoding("jpeg", quality=80)
    assert encoding(conversion=replace(recorded, size=48)) == Encoding("npy", size=48)
    assert encoding(image_shape=(32, 40, 3)) == Encoding("jpeg"), "no square to crop to"
    assert encoding(conversion=None) == Encoding("jpeg")


@pytest.mark.slow
def test_bad_input_prints_one_line_and_exits_with_2(model: Path) -> None:
    command = [sys.executable, predict.__file__, "--checkpoint", str(model), "--split", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    bad = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --split 'x' is neither")
    assert len(bad.stderr.splitlines()) == 1
