"""Train, predict and look at runs from Python."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import load_config
from configs.utils.errors import UserError
from helpers import run_dirs
from helpers.training import CLEAN, DIGITS, ROOT, alone, strict_lines
from helpers.training import Run as DigitsRun
from tools.sources.digits import open_digits
from train import Run, fit
from train.checkpoint import store

SETTINGS = ("train.epochs=2", "data.batch_size=48", "data.train_split=val")


@pytest.fixture(autouse=True)
def _without_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("gpu"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def fit_digits(digits_run: DigitsRun, output: Path, *overrides: str, **settings: object) -> Run:
    return fit(DIGITS, *SETTINGS, *overrides, output=output, **{"data.path": digits_run.data}, **settings)


@pytest.fixture(scope="module")
def run(digits_run: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two epochs on the 360 digits of val; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return fit_digits(digits_run, tmp_path_factory.mktemp("python"))


def val_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images uint8 [360, 32, 32, 3] and the labels of the digits' split val."""
    split = open_digits().splits["val"]
    assert split.labels is not None
    return np.stack(list(split.read(0, len(split)))), split.labels


def test_fit_trains_like_the_command(digits_run: DigitsRun, tmp_path: Path) -> None:
    ours = fit(DIGITS, "train.epochs=2", output=tmp_path, **{"data.path": digits_run.data})
    assert ours.folder == tmp_path / "digits_lenet"
    theirs = strict_lines(digits_run.folder / "metrics.jsonl")
    for key in ("epoch", "step", "lr", "train_loss", "val_loss", "val_top1"):
        assert [line[key] for line in ours.metrics] == [line[key] for line in theirs]


def test_settings_may_be_mappings(digits_run: DigitsRun, run: Run, tmp_path: Path) -> None:
    ours = fit_digits(digits_run, tmp_path, {"train.epochs": 9, "train.patience": None}, **{"train.epochs": 1})
    assert ours.config.train.epochs == 1
    with pytest.raises(UserError, match="override 3 must be KEY=VALUE or a mapping"):
        fit(DIGITS, 3)  # type: ignore[arg-type]
    for setting in ({"model.name": torch.nn.Linear}, {"model": {"name": torch.nn.Linear}}):
        with pytest.raises(UserError, match=r"model.* contains Linear, a type, .*%%writefile .*give own.py:Linear"):
            fit(DIGITS, setting)


def test_run_without_epochs_and_folders_of_images_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no epoch to plot"):
        Run(run_dirs.make(tmp_path / "digits_lenet", config=load_config(DIGITS))).plot()
    with pytest.raises(UserError, match=r"is a folder; give its image files, e.g. sorted\(Path"):
        run.predict(tmp_path)
    with pytest.raises(UserError, match=r"^nope/config.yaml cannot be read \(No such file or directory\); give"):
        Run("nope")


def test_run_gives_config_metrics_best_and_curves(run: Run) -> None:
    assert run.metrics == strict_lines(run.folder / "metrics.jsonl")
    assert (run.config.train.epochs, run.config.data.train_split) == (2, "val")
    assert run.best is not None
    assert run.best.checkpoint == run.folder / "best.pt"
    assert run.best.epoch == store.load(run.best.checkpoint)["position"]["epoch"]
    assert run.best.top1 == max(line["val_top1"] or 0 for line in run.metrics)
    assert [len(axis.lines) for axis in run.plot().axes] == [2, 2]
    assert Run(str(run.folder)).best == run.best
    with pytest.raises(UserError, match="give the folder of a run"):
        Run(run.folder.parent)


@pytest.mark.parametrize(
    ("options", "epoch", "top1"),
    [((), 2, 0.6), (("eval.best_by=loss",), 1, 0.5), (("eval.weights=raw", "eval.best_by=top1"), 4, 0.9)],
)
def test_best_follows_the_settings_of_evaluation(
    tmp_path: Path, options: tuple[str, ...], epoch: int, top1: float
) -> None:
    folder = run_dirs.make(tmp_path / "digits_lenet", config=load_config(DIGITS, options))
    results = [(0.5, 1.0, 0.2), (0.6, 1.5, 0.1), (0.6, None, 0.1), (None, None, 0.9)]
    lines = [
        {"epoch": number, "ema_val_top1": top1, "ema_val_loss": loss, "val_top1": raw, "val_loss": 2.0}
        for number, (top1, loss, raw) in enumerate(results)
    ]
    assert Run(folder).best is None
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    best = Run(folder).best
    assert best is not None
    assert (best.epoch, best.top1) == (epoch, top1)


def test_predictions_have_the_accuracy_of_the_best_evaluation(run: Run) -> None:
    images, labels = val_digits()
    predictions = run.predict(images)
    assert predictions.probabilities.shape == (360, 10)
    assert predictions.probabilities.dtype == np.float32
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-5)
    assert run.best is not None
    assert np.mean([name == str(label) for name, label in zip(predictions.names, labels, strict=True)]) == run.best.top1


