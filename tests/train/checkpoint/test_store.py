"""Checkpoints: whole at any instant, refused when damaged or foreign, never a way to run code."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.utils.errors import UserError
from helpers.training import alone, file_size_limit, lenet, make_state, random_batch, small_net
from helpers.trees import assert_equal_trees
from models import build_model
from train.checkpoint import format, store
from train.checkpoint.restore import restore_state
from train.engine.state import TrainState
from train.engine.step import train_step
from train.optim.factory import set_learning_rate

STATE = {"position": {"epoch": 2, "step": 5}, "progress": {"best_top1": 0.5}, "stream": {"seed": 0}, "config": "a: 1\n"}


@pytest.fixture(autouse=True)
def _process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("gpu") else alone():
        yield


def stepped_training(**settings: Any) -> TrainState:
    training = make_state(lenet(), **settings)
    train_step(training, random_batch(8))
    return training


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step; read only."""
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    with alone():
        training = stepped_training()
        store.save(path, training, training.sums, **STATE)
    return path


def test_saved_state_is_restored_bitwise(intact: Path) -> None:
    saved, content = stepped_training(), store.load(intact)
    assert {key: content[key] for key in STATE} == STATE
    restored = make_state(lenet(seed=1))
    restore_state(restored, content, intact)
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())
    assert_equal_trees(restored.optimizer.state_dict(), saved.optimizer.state_dict())
    assert torch.equal(restored.sums, saved.sums)
    for training in (saved, restored):
        train_step(training, random_batch(8, seed=1))
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())


def test_checkpoint_contains_only_plain_data(intact: Path) -> None:
    content = torch.load(intact, weights_only=True)
    assert content["format"] == format.FORMAT
    assert content["model"].keys() == lenet().state_dict().keys()


