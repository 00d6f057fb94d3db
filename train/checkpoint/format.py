"""The bytes of a checkpoint: what torch.save wrote, then one line of JSON that says how many bytes that is and their
sha256. torch.load reads the file as it is.

Nothing is unpickled before it is checked, since torch.load takes flipped bits for weights. Knows no training. What is
wrong with a file is a ValueError with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

import torch

FORMAT = 1
TAIL_BYTES = 1024  # the last line is looked for in so many
DIGEST_BYTES = 64  # sha256 in hexadecimal, alone at the end of files of older versions
CHUNK_BYTES = 2**20
DAMAGED = "its checksum is wrong: it is damaged or of another program"
NAMES = (b"stream", b"progress", b"position")  # in the pickle of every checkpoint, of any version
# beside those of module torch: types of elements and of storages
GLOBALS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")


class _Noting:
    """A file for torch.save; notes the sha256 of what passes, and an error, which torch would hide behind its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self.sha256.update(data)
            except BaseException as error:
                self.error = error
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """At the end, by whoever opened the file."""


def fill(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write all of a checkpoint; tensors must lie in host memory. An OSError comes out as it is.

    torch.save to an open file gives other threads Python's lock for nearly all of the time; to a path it does not.
    """
    noting = _Noting(file)
    torch.save(content, noting)  # type: ignore[arg-type]
    if noting.error is not None:
        raise noting.error
    file.write(_manifest(noting.bytes, noting.sha256.hexdigest(), *position_of(content)))


def position_of(content: dict[str, Any]) -> tuple[Any, Any]:
    """(epoch, step); None where the content does not say."""
    position = content.get("position")
    return (position.get("epoch"), position.get("step")) if isinstance(position, dict) else (None, None)


def _manifest(size: int, sha256: str, epoch: Any, step: Any, *, has_crc: bool = True) -> bytes:
    """has_crc: of this line itself, whose epoch and step follow from nothing else; older versions wrote none."""
    fields = {"format": FORMAT, "bytes": size, "sha256": sha256, "epoch": epoch, "step": step}
    crc = {"crc32": zlib.crc32(json.dumps(fields).encode())} if has_crc else {}
    return b"\n" + json.dumps(fields | crc).encode() + b"\n"


def read(file: BinaryIO) -> dict[str, Any]:
    """The content, in host memory; the file is verified first."""
    verify(file)
    _check_archive(file)
    file.seek(0)
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it holds no checkpoint of this program's format {FORMAT}")
    fields = _fields(_tail(file))
    if fields and (fields["epoch"], fields["step"]) != position_of(content):
        raise ValueError(DAMAGED)
    return content


def is_foreign(file: BinaryIO) -> bool:
    """Return whether torch.save wrote the file for another program; not for a damaged one of this program."""
    tail = _tail(file)
    if _fields(tail) or re.fullmatch(rb"[0-9a-f]{64}", tail[-DIGEST_BYTES:]):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            size = file.seek(0, os.SEEK_END)
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > size:
                return False
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, struct.error, zlib.error):
        return False
    return not all(name in content for name in NAMES)


def verify(file: BinaryIO) -> None:
    """Raise ValueError unless every byte is as it was written, as far as the file itself can tell."""
    tail = _tail(file)
    fields, size = _fields(tail), file.seek(0, os.SEEK_END)
    if not fields:  # of an older version, or anything else
        if _sha256(file, size - DIGEST_BYTES).encode() != tail[-DIGEST_BYTES:]:
            raise ValueError(DAMAGED)
        return
    sha256, has_crc = _sha256(file, fields["bytes"]), "crc32" in fields
    manifest = _manifest(fields["bytes"], sha256, fields["epoch"], fields["step"], has_crc=has_crc)
    if size != fields["bytes"] + len(manifest) or not tail.endswith(manifest):
        raise ValueError(DAMAGED)


def _tail(file: BinaryIO) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    return file.read(TAIL_BYTES)


def _fields(tail: bytes) -> dict[str, Any]:
    """What the last line says, not yet checked but for its types; empty where it is no manifest."""
    try:
        fields = json.loads(tail.splitlines()[-1])
        if type(fields["bytes"]) is int and fields["bytes"] >= 0 and {"epoch", "step"} <= fields.keys():
            return dict(fields)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return {}


def _sha256(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _check_archive(file: BinaryIO) -> None:
    """Refuse what checksums do not: records that grow in memory, and more than tensors, numbers and strings."""
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            stored = [entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
            if not len(set(names)) == len(stored) == len(entries) or sum(stored) > file.seek(0, os.SEEK_END):
                raise ValueError("its records are not those that torch.save writes")
            pickles = [archive.read(name) for name in names if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError) as error:
        raise ValueError(f"it is no file of torch.save: {error}") from None
    for content in pickles:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not _is_tensors(argument)):
                raise pickle.UnpicklingError


def _is_tensors(name: Any) -> bool:
    return name in GLOBALS or str(name).split(" ")[0] == "torch"
