"""The file format: verified before it is unpickled, and never a way to run code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils.errors import UserError
from helpers.checkpoints import STATE
from helpers.training import lenet
from helpers.trees import assert_equal_trees
from train.checkpoint import format, store

pytestmark = pytest.mark.usefixtures("group_unless_gpu")


def test_checkpoint_contains_only_plain_data(intact: Path) -> None:
    content = torch.load(intact, weights_only=True)
    assert content["format"] == format.FORMAT
    assert content["model"].keys() == lenet().state_dict().keys()


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
    tables = len(whole) - 6000  # archive tables: a flipped bit there once made torch.load return uninitialized memory
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


def test_manifest_with_another_position_counts_as_damage(intact: Path, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(intact.read_bytes().replace(b'"epoch": 2', b'"epoch": 3'))
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(its checksum is wrong"):
        store.load(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"{}",
        b"[" * 1000,
        b"9" * 1000,
        b"\xff" * 5000,
        b"null",
        b'{"bytes": 0, "epoch": 1}',
        *(b'{"bytes": %s, "epoch": 1, "step": 1}' % size for size in (b"-1", b"1e999", b"9" * 30, b"true", b'"1"')),
    ],
)
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
    assert "weights_only" not in str(error.value)  # gives no advice to load it unsafely


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
    path.write_bytes(with_checksum(path.read_bytes()))  # an attacker can compute the checksum too
    with pytest.raises(UserError):
        store.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have run


def repacked(content: dict[str, Any], **more: Any) -> bytes:
    """Save like torch.save, but with other zipfile options and more records."""
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