def test_last_learning_rate_is_restored(tmp_path: Path) -> None:
    saved, restored = stepped_training(), make_state(lenet(seed=1))
    set_learning_rate(saved.optimizer, 1.25e-7)
    store.save(tmp_path / "last.pt", saved, saved.sums, **STATE)
    restore_state(restored, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert {group["lr"] for group in restored.optimizer.param_groups} == {1.25e-7}


# Damage


def test_truncated_checkpoint_is_a_user_error(intact: Path, tmp_path: Path) -> None:
    whole, cut = intact.read_bytes(), tmp_path / "cut.pt"
    for share in (0, 1, 2, 100, 500, 900, 990, 999):
        cut.write_bytes(whole[: len(whole) * share // 1000])
        with pytest.raises(UserError, match=r"cut\.pt cannot be read"):
            store.load(cut)
    cut.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cut\.pt cannot be read"):
        store.load(cut)


def test_any_flipped_bit_is_a_user_error(intact: Path, tmp_path: Path) -> None:
    whole, flipped, places = intact.read_bytes(), tmp_path / "flipped.pt", random.Random(0)
    tables = len(whole) - 6000  # of the archive: a bit there once made torch.load return memory that nobody had written
    manifest = whole.rindex(b"\n", 0, -1)
    for start in [0] * 30 + [tables] * 30 + [manifest] * 60:
        content = bytearray(whole)
        content[places.randrange(start, len(whole))] ^= 1 << places.randrange(8)
        flipped.write_bytes(content)
        with pytest.raises(UserError, match=r"flipped\.pt cannot be read \(its checksum is wrong"):
            store.load(flipped)


def test_manifest_describes_the_file(intact: Path) -> None:
    whole = intact.read_bytes()
    line = whole.splitlines()[-1]
    fields = json.loads(line)
    assert whole.endswith(b"\n" + line + b"\n")
    assert fields == {
        "format": format.FORMAT,
        "bytes": len(whole) - len(line) - 2,
        "sha256": hashlib.sha256(whole[: fields["bytes"]]).hexdigest(),
        **STATE["position"],
        "crc32": zlib.crc32(line.partition(b', "crc32"')[0] + b"}"),
    }


def test_manifest_without_crc_is_accepted_from_older_versions(intact: Path, tmp_path: Path) -> None:
    whole, old = intact.read_bytes(), tmp_path / "old.pt"
    older = whole.rpartition(b', "crc32"')[0] + b"}\n"
    old.write_bytes(older)
    assert_equal_trees(store.load(old), store.load(intact))
    old.write_bytes(older.replace(b'"epoch": 2', b'"epoch": 3'))
    with pytest.raises(UserError, match="its checksum is wrong"):
        store.load(old)


def test_file_with_flipped_bit_is_not_intact(intact: Path, tmp_path: Path) -> None:
    whole, flipped = intact.read_bytes(), tmp_path / "last.pt"
    last_line = len(whole.splitlines()[-1]) + 2
    for place in range(len(whole) - last_line, len(whole)):
        for bit in range(8):
            flipped.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert not store.is_intact(flipped), f"bit {bit} of byte {place}"


def test_pipe_or_device_does_not_block_loading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.pt")
    for path in (tmp_path / "last.pt", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot be read \(it is not a regular file\)"):
            store.load(path)
        assert not store.is_intact(path)


def test_checkpoint_is_not_written_through_a_link(intact: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"a stranger's")
    for name in ("last.pt", "last.pt.tmp", "best.pt", "best.pt.tmp"):
        (tmp_path / name).symlink_to(elsewhere)
    for name in ("last.pt", "best.pt"):
        store.write(tmp_path / name, store.load(intact))
    assert elsewhere.read_bytes() == b"a stranger's"
    assert not any((tmp_path / name).is_symlink() for name in ("last.pt", "best.pt"))


def test_manifest_with_another_position_counts_as_damage(intact: Path, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(intact.read_bytes().replace(b'"epoch": 2', b'"epoch": 3'))
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(its checksum is wrong"):
        store.load(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"{}", b"[" * 1000, b"9" * 1000, b"\xff" * 5000, b"null", b'{"bytes": 0, "epoch": 1}',
     *(b'{"bytes": %s, "epoch": 1, "step": 1}' % size for size in (b"-1", b"1e999", b"9" * 30, b"true", b'"1"'))],
)  # fmt: skip
def test_any_invalid_manifest_is_a_user_error(line: bytes, intact: Path, tmp_path: Path) -> None:
    whole, path = intact.read_bytes(), tmp_path / "last.pt"
    for content in (whole[: whole.rindex(b"\n", 0, -1)], b""):
        for end in (b"", b"\n"):
            path.write_bytes(content + b"\n" + line + end)
            with pytest.raises(UserError, match=r"last\.pt cannot be read"):
                store.load(path)


def test_old_checkpoint_with_bare_checksum_is_verified(intact: Path, tmp_path: Path) -> None:
    whole, old = intact.read_bytes(), tmp_path / "old.pt"
    older = with_checksum(whole[: whole.rindex(b"\n", 0, -1)])
    old.write_bytes(older)
    assert_equal_trees(store.load(old), store.load(intact))
    for place in (100, len(older) // 2, len(older) - 30, len(older) - 1):
        old.write_bytes(older[:place] + bytes([older[place] ^ 1]) + older[place + 1 :])
        with pytest.raises(UserError, match="its checksum is wrong"):
            store.load(old)


def test_torch_can_load_a_checkpoint(intact: Path) -> None:
    content = torch.load(intact, weights_only=True)
    assert_equal_trees(content, store.load(intact))


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
        "a later format": saved({"format": format.FORMAT + 1, "model": {}}),
        "a whole model": saved(torch.nn.Linear(2, 2)),
    }


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).hexdigest().encode()


@pytest.mark.parametrize("checksum", [False, True], ids=["", "with a checksum"])
@pytest.mark.parametrize("kind", foreign_files())
def test_foreign_file_is_a_user_error_of_one_line(kind: str, checksum: bool, tmp_path: Path) -> None:
    path, content = tmp_path / "foreign.pt", foreign_files()[kind]
    path.write_bytes(with_checksum(content) if checksum else content)
    with pytest.raises(UserError, match=r"foreign\.pt") as error:
        store.load(path)
    assert len(str(error.value).splitlines()) == 1
    assert "weights_only" not in str(error.value)  # no advice to load it unsafely


@pytest.mark.parametrize("name", ["missing.pt", ""])
def test_missing_file_or_folder_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist|cannot be read"):
        store.load(tmp_path / name)


class Intruder:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["torch.save", "old torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"format": format.FORMAT, "model": Intruder(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    path.write_bytes(with_checksum(path.read_bytes()))  # which whoever writes such a file can compute as well
    with pytest.raises(UserError):
        store.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have run


def repacked(content: dict[str, Any], **more: Any) -> bytes:
    """As torch.save writes it, but with other options of zipfile, and more records."""
    buffer, repacked = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(repacked, "w", **more) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        if not more:
            target.writestr(source.namelist()[-1], b"the same name again")
    return with_checksum(repacked.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("options", [{"compression": zipfile.ZIP_DEFLATED}, {}], ids=["compressed", "a name twice"])
def test_compressed_or_duplicate_records_are_refused_before_loading(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grows.pt"
    path.write_bytes(repacked({"format": format.FORMAT, "model": {"weight": torch.zeros(1000)}}, **options))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(
        UserError, match=r"grows\.pt cannot be read \(its records are not those that torch\.save writes"
    ):
        store.load(path)


def test_unneeded_function_that_torch_allows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grows.pt"
    store.write(path, {"format": format.FORMAT, "model": {"weight": bytearray(9)}})
    with pytest.raises(UserError, match=r"grows\.pt is refused, since it holds more than tensors"):
        store.load(path)


@pytest.mark.parametrize(
    "crafted",
    [
        {"model": [1]}, {"model": {"weight": 3}}, {"model": {3: torch.zeros(3)}}, {"optimizer": []}, {"scaler": 1},
        {"sums": [0.0] * 3}, {"lookahead": None}, {"ema": {"weight": "much"}}, {"proxy": "none"}, {"position": {}},
        {"position": {"epoch": -1, "step": 0}}, {"position": {"epoch": 1.5, "step": 0}}, {"position": None},
        {"progress": 0.5}, {"stream": "a"}, {"config": {"seed": 0}}, {"dataset": ["cat"]},
    ],
    ids=str,
)  # fmt: skip
def test_entry_of_wrong_type_is_named(crafted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"
    store.write(path, {"format": format.FORMAT, "model": {}, **STATE, **crafted})
    with pytest.raises(UserError, match=rf"crafted\.pt cannot be read \(its '{next(iter(crafted))}' is not what"):
        store.load(path)


# Which one is taken


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_first_intact_checkpoint_is_loaded_and_damaged_are_named(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, previous = (Path(shutil.copy(intact, tmp_path / name)) for name in ("last.pt", "previous.pt"))
    assert store.load_newest([last, previous])[0] == last
    assert capsys.readouterr().err == ""
    damage(last)
    path, content = store.load_newest([last, previous])
    assert path == previous
    assert_equal_trees(content, store.load(intact))
    reason = "its checksum is wrong: it is damaged, or from another program"
    warning = f"warning: checkpoint {last} cannot be read ({reason}); {previous} is used instead\n"
    assert capsys.readouterr().err == warning
    last.unlink()
    assert store.load_newest([last, previous])[0] == previous
    assert capsys.readouterr().err == f"warning: checkpoint {last} does not exist; {previous} is used instead\n"


def test_error_names_all_damaged_and_an_intact_checkpoint(intact: Path, tmp_path: Path) -> None:
    last, previous, best = (
        Path(shutil.copy(intact, tmp_path / name)) for name in ("last.pt", "previous.pt", "best.pt")
    )
    damage(last)
    damage(previous)
    for there, advice in ((True, f"{best} is intact"), (False, "start a new run without --resume")):
        if not there:
            best.unlink()
        with pytest.raises(UserError) as error:
            store.load_newest([last, previous])
        message = str(error.value)
        assert message.startswith(f"checkpoint {last} cannot be read (")
        assert f", and {previous} cannot be read (" in message
        assert message.endswith(f"; {advice}")
        assert len(message.splitlines()) == 1


# Saving


def test_host_copy_is_independent_and_keeps_strides_and_versions() -> None:
    training = stepped_training()
    weights = training.network.state_dict()
    weights["filters"] = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    content = store.collect_state(training, training.sums, extra={"weights": weights, 3: (1, None, True, "text")})
    copied = store.to_host(content)
    assert_equal_trees(copied, content)
    assert copied["extra"]["weights"]["filters"].is_contiguous(memory_format=torch.channels_last)
    assert copied["model"]._metadata == training.network.state_dict()._metadata
    before = training.network.state_dict()["network.fc3.weight"].clone()
    train_step(training, random_batch(8, seed=1))
    assert torch.equal(copied["model"]["network.fc3.weight"], before)
    assert torch.equal(content["model"]["network.fc3.weight"], training.network.state_dict()["network.fc3.weight"])
    assert not torch.equal(content["model"]["network.fc3.weight"], before)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_copy_from_gpu_is_pinned_complete_and_keeps_strides() -> None:
    filters = torch.rand(64, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    expected = filters.cpu()
    copied = store.to_host({"model": {"filters": filters, "count": torch.tensor(3, device="cuda")}})["model"]
    filters.zero_()
    assert torch.equal(copied["filters"], expected)
    assert copied["filters"].is_pinned()
    assert copied["filters"].stride() == filters.stride()
    assert int(copied["count"]) == 3


@pytest.mark.parametrize("value", [np.float64(0.5), Path("a"), {1, 2}, b"bytes"], ids=str)
def test_unloadable_values_are_not_saved(value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold a "):
        store.to_host({"progress": {"value": value}})


def test_failed_save_is_one_error_and_changes_nothing(tmp_path: Path) -> None:
    training = stepped_training()
    content = store.to_host(store.collect_state(training, training.sums, **STATE))
    store.write(tmp_path / "best.pt", content)
    store.write_last(tmp_path, content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = len(before["last.pt"])
    for limit in (0, 10, 5000, size // 2, size - 100, size - 1):
        for write in (store.write_last, lambda folder, content: store.write(folder / "last.pt", content)):
            with file_size_limit(limit), pytest.raises(UserError) as error:
                write(tmp_path, content)
            message = (
                f"cannot write checkpoint {tmp_path / 'last.pt'} (File too large); the earlier last.pt and best.pt"
            )
            assert str(error.value).startswith(message)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    store.write_last(tmp_path, content)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "previous.pt"}


def test_failed_first_save_says_there_is_no_earlier(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(No such file or directory\); there is no earlier one: "):
        store.write(tmp_path / "missing" / "last.pt", {"format": 1})


def numbered(number: int) -> dict[str, Any]:
    return {"format": format.FORMAT, "model": {}, "position": {"epoch": number, "step": 0}}


def epoch_of(path: Path) -> int:
    return int(store.load(path)["position"]["epoch"])


def test_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        store.write_last(tmp_path, numbered(number))
        assert epoch_of(tmp_path / "last.pt") == number
    assert epoch_of(tmp_path / "previous.pt") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


def test_damaged_checkpoint_never_replaces_an_intact_one(tmp_path: Path) -> None:
    for number in (0, 1):
        store.write_last(tmp_path, numbered(number))
    damage(tmp_path / "last.pt")
    store.write_last(tmp_path, numbered(2))
    assert [epoch_of(tmp_path / name) for name in ("last.pt", "previous.pt")] == [2, 0]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_newest_intact_checkpoint_survives_interrupted_save(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    calls, stop_before = 0, -1

    def stopping(function: Any, error: OSError | None = None) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == stop_before:
                raise Stopped
            if error is not None:
                raise error
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", stopping(os.fsync))
    monkeypatch.setattr(Path, "rename", stopping(Path.rename))
    refused = None if links else OSError(errno.EPERM, "no links")
    monkeypatch.setattr(Path, "hardlink_to", stopping(Path.hardlink_to, refused))
    for before in (0, 1, 2, 5):  # checkpoints that there are
        for place in range(20):
            folder = tmp_path / f"{before}-{place}"
            folder.mkdir()
            stop_before = -1
            for number in range(before):
                store.write_last(folder, numbered(number))
            calls, stop_before = 0, place
            try:
                store.write_last(folder, numbered(before))
            except Stopped:
                found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
                epochs = [epoch_of(path) for path in found]
                assert len(epochs) >= min(before, 1 if not links else 2)
                assert epochs[:1] in ([], [before - 1], [before])
                assert links is False or before == 0 or (folder / "last.pt").exists()
                stop_before = -1
                settled = shutil.copytree(folder, tmp_path / f"{folder.name} settled", copy_function=os.link)
                store.recover_interrupted_save(settled)
                kept = [epoch_of(path) for path in sorted(settled.iterdir())]  # last.pt before previous.pt
                assert len(kept) >= len(epochs)
                assert kept == [epochs[0] - back for back in range(len(kept))]  # no gap between them
                store.write_last(folder, numbered(before))  # what was left behind is in nobody's way
            else:
                assert place > 2
                break
        else:
            pytest.fail("a save has no end")
        names = {"last.pt", "previous.pt"} if before else {"last.pt"}
        assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync"])
def test_killed_save_leaves_the_old_checkpoint_intact(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, training = tmp_path / "last.pt", stepped_training()
    store.save(path, training, training.sums, **STATE)
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
            store.save(path, training, training.sums, **STATE)
    assert path.read_bytes() == before
    store.save(path, training, training.sums, **STATE)  # what was left behind is in nobody's way
    assert_equal_trees(store.load(path)["model"], training.network.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoint_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    store.save(tmp_path / "last.pt", training, training.sums, **STATE)
    assert events == ["file", "rename", "folder"]


# Restoring into another run


@pytest.mark.parametrize(
    "crafted",
    [
        {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"sums": torch.zeros(2)},
        {"optimizer": {"state": {}, "param_groups": [3]}}, {"optimizer": {"state": 3, "param_groups": 3}},
        {"model": {}}, {"optimizer": "shapes"},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_state_is_one_user_error(crafted: dict[str, Any], intact: Path) -> None:
    content = store.load(intact)
    if crafted == {"optimizer": "shapes"}:
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7, 7)
        crafted = {}
    with pytest.raises(UserError, match=r"last\.pt does not fit") as error:
        restore_state(make_state(lenet()), content | crafted, intact)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "sums"])
def test_missing_entry_is_named(part: str, intact: Path) -> None:
    content = store.load(intact)
    del content[part]
    with pytest.raises(UserError, match=rf"last\.pt holds no {part}"):
        restore_state(make_state(lenet()), content, intact)


def test_checkpoint_of_another_model_is_a_user_error(intact: Path) -> None:
    other = make_state(build_model("lenet", 7, mean=[0.5] * 3, std=[0.5] * 3))
    with pytest.raises(UserError, match=r"does not fit the model of this config: .*fc3") as error:
        restore_state(other, store.load(intact), intact)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("then", "now"), [("off", "fp16"), ("fp16", "off")])
def test_run_may_resume_in_another_precision(then: str, now: str, tmp_path: Path) -> None:
    saved = stepped_training(amp=then)
    store.save(tmp_path / "last.pt", saved, saved.sums)
    training = make_state(lenet(seed=1), amp=now)
    restore_state(training, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert_equal_trees(training.network.state_dict(), saved.network.state_dict())
    train_step(training, random_batch(8))


def test_scale_of_float16_gradients_is_restored(tmp_path: Path) -> None:
    saved = stepped_training(amp="fp16")
    saved.scaler.update(2.0**7)
    store.save(tmp_path / "last.pt", saved, saved.sums)
    training = make_state(lenet(), amp="fp16")
    restore_state(training, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert training.scaler.get_scale() == 2.0**7


def test_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    saved, other = make_state(small_net()), make_state(small_net(), {"layer_decay": 0.5})
    for first, second in ((saved, other), (other, saved)):
        store.save(path, first, first.sums)
        with pytest.raises(UserError, match=r"last\.pt does not fit the optimizer of this config \(.*; start a new"):
            restore_state(second, store.load(path), path)
