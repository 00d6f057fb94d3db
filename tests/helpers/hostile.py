"""Malicious files that try to run code, read other files, exhaust memory or never finish."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from helpers.cifar_files import write_cifar10

SECRET = "correct-horse-battery-staple"
TOP = 2_000  # side in pixels of images that decode


class Touch:
    """Object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


# Pickles; each is the content of a CIFAR batch.


def pickles(marker: Path) -> dict[str, bytes]:
    """Return malicious pickles by name of the attempt."""
    os_system = b"cos\nsystem\n"
    u1 = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
    reconstruct, encode = b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n"
    buffer = b"cnumpy.core.numeric\n_frombuffer\n(U\x01a" + u1
    tebi = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    same_hash = [b"\x8a\x0a" + (n * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for n in range(10_000)]
    call = f"touch {marker}".encode()
    return {
        **{f"reduce-{p}": pickle.dumps({"data": Touch(marker)}, protocol=p) for p in range(6)},
        "instance": b"(S'" + call + b"'\nios\nsystem\n.",
        "object": b"(" + os_system + b"S'" + call + b"'\no.",
        "stack-global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(call)]) + call + b"\x85R.",
        "attribute-path": b"\x80\x04\x8c\x05numpy\x8c\x10dtype.__init__.f\x93.",
        "new-object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "set-state-of-a-name": b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Psecret\n.",
        "numpy-load": b"cnumpy\nload\n(S'" + str(marker).encode() + b"'\ntR.",
        "memo-of-4-billion": b"\x80\x02}r\xff\xff\xff\xff.",
        "hash-of-2-to-the-40": b"\x80\x02)" + b"2\x86" * 40 + b"}q\x00h\x002K\x01s.",
        "shared-2-to-the-60": b"\x80\x02)q\x00" + b"h\x00\x86q\x00" * 60 + b"}q\x01h\x00K\x01s.",
        "bytes-of-64-gib": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 36) + b"abc.",
        "text-of-4-gib": b"\x80\x02X\xff\xff\xff\xffabc.",
        "frame-of-an-exbibyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
        "whole-number-of-2-gib": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        "decimal-of-a-million-digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
        "bytearray-of-64-gib": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"abc.",
        "reconstruct-of-a-tebibyte": b"\x80\x02" + reconstruct + b"cnumpy\nndarray\n" + tebi + b"\x85U\x01b\x87R.",
        "array-called": b"\x80\x02cnumpy\nndarray\n" + tebi + b"\x85\x85R.",
        "buffer-of-a-tebibyte": b"\x80\x02" + buffer + tebi + b"\x85U\x01CtR.",
        "items-of-an-array": b"\x80\x02" + buffer + b"K\x01\x85U\x01CtRK\0K\1s.",
        "buffer-in-place-of-a-scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n" + u1 + b"U\x02ab\x86R.",
        "text-of-a-tebibyte": b"\x80\x02cnumpy\ndtype\nU\x0eU1000000000000\x85R.",
        "state-of-a-type": b"\x80\x02cnumpy\ndtype\nN}X\x04\0\0\0typeK\x01s\x86b.",
        "state-of-a-function": b"\x80\x02" + encode + b"N}X\x0c\0\0\0__defaults__)s\x86b.",
        "set-of-2-to-the-40": b"\x80\x04\x8f()" + b"2\x86" * 40 + b"\x90.",
        "frozenset-of-2-to-the-40": b"\x80\x04()" + b"2\x86" * 40 + b"\x91.",
        "dict-of-2-to-the-40": b"\x80\x02()" + b"2\x86" * 40 + b"K\x01d.",
        "numbers-of-one-hash": b"\x80\x02}(" + b"".join(same_hash) + b"u.",
        "text-encoded-again-and-again": b"\x80\x02"
        + encode
        + b"q\0X\0\0\x10\0"
        + b"a" * (1 << 20)
        + b"q\1X\6\0\0\0latin1\x86q\2"
        + b"h\0h\2R0" * 100_000
        + b".",
        "a-million-lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
        "a-million-deep": b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
        "objects": pickle.dumps({"data": np.array([Touch(marker)], object), "labels": [0]}, protocol=4),
        "records": pickle.dumps({"data": np.zeros(2, [("a", "u1"), ("b", "O")]), "labels": [0, 1]}, protocol=4),
        "array-of-a-tebibyte": pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}, protocol=2).replace(
            b"K\x00M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86"
        ),
    }


def cifar_with(folder: Path, batch: bytes) -> Path:
    """Write an official folder in which one batch has this content."""
    source = write_cifar10(folder)
    (source / "data_batch_3").write_bytes(batch)
    return source


# Archives.


