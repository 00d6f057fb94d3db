"""The file format of checkpoints.

A checkpoint file is the output of torch.save, followed by one line of JSON (the manifest) with the size and sha256 of
this output. torch.load can read such a file directly. This module verifies the whole file before unpickling it, since
torch.load would accept flipped bits as weights.
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
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

FORMAT = 1
TAIL_BYTES = 1024  # read from the end of a file to find the last line
DIGEST_BYTES = 64  # length of the hexadecimal sha256 at the end of files written by older versions
CHUNK_BYTES = 2**20
DAMAGED = "its checksum is wrong: it is damaged, or from another program"
NAMES = (b"stream", b"progress", b"position")  # keys in the pickle of every checkpoint, whatever its version
# Globals allowed in pickles, in addition to those of the torch module itself, such as dtypes and storage classes.
GLOBALS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")


class _HashingFile:
    """File object for torch.save that hashes the data and keeps the first write error.

    torch.save itself usually replaces write errors with a RuntimeError.
    """

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
        """Do nothing. The owner of the underlying file flushes that file at the end."""


def write(file: BinaryIO, checkpoint: Mapping[str, object]) -> None:
    """Write a checkpoint and its manifest to an open file. The tensors of the checkpoint must be on the CPU.

    Raises:
        OSError: The file cannot be written.
    """
    hashing = _HashingFile(file)
    torch.save(checkpoint, hashing)  # type: ignore[arg-type]
    if hashing.error is not None:
        raise hashing.error
    file.write(_manifest(hashing.bytes, hashing.sha256.hexdigest(), *_position(checkpoint)))


def _position(checkpoint: Mapping[str, object]) -> tuple[object, object]:
    """Return the (epoch, step) of a checkpoint, with None for missing values."""
    position = checkpoint.get("position")
    return (position.get("epoch"), position.get("step")) if isinstance(position, dict) else (None, None)


def _manifest(size: int, sha256: str, epoch: object, step: object, *, has_crc: bool = True) -> bytes:
    """Return the manifest as a line of JSON, with a line break before and after it.

    If `has_crc` is False, the manifest does not contain a CRC of its fields, as in files written by older versions.
    """
    fields = {"format": FORMAT, "bytes": size, "sha256": sha256, "epoch": epoch, "step": step}
    crc = {"crc32": zlib.crc32(json.dumps(fields).encode())} if has_crc else {}
    return b"\n" + json.dumps(fields | crc).encode() + b"\n"


def read(file: BinaryIO) -> dict[str, object]:
    """Verify a file and load the checkpoint into host memory.

    If the contents are invalid although the checksum is correct, torch.load can raise any exception.

    Raises:
        ValueError: The file is damaged, or it is not a checkpoint.
        pickle.UnpicklingError: The file contains objects other than tensors and plain Python values.
    """
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
    """Return True if another program wrote the file with torch.save.

    Return False for damaged checkpoints of this program.
    """
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
    """Raise ValueError if the file does not match the checksum at its end."""
    tail = _tail(file)
    fields, size = _fields(tail), file.seek(0, os.SEEK_END)
    if not fields:  # written by an older version, or not a checkpoint
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
    """Return the fields of the manifest in the last line of `tail`, or an empty dict if that line is not a manifest.

    Does not verify checksums.
    """
    try:
        fields = json.loads(tail.splitlines()[-1])
        if type(fields["bytes"]) is int and fields["bytes"] >= 0 and {"epoch", "step"} <= fields.keys():
            return dict(fields)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return {}


def _sha256(file: BinaryIO, size: int) -> str:
    """Return the hexadecimal sha256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _check_archive(file: BinaryIO) -> None:
    """Reject compressed entries, and pickles that contain objects other than tensors and plain Python values.

    The checksum does not rule out such files, since anyone can compute it. Compressed entries could expand to any size
    in memory.

    Raises:
        ValueError: The file is not an uncompressed archive as written by torch.save.
        pickle.UnpicklingError: A pickle contains other objects.
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


def _is_allowed(name: object) -> bool:
    return name in GLOBALS or str(name).split(" ")[0] == "torch"
