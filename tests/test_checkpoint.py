"""Checkpoints: whole at any instant, refused when damaged or foreign, never a way to run code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_fixtures import alone, lenet, random_batch, small_net, training_of

from configs.errors import UserError
from models import build_model
from train import checkpoint, checkpoint_file
from train.loop import Training, train_step

STATE = {"position": {"epoch": 2, "step": 5}, "progress": {"best_top1": 0.5}, "stream": {"seed": 0}, "config": "a: 1\n"}


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def stepped_training(**settings: Any) -> Training:
    training = training_of(lenet(), **settings)
    train_step(training, random_batch(8))
    return training


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step; read only."""
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    with alone():
        training = stepped_training()
        checkpoint.save(path, training, training.sums, **STATE)
    return path


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal_trees(ours[key], value)
    elif isinstance(theirs, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal_trees(one, other)
    else:
        assert ours == theirs


def test_what_was_saved_comes_back_bitwise(intact: Path) -> None:
    saved, content = stepped_training(), checkpoint.load(intact)
    assert {key: content[key] for key in STATE} == STATE
    restored = training_of(lenet(seed=1))
    checkpoint.restore(restored, content, intact)
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())
    assert_equal_trees(restored.optimizer.state_dict(), saved.optimizer.state_dict())
    assert torch.equal(restored.sums, saved.sums)
    for training in (saved, restored):
        train_step(training, random_batch(8, seed=1))
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())


def test_a_checkpoint_holds_nothing_but_tensors_numbers_and_strings(intact: Path) -> None:
    content = torch.load(intact, weights_only=True)
    assert content["format"] == checkpoint_file.FORMAT
    assert content["model"].keys() == lenet().state_dict().keys()


# Damage


def test_a_truncated_checkpoint_is_a_user_error_wherever_it_was_cut(intact: Path, tmp_path: Path) -> None:
    whole, cut = intact.read_bytes(), tmp_path / "cut.pt"
    for share in (0, 1, 2, 100, 500, 900, 990, 999):
        cut.write_bytes(whole[: len(whole) * share // 1000])
        with pytest.raises(UserError, match=r"cut\.pt cannot be read"):
            checkpoint.load(cut)
    cut.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cut\.pt cannot be read"):
        checkpoint.load(cut)


def test_one_flipped_bit_anywhere_is_a_user_error(intact: Path, tmp_path: Path) -> None:
    whole, flipped, places = intact.read_bytes(), tmp_path / "flipped.pt", random.Random(0)
    tables = len(whole) - 6000  # of the archive: a bit there once made torch.load return memory that nobody had written
    for start in [0] * 30 + [tables] * 30:
        content = bytearray(whole)
        content[places.randrange(start, len(whole))] ^= 1 << places.randrange(8)
        flipped.write_bytes(content)
        with pytest.raises(UserError, match=r"flipped\.pt cannot be read \(its checksum is wrong"):
            checkpoint.load(flipped)


def test_a_checkpoint_is_also_a_file_of_torch(intact: Path) -> None:
    content = torch.load(intact, weights_only=True)
    assert_equal_trees(content, checkpoint.load(intact))


def foreign_files() -> dict[str, bytes]:
    def saved(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("letter.txt", "hello")
    return {
        "nothing": b"",
        "text": b"epoch: 3\n",
        "garbage": random.Random(2).randbytes(5000),
        "another archive": archive.getvalue(),
        "a tensor": saved(torch.zeros(3)),
        "a state dict": saved(lenet().state_dict()),
        "a later format": saved({"format": checkpoint_file.FORMAT + 1, "model": {}}),
        "a whole model": saved(torch.nn.Linear(2, 2)),
    }


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).hexdigest().encode()


@pytest.mark.parametrize("checksum", [False, True], ids=["", "with a checksum"])
@pytest.mark.parametrize("kind", foreign_files())
def test_a_foreign_file_is_a_user_error_of_one_line(kind: str, checksum: bool, tmp_path: Path) -> None:
    path, content = tmp_path / "foreign.pt", foreign_files()[kind]
    path.write_bytes(with_checksum(content) if checksum else content)
    with pytest.raises(UserError, match=r"foreign\.pt") as error:
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) == 1
    assert "weights_only" not in str(error.value)  # no advice to load it unsafely


@pytest.mark.parametrize("name", ["missing.pt", ""])
def test_a_missing_file_or_a_folder_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist|cannot be read"):
        checkpoint.load(tmp_path / name)


class Intruder:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["torch.save", "old torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"format": checkpoint_file.FORMAT, "model": Intruder(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    path.write_bytes(with_checksum(path.read_bytes()))  # which whoever writes such a file can compute as well
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have run


# Saving


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync"])
def test_a_save_that_dies_half_way_leaves_the_old_checkpoint_whole(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, training = tmp_path / "last.pt", stepped_training()
    checkpoint.save(path, training, training.sums, **STATE)
    before = path.read_bytes()

    def die(content: Any, file: Any = None) -> None:
        if file is not None:
            file.write(b"half of a checkpoint")
            file.flush()
        raise KeyboardInterrupt

    train_step(training, random_batch(8, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(failing, die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, training, training.sums, **STATE)
    assert path.read_bytes() == before
    checkpoint.save(path, training, training.sums, **STATE)  # what was left behind is in nobody's way
    assert_equal_trees(checkpoint.load(path)["model"], training.network.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_is_on_disk_before_it_takes_the_old_ones_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    training = stepped_training()
    checkpoint.save(tmp_path / "last.pt", training, training.sums, **STATE)
    assert events == ["file", "rename", "folder"]


# Restoring into another run


def test_a_checkpoint_of_another_model_is_a_user_error_of_one_line(intact: Path) -> None:
    other = training_of(build_model("lenet", 7, mean=[0.5] * 3, std=[0.5] * 3))
    with pytest.raises(UserError, match=r"does not fit the model of this config: .*fc3") as error:
        checkpoint.restore(other, checkpoint.load(intact), intact)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("then", "now"), [("off", "fp16"), ("fp16", "off")])
def test_a_run_may_go_on_in_another_precision(then: str, now: str, tmp_path: Path) -> None:
    saved = stepped_training(amp=then)
    checkpoint.save(tmp_path / "last.pt", saved, saved.sums)
    training = training_of(lenet(seed=1), amp=now)
    checkpoint.restore(training, checkpoint.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert_equal_trees(training.network.state_dict(), saved.network.state_dict())
    train_step(training, random_batch(8))


def test_the_scale_of_float16_gradients_is_restored(tmp_path: Path) -> None:
    saved = stepped_training(amp="fp16")
    saved.scaler.update(2.0**7)
    checkpoint.save(tmp_path / "last.pt", saved, saved.sums)
    training = training_of(lenet(), amp="fp16")
    checkpoint.restore(training, checkpoint.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert training.scaler.get_scale() == 2.0**7


def test_an_optimizer_with_other_groups_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    saved, other = training_of(small_net()), training_of(small_net(), {"layer_decay": 0.5})
    for first, second in ((saved, other), (other, saved)):
        checkpoint.save(path, first, first.sums)
        with pytest.raises(UserError, match=r"last\.pt does not fit the optimizer of this config \(.*; start a new"):
            checkpoint.restore(second, checkpoint.load(path), path)
