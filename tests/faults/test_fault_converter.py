"""Conversions that are killed, stopped or run out of space: the same command resumes, and no byte differs."""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from configs.utils import files
from configs.utils.errors import UserError
from helpers.chance import seeded
from helpers.converter import (
    Contents,
    Conversion,
    contents,
    conversions,
    is_gone,
    kill_group,
    run,
    said,
    start,
    wait_for,
    workers_of,
)
from helpers.memory_source import tiny_source, write
from helpers.training import restore_signal_handlers
from pipelines.convert import shuffle, split_writer, writer
from pipelines.convert.layout import SplitLayout
from pipelines.convert.spool import Table
from tools import convert

ENCODINGS = ("npy", "jpeg")
CAN_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="needs unshare -rm")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    return conversions(tmp_path_factory.mktemp("sources"))


Unbroken = Callable[[str], tuple[Contents, float]]


@pytest.fixture(scope="module")
def unbroken(sources: dict[str, Conversion], tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Return all files of an undisturbed conversion and its duration in seconds."""

    @functools.cache
    def convert_once(encoding: str) -> tuple[Contents, float]:
        out = tmp_path_factory.mktemp("unbroken") / "out"
        process = start(sources[encoding].command(out))
        wait_for((out / ".spool").exists, process)
        began = time.monotonic()
        error = process.communicate()[1]
        assert process.returncode == 0, error
        assert len(contents(out)) > 20
        return contents(out), time.monotonic() - began

    return convert_once


def kill_and_rerun(
    conversion: Conversion, expected: tuple[Contents, float], tmp_path: Path, kills: int, *, worker_only: bool
) -> None:
    """Repeat in new folders: kill once at a random time, run the same command again, compare."""
    chance, whole = seeded(), 0
    for number in range(kills):
        out = tmp_path / f"out{number}"
        process = start(conversion.command(out))
        wait_for((out / ".spool").exists, process)
        if not worker_only or chance.random() < 0.7:  # otherwise kill a worker that has just started
            time.sleep(chance.uniform(0, expected[1]))
        if worker_only:
            wait_for(lambda: bool(workers_of(process)), process)  # noqa: B023 - called immediately
            for pid in chance.sample(workers := workers_of(process), min(1, len(workers))):
                os.kill(pid, signal.SIGKILL)
            error = said(process.communicate(timeout=60)[1])
            if process.returncode != 0:  # it had not yet finished
                assert process.returncode == 2
                assert error.startswith("error: a worker process was killed"), error
                assert "\n" not in error
                assert not (out / "dataset.json").exists()
        else:
            kill_group(process)
        assert is_gone(process.pid)
        whole += (out / "dataset.json").exists()
        assert run(conversion.command(out))[0] == 0
        assert contents(out) == expected[0], f"kill {number}"
        shutil.rmtree(out)
    assert whole < max(kills, 5), "no kill came in time"


@pytest.mark.parametrize("worker_only", [False, True], ids=["group", "worker"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.campaign
def test_twenty_kills_at_random_times_change_no_byte(
    sources: dict[str, Conversion], unbroken: Unbroken, encoding: str, worker_only: bool, tmp_path: Path
) -> None:
    kill_and_rerun(sources[encoding], unbroken(encoding), tmp_path, 20, worker_only=worker_only)


@pytest.mark.slow
def test_one_kill_at_a_random_time_changes_no_byte(
    sources: dict[str, Conversion], unbroken: Unbroken, tmp_path: Path
) -> None:
    kill_and_rerun(sources["npy"], unbroken("npy"), tmp_path, 1, worker_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.campaign)]
)
def test_stopped_conversion_prints_one_line_and_can_resume(
    sources: dict[str, Conversion], unbroken: Unbroken, number: int, code: int, tmp_path: Path
) -> None:
    """Send the signal to the whole group, like a terminal or a scheduler."""
    out = tmp_path / "out"
    process = start(sources["npy"].command(out), preexec_fn=restore_signal_handlers)
    wait_for((out / ".spool" / "val").exists, process)
    os.killpg(process.pid, number)
    error = said(process.communicate(timeout=60)[1])
    assert (process.returncode, error.count("\n")) == (code, 0), error
    assert error.startswith(("terminated", "interrupted"))
    assert is_gone(process.pid)
    assert not (out / "dataset.json").exists()
    assert run(sources["npy"].command(out))[0] == 0
    assert contents(out) == unbroken("npy")[0]


def fill_and_rerun(conversion: Conversion, expected: Contents, tmp_path: Path, room_kib: int) -> bool:
    """Convert into a file system of `room_kib`, then into a larger one; return True if the first was too small.

    The converter sees the free space of another file system, as if other programs filled the disk after its check.
    """
    blind = (
        "import shutil, sys; usage = shutil.disk_usage(sys.argv.pop(1)); shutil.disk_usage = lambda _: usage; "
        "import tools.convert as c; c.run_main(c.main)"
    )
    room, copy = tmp_path / "room", tmp_path / "copy"
    room.mkdir(exist_ok=True)
    command = [sys.executable, "-c", blind, str(tmp_path), *conversion.command(room / "out", 2)[2:]]
    script = """
        mount -t tmpfs -o size="$1"k none "$2" || exit 99
        room=$2 copy=$3; shift 3
        "$@"; first=$?
        if [ $first = 2 ]; then
            [ -e "$room/out/dataset.json" ] && exit 98
            mount -o remount,size=500m "$room" && "$@" || exit 97
        fi
        cp -a "$room/out" "$copy" && exit $first
    """
    code, error = run(["unshare", "-rm", "sh", "-c", script, "sh", str(room_kib), str(room), str(copy), *command])
    assert code in (0, 2), (code, error)
    if code == 2:
        assert error.startswith(f"error: cannot convert into {room / 'out'}: No space left on device"), error
        assert error.count("\n") == 0
    assert contents(copy) == expected
    shutil.rmtree(copy)
    return code == 2


@needs_mount
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.campaign
def test_disk_full_at_twenty_places_loses_nothing(
    sources: dict[str, Conversion], unbroken: Unbroken, encoding: str, tmp_path: Path
) -> None:
    expected, chance = unbroken(encoding)[0], seeded()
    size_kib = sum(map(len, expected.values())) >> 10
    full = sum(
        fill_and_rerun(sources[encoding], expected, tmp_path, chance.randrange(100, size_kib)) for _ in range(20)
    )
    assert full == 20


@pytest.mark.slow
def test_file_size_limit_loses_nothing(sources: dict[str, Conversion], unbroken: Unbroken, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600 << 10, 600 << 10))

    code, error = run(sources["npy"].command(out), preexec_fn=limit)
    assert code == 2
    assert error.startswith(f"error: cannot convert into {out}: File too large")
    assert "\n" not in error
    assert run(sources["npy"].command(out))[0] == 0
    assert contents(out) == unbroken("npy")[0]


@needs_mount
def test_read_only_folder_is_one_error_message(sources: dict[str, Conversion], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "begun" / ".spool").mkdir(parents=True)
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 99; shift; exec "$@"'
    for out in (folder / "new", folder / "begun"):
        command = sources["npy"].command(out, workers=1)
        code, error = run(["unshare", "-rm", "sh", "-c", mount, "sh", str(folder), *command])
        assert code == 2
        assert error.startswith("error: cannot "), error
        assert "Read-only file system" in error
        assert "\n" not in error
    assert contents(folder) == {}


@pytest.mark.parametrize(("encoding", "number"), [("npy", errno.EDQUOT), ("jpeg", errno.EIO)])
def test_error_at_any_flush_or_rename_loses_nothing(
    encoding: str, number: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail repeatedly, each time some calls later, like a quota that is used up."""
    expected, out = contents(request.getfixturevalue(f"{encoding}_data")), tmp_path / "tiny"
    calls, fails_at = 0, 3

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(number, os.strerror(number))
            return call(*arguments)

        return counted

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    numbers: set[int | None] = set()
    while not (out / "dataset.json").exists() or (out / ".spool").exists():
        try:
            calls = 0
            write(tiny_source(encoding), out, encoding)
        except OSError as error:
            numbers.add(error.errno)
            fails_at += 9
    assert numbers == {number}
    assert fails_at > 30
    assert contents(out) == expected


def test_exceeded_quota_is_one_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=r"cannot convert into .*Disk quota exceeded.*same command again"):
            convert.main(["digits", "--out", str(tmp_path / "out")])
    assert convert.main(["digits", "--out", str(tmp_path / "out")]) == 0
    assert convert.main(["digits", "--out", str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_source_changed_between_kill_and_rerun_is_refused(encoding: str, tmp_path: Path) -> None:
    """The change is noticed even if size, names and fingerprinted rows are unchanged."""
    conversion = conversions(tmp_path)[encoding]
    out = tmp_path / "out"
    process = start(conversion.command(out, workers=1))
    wait_for((out / ".spool" / "request.json").exists, process)
    kill_group(process)
    assert not (out / "dataset.json").exists()
    before = contents(out)
    if encoding == "npy":
        with h5py.File(conversion.source, "a") as file:
            file["images-train"][1] ^= 1
    else:
        photo = conversion.source / "train" / "class3" / "00010.jpg"
        content = bytearray(photo.read_bytes())
        content[-20] ^= 1
        photo.unlink()
        photo.write_bytes(content)
    code, error = run(conversion.command(out, workers=1))
    assert code == 2
    assert "unfinished conversion of another source, or of this one before it was changed" in error, error
    assert contents(out) == before


@pytest.mark.parametrize("kept", [106, 0])
def test_lost_samples_are_noticed_before_dataset_json_is_written(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = shuffle._shard_samples

    def lose(layout: SplitLayout, shard: int) -> tuple[Table, list[memoryview]]:
        table, payloads = collect(layout, shard)
        return {name: column[107 - kept :] for name, column in table.items()}, payloads[107 - kept :]

    monkeypatch.setattr(shuffle, "_shard_samples", lose)
    with pytest.raises(UserError, match=rf"{kept} samples written and 0 quarantined do not add up to the 107 rows"):
        write(tiny_source("npy"), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("val/block-000000.npz", "cannot be read"),
        ("val/block-000000.group-00.bin", "was truncated"),
        ("request.json", "unfinished conversion of another source"),
    ],
)
def test_damaged_spool_is_one_error_message(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> int:
        raise OSError(errno.EIO, "stopped")

    merge = split_writer.merge
    monkeypatch.setattr(split_writer, "merge", stop)
    with pytest.raises(OSError, match="stopped"):
        write(tiny_source("npy"), tmp_path / "out")
    monkeypatch.setattr(split_writer, "merge", merge)
    file = tmp_path / "out" / ".spool" / name
    for damaged in sorted(file.parent.glob(file.name)):
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=says):
        write(tiny_source("npy"), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("name", [".spool", ".spool/lock"])
def test_nothing_is_written_through_a_link_in_a_spool(name: str, tmp_path: Path) -> None:
    link, target = tmp_path / "out" / name, tmp_path / "target"
    link.parent.mkdir(parents=True)
    target.mkdir() if name == ".spool" else target.touch()
    link.symlink_to(target)
    with pytest.raises(UserError, match=rf"{name} is a link, through which a conversion would write elsewhere"):
        write(tiny_source("npy"), tmp_path / "out")
    assert target.is_file() or list(target.iterdir()) == []


def test_files_are_on_disk_before_dataset_json_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is flushed before the rename of dataset.json and once more after it."""
    events: list[str] = []
    rename, sync = Path.rename, files.sync_folder

    def note_rename(file: Path, target: Path) -> Path:
        if target.parent == tmp_path / "out":
            events.append(target.name)
        return rename(file, target)

    def note_sync(folder: Path) -> None:
        if folder == tmp_path / "out":
            events.append("sync")
        sync(folder)

    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(files, "sync_folder", note_sync)
    monkeypatch.setattr(writer, "sync_folder", note_sync)
    write(tiny_source("npy"), tmp_path / "out")
    assert events[-3:] == ["sync", "dataset.json", "sync"]
    shards = [place for place, name in enumerate(events) if name.endswith(".tar")]
    assert len(shards) > 3
    assert all(events[place + 1] == "sync" for place in shards)
