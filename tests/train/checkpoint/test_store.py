"""Saving and choosing checkpoint files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.utils.errors import UserError
from helpers.checkpoints import STATE, damage, stepped_training
from helpers.training import file_size_limit, random_batch
from helpers.trees import assert_equal_trees
from train.checkpoint import format, store
from train.checkpoint.state import collect_state, to_host
from train.engine.step import train_step

pytestmark = pytest.mark.usefixtures("group_unless_gpu")


def test_checkpoint_is_not_written_through_a_link(intact: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"a stranger's")
    for name in ("last.pt", "last.pt.tmp", "best.pt", "best.pt.tmp"):
        (tmp_path / name).symlink_to(elsewhere)
    for name in ("last.pt", "best.pt"):
        store.write(tmp_path / name, store.load(intact))
    assert elsewhere.read_bytes() == b"a stranger's"
    assert not any((tmp_path / name).is_symlink() for name in ("last.pt", "best.pt"))


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


def test_failed_save_is_one_error_and_changes_nothing(tmp_path: Path) -> None:
    state = stepped_training()
    content = to_host(collect_state(state, state.sums, **STATE))
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


def test_failed_first_save_says_no_earlier_checkpoint_exists(tmp_path: Path) -> None:
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
    class Killed(BaseException):
        pass

    calls, stop_before = 0, -1

    def stopping(function: Any, error: OSError | None = None) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == stop_before:
                raise Killed
            if error is not None:
                raise error
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", stopping(os.fsync))
    monkeypatch.setattr(Path, "rename", stopping(Path.rename))
    refused = None if links else OSError(errno.EPERM, "no links")
    monkeypatch.setattr(Path, "hardlink_to", stopping(Path.hardlink_to, refused))
    for before in (0, 1, 2, 5):  # existing checkpoints
        for place in range(20):
            folder = tmp_path / f"{before}-{place}"
            folder.mkdir()
            stop_before = -1
            for number in range(before):
                store.write_last(folder, numbered(number))
            calls, stop_before = 0, place
            try:
                store.write_last(folder, numbered(before))
            except Killed:
                found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
                epochs = [epoch_of(path) for path in found]
                assert len(epochs) >= min(before, 1 if not links else 2)
                assert epochs[:1] in ([], [before - 1], [before])
                assert links is False or before == 0 or (folder / "last.pt").exists()
                stop_before = -1
                recovered = shutil.copytree(folder, tmp_path / f"{folder.name} recovered", copy_function=os.link)
                store.recover_interrupted_save(recovered)
                kept = [epoch_of(path) for path in sorted(recovered.iterdir())]  # last.pt before previous.pt
                assert len(kept) >= len(epochs)
                assert kept == [epochs[0] - back for back in range(len(kept))]  # without a gap
                store.write_last(folder, numbered(before))  # leftovers do not matter
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
    path, state = tmp_path / "last.pt", stepped_training()
    store.save(path, state, state.sums, **STATE)
    before = path.read_bytes()

    def die(content: Any, file: Any = None) -> None:
        if file is not None:
            file.write(b"half of a checkpoint")
            file.flush()
        raise KeyboardInterrupt

    train_step(state, random_batch(8, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(failing, die)
        with pytest.raises(KeyboardInterrupt):
            store.save(path, state, state.sums, **STATE)
    assert path.read_bytes() == before
    store.save(path, state, state.sums, **STATE)  # leftovers do not matter
    assert_equal_trees(store.load(path)["model"], state.network.state_dict())
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
    state = stepped_training()
    store.save(tmp_path / "last.pt", state, state.sums, **STATE)
    assert events == ["file", "rename", "folder"]
