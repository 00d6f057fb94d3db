"""Paths, files of unknown origin, and atomic writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from configs.utils import files
from configs.utils.errors import UserError
from configs.utils.files import open_plain, read_small_text
from tools import convert, export, predict, sweep
from train import ddp


def test_regular_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"l\xc3\xa4nge\n")
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"l\xc3\xa4nge\n"
    assert read_small_text(tmp_path / "file") == "länge\n"


def test_irregular_files_raise_without_blocking_or_leaking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "it is not a regular file"),
        (Path("/dev/zero"), "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(OSError, match=reason):
            open_plain(path)
    opened = [
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
    ]
    assert not {str(tmp_path), str(tmp_path / "pipe"), "/dev/zero"} & set(opened)


def test_small_text_is_limited_and_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="it has more than 10 bytes"):
        read_small_text(tmp_path / "file", max_bytes=10)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="invalid start byte"):
        read_small_text(tmp_path / "file")
    assert read_small_text(tmp_path / "file", "replace") == "\ufffd"


def test_tilde_is_expanded_in_paths_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    a, b, c = (Path("/home/me") / letter for letter in "abc")
    for parse, line, found in (
        (ddp.parse_arguments, "--cfg x --resume ~/a", {"resume": str(a)}),
        (export.parse_arguments, "--checkpoint ~/a --data-path ~/b", {"checkpoint": a, "data_path": str(b)}),
        (predict.parse_arguments, "--checkpoint ~/a ~/b --split ~/c", {"checkpoint": [a, b], "split": str(c)}),
        (sweep.parse_arguments, "--cfg ~/a seed=1,2 --out ~/b", {"cfg": a, "out": b}),
        (convert.build_parser().parse_args, "hdf5 --source ~/a --out ~/b", {"source": a, "out": b}),
    ):
        arguments = vars(parse(line.split()))
        assert {name: arguments[name] for name in found} == found
    with pytest.raises(UserError, match=r"'~nobody-of-this-name' starts with ~, but there is no such user; write \./~"):
        ddp.parse_arguments(["--cfg", "x", "--resume", "~nobody-of-this-name"])


def test_no_command_skips_tilde_expansion() -> None:
    for source in (Path(__file__).parents[3] / "tools").rglob("*.py"):
        assert "type=Path" not in source.read_text(), source


# Writing


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "full")

    files.atomic_write(path, lambda file: file.write(b"old"))
    for previous in (None, tmp_path / "previous"):
        with pytest.raises(OSError, match="full"):
            files.atomic_write(path, fail) if previous is None else files.replace_and_keep(path, previous, fail)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_unsupported_directory_fsync_is_ignored_but_not_other_errors(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    if passes:
        files.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    else:
        with pytest.raises(OSError, match="Input/output error"):
            files.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_named_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write_while_another_writes(file: BinaryIO) -> None:
        file.write(b"first")
        files.atomic_write(path, lambda other: other.write(b"second"), writer=".b")
        assert path.read_bytes() == b"second"

    files.atomic_write(path, write_while_another_writes, writer=".a")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_flushed_after_a_write_unless_asked_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", flushed.append)
    files.atomic_write(tmp_path / "file", lambda file: file.write(b"1"), sync=False)
    assert flushed == []
    files.atomic_write(tmp_path / "file", lambda file: file.write(b"2"))
    assert flushed == [tmp_path]