def test_images_of_every_kind_are_predicted_alike(run: Run, tmp_path: Path) -> None:
    images, _ = val_digits()
    image = images[0]
    Image.fromarray(image).save(tmp_path / "0.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    kinds = [image, image[:, :, :1], image[:, :, 0], tensor, tensor[:1], Image.fromarray(image), tmp_path / "0.png"]
    first, *others = run.predict([*kinds, str(tmp_path / "0.png")]).probabilities
    assert len(others) == 7
    for other in others:
        np.testing.assert_array_equal(other, first)
    for same in (image, image[:, :, 0], image[None, :, :, 0], tensor[None], str(tmp_path / "0.png")):
        np.testing.assert_allclose(run.predict(same).probabilities, first[None], rtol=1e-5)


def test_wrong_images_are_named(run: Run, tmp_path: Path) -> None:
    images, _ = val_digits()
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        run.predict([images[0], tmp_path / "broken.png"])
    with pytest.raises(UserError, match=r"images\[1\] is an array float32 \[32, 32, 3\]"):
        run.predict([images[0], images[0].astype(np.float32)])
    with pytest.raises(UserError, match="there are no images"):
        run.predict([])


def open_resources() -> dict[str, object]:
    """Return what this process holds after a collection: files, threads, maps of a data set, and tensors."""
    gc.collect()
    descriptors = sorted(os.listdir("/proc/self/fd"), key=int)  # one of them is this listing
    maps = Path("/proc/self/maps").read_text().count(".tar")
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor or type(found) is torch.nn.Parameter]
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item(), sys.excepthook
    return {
        "files": len(descriptors),
        "threads": len(os.listdir("/proc/self/task")),
        "maps": maps,
        "tensors": len(tensors),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "settings": settings,
        "group": torch.distributed.is_initialized(),
    }


def test_second_fit_leaves_nothing_behind(run: Run, digits_run: DigitsRun, tmp_path: Path) -> None:
    before = open_resources()  # after the first fit, which starts the thread pools of libraries
    assert before["group"] is False
    second = fit_digits(digits_run, tmp_path)
    assert open_resources() == before
    assert [line["train_loss"] for line in second.metrics] == [line["train_loss"] for line in run.metrics]
    second.predict(val_digits()[0])
    with pytest.raises(UserError, match=r"train\.epochs"):
        fit_digits(digits_run, tmp_path, "train.epochs=3", resume="auto")
    assert open_resources() == before


def test_fit_in_another_thread_works(run: Run, digits_run: DigitsRun, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fit_digits, digits_run, tmp_path).result()
    assert [line["val_loss"] for line in other.metrics] == [line["val_loss"] for line in run.metrics]


def test_interrupted_fit_raises_and_can_be_resumed(run: Run, digits_run: DigitsRun, tmp_path: Path) -> None:
    loss = tmp_path / "interrupt.py"
    loss.write_text(
        "import os, signal\nfrom torch.nn.functional import cross_entropy\n\ncalls = []\n\n"
        "def loss(logits, labels):\n    calls.append(1)\n    if len(calls) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n    return cross_entropy(logits, labels)\n"
    )
    setting = f"train.loss={loss}:loss"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_digits(digits_run, tmp_path, setting)
    finally:
        signal.signal(signal.SIGINT, before)
    stopped = Run(tmp_path / "digits_lenet")
    assert len(stopped.metrics) < 2
    resumed = fit_digits(digits_run, tmp_path, setting, resume="auto")
    assert resumed.folder == stopped.folder
    np.testing.assert_allclose(
        [line["train_loss"] for line in resumed.metrics], [line["train_loss"] for line in run.metrics], rtol=1e-4
    )


def test_config_object_and_settings_by_keyword_are_accepted(digits_run: DigitsRun, tmp_path: Path) -> None:
    config = load_config(DIGITS, SETTINGS)
    data = {"path": str(digits_run.data)}
    settings = {"train.max_steps": 2, "train.patience": None}
    done = fit(config, "train.patience=7", name="mine", output=str(tmp_path), data=data, **settings)
    assert done.folder == tmp_path / "mine"
    assert done.metrics[-1]["step"] == 2
    assert (done.config.train.patience, done.config.data.batch_size) == (None, 48)


def test_fit_is_refused_where_it_cannot_work(
    digits_run: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"did you mean train\.epochs"):
        fit_digits(digits_run, tmp_path, "train.epoch=3")
    with pytest.raises(UserError, match="fit trains"):
        fit_digits(digits_run, tmp_path, "eval.only=true")
    with alone(), pytest.raises(UserError, match="already has a torch"):
        fit_digits(digits_run, tmp_path)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"fit\(\) is one process"):
        fit_digits(digits_run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_train_does_not_import_torch() -> None:
    code = "import sys, train; assert 'torch' not in sys.modules; train.fit; train.other"
    ended = subprocess.run([sys.executable, "-c", code], env=CLEAN, cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr.endswith("AttributeError: module 'train' has no attribute 'other'\n")


@pytest.mark.gpu
def test_second_fit_on_a_gpu_frees_its_memory(digits_run: DigitsRun, tmp_path: Path) -> None:
    fit_digits(digits_run, tmp_path)
    before = torch.cuda.memory_allocated()
    flags = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    fit_digits(digits_run, tmp_path).predict(val_digits()[0][:4])
    assert torch.cuda.memory_allocated() == before
    assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == flags
