"""The file format of checkpoints: the output of torch.save, then one line of JSON with its size and sha256.

torch.load reads such a file unchanged. Everything is verified before it is unpickled, since torch.load would accept
flipped bits as weights. An invalid file raises ValueError with the reason.
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
TAIL_BYTES = 1024  # the last line is searched for in this many bytes
DIGEST_BYTES = 64  # a hexadecimal sha256, at the end of files of older versions
CHUNK_BYTES = 2**20
DAMAGED = "its checksum is wrong: it is damaged, or from another program"
NAMES = (b"stream", b"progress", b"position")  # in the pickle of every checkpoint, of any version
# Allowed in addition to the module torch itself, which has the dtypes and storage classes.
GLOBALS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")


class _HashingFile:
    """A file for torch.save that hashes the data and keeps errors, which torch would replace with its own."""

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
        """Do nothing: the owner of the file flushes it at the end."""


def write(file: BinaryIO, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint with tensors in host memory to an open file.

    torch.save releases the GIL when it writes to a Python file, but not when it writes to a path.
    """
    hashing = _HashingFile(file)
    torch.save(checkpoint, hashing)  # type: ignore[arg-type]
    if hashing.error is not None:
        raise hashing.error
    file.write(_manifest(hashing.bytes, hashing.sha256.hexdigest(), *_position(checkpoint)))


def _position(checkpoint: dict[str, Any]) -> tuple[Any, Any]:
    """Return (epoch, step), or None for each that is missing."""
    position = checkpoint.get("position")
    return (position.get("epoch"), position.get("step")) if isinstance(position, dict) else (None, None)


def _manifest(size: int, sha256: str, epoch: Any, step: Any, *, has_crc: bool = True) -> bytes:
    """Return the last line of a file. Older versions have no CRC of the line itself."""
    fields = {"format": FORMAT, "bytes": size, "sha256": sha256, "epoch": epoch, "step": step}
    crc = {"crc32": zlib.crc32(json.dumps(fields).encode())} if has_crc else {}
    return b"\n" + json.dumps(fields | crc).encode() + b"\n"


def read(file: BinaryIO) -> dict[str, Any]:
    """Verify a file and return the checkpoint, in host memory."""
    verify(file)
    _check_archive(file)
    file.seek(0)
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"it holds no checkpoint of this program's format {FORMAT}")
    fields = _fields(_tail(file))
    if fields and (fields["epoch"], fields["step"]) != _position(checkpoint):
        raise ValueError(DAMAGED)
    return checkpoint


def is_foreign(file: BinaryIO) -> bool:
    """Return True if the file is a torch.save file of another program, and not a damaged one of this program."""
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
    """Raise ValueError unless every byte is as it was written."""
    tail = _tail(file)
    fields, size = _fields(tail), file.seek(0, os.SEEK_END)
    if not fields:  # from an older version, or not a checkpoint
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
    """Return the fields of the last line, or none if it is not a manifest. Checks only their types."""
    try:
        fields = json.loads(tail.splitlines()[-1])
        if type(fields["bytes"]) is int and fields["bytes"] >= 0 and {"epoch", "step"} <= fields.keys():
            return dict(fields)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return {}


def _sha256(file: BinaryIO, size: int) -> str:
    """Return the hash of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _check_archive(file: BinaryIO) -> None:
    """Refuse compressed records, and pickles of more than plain data.

    A checksum does not exclude either, and compressed records could expand to any size in memory.
    """
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
        raise ValueError(f"it is not a file of torch.save: {error}") from None
    for content in pickles:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not _is_allowed(argument)):
                raise pickle.UnpicklingError


def _is_allowed(name: Any) -> bool:
    return name in GLOBALS or str(name).split(" ")[0] == "torch"
