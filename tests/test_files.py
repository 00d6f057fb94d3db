"""Files that may be a stranger's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs import files
from configs.files import open_plain, read_record


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"l\xc3\xa4nge\n")
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"l\xc3\xa4nge\n"
    assert read_record(tmp_path / "file") == "länge\n"


def test_what_is_no_file_is_not_waited_for_and_leaves_nothing_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "it is no file"),
        (Path("/dev/zero"), "it is no file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(OSError, match=reason):
            open_plain(path)
    opened = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
              if os.path.lexists(f"/proc/self/fd/{number}")]  # fmt: skip
    assert not {str(tmp_path), str(tmp_path / "pipe"), "/dev/zero"} & set(opened)


def test_a_record_is_limited_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 10)
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="it has more than 10 bytes"):
        read_record(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="invalid start byte"):
        read_record(tmp_path / "file")
    assert read_record(tmp_path / "file", "replace") == "\ufffd"