def archive_of(path: Path, members: dict[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def escaping_archive(path: Path, source: Path, prefix: str) -> Path:
    """Write an archive of valid batches whose names lead out of it."""
    members = {tarfile.TarInfo(f"{prefix}{file.name}"): file.read_bytes() for file in sorted(source.iterdir())}
    return archive_of(path, members)


def linking_archive(path: Path, kind: bytes, target: Path) -> Path:
    """Write an archive in which a batch is a link, a device or a pipe."""
    member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    member.type, member.linkname, member.devmajor, member.devminor = kind, str(target), 1, 5
    return archive_of(path, {member: b""})


def claiming_archive(path: Path, kind: bytes, claimed: int) -> Path:
    """Write an archive whose header claims a size for the name or for other headers."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, claimed
    blob = member.tobuf(tarfile.GNU_FORMAT)
    compressor = zlib.compressobj(wbits=31)
    path.write_bytes(compressor.compress(blob + bytes(1 << 20)) + compressor.flush())
    return path


def inflating_archive(path: Path, mib: int) -> Path:
    """Write an archive of empty members that inflates from a kilobyte per megabyte."""
    compressor = zlib.compressobj(9, wbits=31)
    member = tarfile.TarInfo("filler")
    member.size = mib << 20
    pieces = [compressor.compress(member.tobuf()), *(compressor.compress(bytes(1 << 20)) for _ in range(mib))]
    path.write_bytes(b"".join([*pieces, compressor.flush()]))
    return path


# HDF5 files with valid labels and malicious images.

Images = Callable[[h5py.File, Path], None]
SHAPE = (4, 3, 16, 16)


def hdf5_with(path: Path, images: Images, secret: Path) -> Path:
    with h5py.File(path, "w", libver="latest") as file:
        file["labels-train"] = np.arange(4)
        images(file, secret)
    return path


def _external_storage(file: h5py.File, secret: Path) -> None:
    secret.write_text(SECRET * (4 * 768 // len(SECRET) + 1))
    file.create_dataset("images-train", SHAPE, np.uint8, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def _external_link(file: h5py.File, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["x"] = np.zeros(SHAPE, np.uint8)
    file["images-train"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "x")


def _external_link_above(file: h5py.File, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["images-train"] = np.zeros(SHAPE, np.uint8)
    file["group"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/")
    file["images-train"] = h5py.SoftLink("/group/images-train")


def _virtual(file: h5py.File, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["x"] = np.zeros(SHAPE, np.uint8)
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "x", SHAPE)
    file.create_virtual_dataset("images-train", layout)


def _references(file: h5py.File, _: Path) -> None:
    file["x"] = np.zeros(SHAPE, np.uint8)
    region = file["x"].regionref[0]
    file.create_dataset("images-train", data=np.full((4, 3, 2, 2), region, h5py.regionref_dtype))


def _objects(file: h5py.File, _: Path) -> None:
    file.create_dataset("images-train", SHAPE, h5py.vlen_dtype(np.uint8))


def _own_type(file: h5py.File, _: Path) -> None:
    file.create_dataset("images-train", data=np.zeros((4, 3, 2, 2), [("a", "u1"), ("b", "S4")]))


def _own_filter(file: h5py.File, _: Path) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(SHAPE)
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    dataset = h5py.h5d.create(file.id, b"images-train", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(SHAPE), properties)
    h5py.Dataset(dataset).id.write_direct_chunk((0, 0, 0, 0), bytes(50))


def _never_written(file: h5py.File, _: Path) -> None:
    file.create_dataset("images-train", (1 << 40, 3, 64, 64), np.uint8, chunks=(1 << 10, 3, 64, 64))


def _huge_chunk(file: h5py.File, _: Path) -> None:
    shape = (4, 3, 64, 64)
    dataset = file.create_dataset(
        "images-train", shape, np.uint8, chunks=(200_000, 3, 64, 64), maxshape=(None, 3, 64, 64), compression="gzip"
    )
    dataset.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(1 << 20)))


def _huge_images(file: h5py.File, _: Path) -> None:
    dataset = file.create_dataset(
        "images-train", (4, 3, 60_000, 60_000), np.uint8, chunks=(4, 3, 4_000, 4_000), compression="gzip"
    )
    dataset.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(1 << 20)))


def inflating_images(file: h5py.File, _: Path) -> None:
    """Write a chunk of 48 KiB that inflates to a GiB."""
    dataset = file.create_dataset("images-train", SHAPE, np.uint8, chunks=SHAPE, compression="gzip")
    compressor, piece = zlib.compressobj(1), bytes(1 << 26)
    stored = b"".join([*(compressor.compress(piece) for _ in range(16)), compressor.flush()])
    dataset.id.write_direct_chunk((0, 0, 0, 0), stored)


HDF5_IMAGES: dict[str, Images] = {
    function.__name__.strip("_"): function
    for function in (
        _external_storage,
        _external_link,
        _external_link_above,
        _virtual,
        _references,
        _objects,
        _own_type,
        _own_filter,
        _never_written,
        _huge_chunk,
        _huge_images,
    )
}


# Images, of a few bytes to some megabytes.


def image_file(kind: str, side: int = 16, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def claiming_jpeg(side: int) -> bytes:
    jpeg = bytearray(image_file("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(jpeg)


def _png(*chunks: bytes) -> bytes:
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _png_header(side: int) -> bytes:
    return b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)


def inflating_text_png() -> bytes:
    """Return a PNG whose comments inflate to 100 MB each."""
    text = zlib.compress(bytes(100 << 20), 1)
    comments = [b"zTXt" + f"key{number}".encode() + b"\0\0" + text for number in range(3)]
    return _png(_png_header(16), *comments, b"IDAT" + zlib.compress(bytes(16 * 49)), b"IEND")


def inflating_profile_png() -> bytes:
    profile = b"iCCPx\0\0" + zlib.compress(bytes(200 << 20), 1)
    return _png(_png_header(16), profile, b"IDAT" + zlib.compress(bytes(16 * 49)), b"IEND")


def tiff(entries: list[tuple[int, int, int, int]], content: bytes) -> bytes:
    """Return a little-endian TIFF with (tag, type, count, value) entries, and with `content` at byte 8."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + len(content))
    return head + content + struct.pack("<H", len(entries)) + directory + bytes(4)


def _tiff_entries(width: int, compression: int) -> list[tuple[int, int, int, int]]:
    return [
        (256, 4, 1, width),
        (257, 4, 1, width),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]


def huge_tile_tiff(side: int = 32_000) -> bytes:
    """Return an image of 10 x 10 pixels in a tile of side x side: 1 GB in 4 MB."""
    compressor, row = zlib.compressobj(1), bytes(side * 1000)
    content = b"".join([*(compressor.compress(row) for _ in range(side // 1000)), compressor.flush()])
    entries = [*_tiff_entries(10, 8), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(content))]
    return tiff(entries, content)


def many_tags_tiff() -> bytes:
    """Return a TIFF with 50,000 tags that share one megabyte as their value."""
    content = bytes(1 << 20)
    entries = [*_tiff_entries(10, 1), (273, 4, 1, 8), (278, 4, 1, 10), (279, 4, 1, 100)]
    taken = {entry[0] for entry in entries}
    entries += [(tag, 7, len(content), 8) for tag in range(300, 50_300) if tag not in taken]
    return tiff(entries, content)


def many_scans_jpeg(scans: int) -> bytes:
    """Return a progressive JPEG of one colour that repeats its last scan."""
    buffer = io.BytesIO()
    Image.new("RGB", (TOP, TOP)).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[last:end] * scans + jpeg[end:]


def large_frame_gif() -> bytes:
    """Return a GIF of 1 x 1 pixels with a frame of 65,000 x 65,000."""
    descriptor = b"," + struct.pack("<HHHH", 0, 0, 65_000, 65_000) + b"\0"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + descriptor + b"\x02\x02\x44\x01\0;"


def large_webp() -> bytes:
    """Return an animation on a canvas of 16,384 x 16,384 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    side = (16_383).to_bytes(3, "little")
    frame = image_file("WEBP", lossless=True)[12:]
    animation = bytes(6) + (15).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + frame
    body = b"WEBP" + chunk(b"VP8X", b"\x02\0\0\0" + side + side) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", animation)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp() -> bytes:
    """Return 60,000 x 60,000 pixels in a run-length encoding of a few bytes."""
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 8, 1, 0, 1, 1, 256, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + 1024 + 4, 0, 0, 54 + 1024) + header + bytes(1024) + b"\0\1"


IMAGES: dict[str, Callable[[], bytes]] = {
    "claims.jpg": lambda: claiming_jpeg(65_000),
    "claims.png": lambda: _png(_png_header(2_000_000_000), b"IDAT" + zlib.compress(b""), b"IEND"),
    "claims.ppm": lambda: b"P6 65000 65000 255\n",
    "claims.bmp": run_length_bmp,
    "frame.gif": large_frame_gif,
    "canvas.webp": large_webp,
    "text.png": inflating_text_png,
    "profile.png": inflating_profile_png,
    "tile.tif": huge_tile_tiff,
    "scans.jpg": lambda: many_scans_jpeg(3_000),
    "empty.jpg": bytes,
    "script.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "program.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(secret) run\n",
}
