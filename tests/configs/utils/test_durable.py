"""Files that are whole at any instant; test_checkpoint stops a save at each of its steps."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from configs.utils import durable


def test_the_old_file_stays_where_filling_the_new_one_fails_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "full")

    durable.atomic_write(path, lambda file: file.write(b"old"))
    for previous in (None, tmp_path / "previous"):
        with pytest.raises(OSError, match="full"):
            durable.atomic_write(path, fail) if previous is None else durable.replace_and_keep(path, previous, fail)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders_is_put_up_with_and_other_errors_are_not(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    if passes:
        durable.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    else:
        with pytest.raises(OSError, match="Input/output error"):
            durable.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"
