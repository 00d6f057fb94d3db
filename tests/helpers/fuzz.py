"""Inputs of the fuzz tests: valid files of every kind that the project reads, and ways to damage them.

A target is a function that reads one drawn example like the project does. It may return or raise UserError.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import pickletools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_tensors

from configs.load import load_config, to_yaml
from configs.schema import all_settings
from helpers.cifar_files import official_pickle, pixels_of, write_cifar10
from helpers.faults import forged
from helpers.memory_source import MemoryRows, marked_image, memory_source, write
from models.weights import read_weights
from pipelines.convert.encode import Defect, encode
from pipelines.convert.source import Encoding
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from pipelines.storage.verify import verify
from tools.runs.records import comparison_rows, curve_rows, find_runs, read_run, run_labels
from tools.sources.cifar import EDITIONS, _parse_batch, _parse_classes, open_cifar
from tools.sources.hdf5 import open_hdf5
from train.checkpoint import store

Draw = Callable[[st.SearchStrategy[Any]], Any]
Files = dict[str, bytes]  # contents by name
ROOT = Path(__file__).parents[2]
INTERESTING = [0, 1, 2, 7, 8, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xC0, 0xFE, 0xFF]
NUMBERS = [b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f", b"\xff" * 8, b"\0" * 8,
           b"\x01" + b"\0" * 7, b"\x80" + b"\0" * 7]  # fmt: skip


@st.composite
def damaged(draw: Draw, *sound: bytes, most: int = 6) -> bytes:
    """Draw a valid file with some edits: bytes set, inserted, removed, repeated or cut off."""
    content = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["set", "set", "flip", "number", "put", "take", "double", "cut"]))
        if kind == "set":
            content[place : place + 1] = bytes([draw(st.sampled_from(INTERESTING) | st.integers(0, 255))])
        elif kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            number = draw(st.sampled_from(NUMBERS))
            content[place : place + len(number)] = number
        elif kind == "put":
            content[place:place] = draw(st.binary(max_size=8))
        elif kind == "take":
            del content[place : place + draw(st.integers(1, 16))]
        elif kind == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
        elif kind == "cut" and draw(st.booleans()):
            del content[place:]
    return bytes(content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "\x1b[31m", "1", -1, 0, 2**31, 2**63, 2**64, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def altered(draw: Draw, value: Any) -> Any:
    """Draw a JSON value with one to three parts replaced, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = None
        here, key = value, None
        while isinstance(here, (dict, list)) and here and (holder is None or draw(st.integers(0, 4))):
            holder = here
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            here = here[key]
        if holder is None:
            return draw(JSON_VALUES)
        kind = draw(st.sampled_from(["replace", "replace", "nudge", "remove", "double"]))
        if kind == "remove":
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.append(here)
        elif kind == "nudge" and type(here) is int:
            holder[key] = here + draw(st.sampled_from([-1, 1, 512, -512, 1 << 32]))
        else:
            holder[key] = draw(JSON_VALUES)
    return value


# CIFAR pickles and archives.


def batch_pickle(rows: int = 2) -> bytes:
    return official_pickle({"data": pixels_of(rows, 0)[:, :3072], "labels": [3] * rows, "filenames": [b"a.png"] * rows})


def batch_of_protocol_5(rows: int = 2) -> bytes:
    batch = {"data": pixels_of(rows, 0), "labels": [np.int64(3)] * rows, "filenames": np.array(["a.png"] * rows)}
    return pickle.dumps(batch, protocol=5)


def read_batch(content: bytes) -> None:
    _parse_batch(EDITIONS["cifar10"], content, "batch")


def read_names(content: bytes) -> None:
    _parse_classes(EDITIONS["cifar10"], content, "names")


_ARGUMENTS = st.binary(max_size=12) | st.sampled_from([
    b"\x01\0\0\0a", b"\xff\xff\xff\xff", b"numpy\ndtype\n", b"numpy\nndarray\n", b"os\nsystem\n", b"\x02u1", b"1\n",
    b"numpy.core.multiarray\n_reconstruct\n", b"numpy._core.multiarray\nscalar\n", b"_codecs\nencode\n",
    b"numpy._core.numeric\n_frombuffer\n", b"data\n", b"'data'\n", b"\x04data",
])  # fmt: skip
_CODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
OPCODES = st.lists(st.tuples(st.sampled_from(_CODES), _ARGUMENTS), max_size=30).map(
    lambda parts: b"".join(code + argument for code, argument in parts) + b"."
)


def cifar_tar(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(write_cifar10(folder, rows=1), "cifar-10-batches-py")
    return buffer.getvalue()


def read_archive(folder: Path) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        file = folder / "x.tar.gz"
        file.write_bytes(content)
        source = open_cifar("cifar10", file)
        assert sum(1 for _ in source.splits["train"].read(0, len(source.splits["train"]))) > 0

    return read


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


# HDF5 and images.


def hdf5_files(folder: Path) -> list[bytes]:
    """Return small files of every layout, in the old and the new format."""
    storages: list[dict[str, Any]] = [{}, {"chunks": (2, 3, 4, 4)}, {"chunks": (2, 3, 4, 4), "compression": "gzip"},
                                      {"chunks": (4, 3, 8, 8), "compression": "lzf", "fletcher32": True}]  # fmt: skip
    found = []
    for version in ("earliest", "latest"):
        for storage in storages:
            file = folder / "made.hdf5"
            with h5py.File(file, "w", libver=version) as opened:
                images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
                opened.create_dataset("images-train", data=images, **storage)
                opened.create_dataset("labels-train", data=np.arange(4), chunks=(2,) if storage else None)
            found.append(file.read_bytes())
    return found


def read_hdf5(folder: Path) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        file = folder / "x.hdf5"
        file.write_bytes(content)
        rows = open_hdf5(file, None, 100_000).splits["train"]
        for image in rows.read(0, min(len(rows), 100)):
            assert isinstance(image, np.ndarray)
            assert image.shape[2] == 3

    return read


def image_files() -> list[bytes]:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    colour = Image.fromarray(rgb)
    pictures = {"rgb": colour, "grey": Image.fromarray(rgb[..., 0]), "cmyk": colour.convert("CMYK"),
                "palette": colour.convert("P"), "alpha": colour.convert("RGBA")}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("rgb", "JPEG", {"exif": exif}), ("grey", "JPEG", {}), ("cmyk", "JPEG", {}),
        ("rgb", "JPEG", {"progressive": True}),
        ("rgb", "PNG", {}), ("palette", "PNG", {}), ("alpha", "PNG", {}), ("rgb", "BMP", {}), ("palette", "BMP", {}),
        ("rgb", "WEBP", {"lossless": True}), ("alpha", "WEBP", {"exif": exif}), ("rgb", "PPM", {}),
        ("palette", "GIF", {}), ("rgb", "TIFF", {}), ("rgb", "TIFF", {"compression": "tiff_lzw"}),
        ("grey", "TIFF", {"compression": "tiff_deflate"}), ("rgb", "TIFF", {"compression": "jpeg"}),
        ("grey", "TIFF", {"compression": "packbits"}),
    ]  # fmt: skip
    found = []
    for picture, kind, options in kinds:
        buffer = io.BytesIO()
        pictures[picture].save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def read_image(content: bytes) -> None:
    for encoding in (Encoding("jpeg", max_pixels=1_000_000), Encoding("npy", size=8, max_pixels=1_000_000)):
        try:
            encoded = encode(content, encoding)
            assert 0 < encoded.height * encoded.width <= 1_000_000
        except Defect as defect:
            assert len(str(defect)) < 1_000  # noqa: PT017


# Configs.

KEYS = [key for key, _ in all_settings()]
SCALARS = ["1", "0", "-1", "1e-3", "1e400", ".5", "true", "null", "~", "''", "lenet", "adamw", "[1, 2]", "{}", "[]",
           "{a: 1}", "(0.9, 0.99)", "99999999999999999999", "'\\e'", "2147483648", "9223372036854775808", "auto", "off",
           "[{epoch: 0}]"]  # fmt: skip
WORDS = ["\n", ": ", "- ", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "!", "!!python/name:os.system ", "|", ">", "'",
         '"', "#", "%", "@", "\t", "\x85", "(", ")", "1e5", "base: ", "BASE: ", "TRAIN:", "---\n", "...\n", "? ",
         "\\x9b", "<<: "]  # fmt: skip


def nested(key: str, value: str) -> str:
    *sections, last = key.split(".")
    return "".join(f"{section}: {{" for section in sections) + f"{last}: {value}" + "}" * len(sections)


@st.composite
def config_texts(draw: Draw) -> str:
    """Draw a config of the project, or settings with any values, and insert and remove some words."""
    if draw(st.booleans()):
        sound = [file.read_text() for file in sorted((ROOT / "configs").glob("*.yaml"))]
        text = draw(st.sampled_from(sound))
    else:
        chosen = draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(SCALARS)), min_size=1, max_size=6))
        text = "data: {path: x}\nmodel: {name: lenet}\n" * draw(st.integers(0, 1))
        text += "".join(f"{nested(key, value)}\n" for key, value in chosen)
    for _ in range(draw(st.integers(0, 5))):
        place = draw(st.integers(0, len(text)))
        word = draw(st.sampled_from(WORDS) | st.text(max_size=4) | st.sampled_from(SCALARS))
        text = text[:place] + word + text[place + draw(st.integers(0, 6)) :]
    return text


OVERRIDES = st.lists(st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS) | st.text(max_size=6),
                               st.sampled_from(SCALARS) | st.text(max_size=6)), max_size=4)  # fmt: skip


def read_config(folder: Path) -> Callable[[tuple[str, list[str]]], None]:
    def read(example: tuple[str, list[str]]) -> None:
        file = folder / "run.yaml"
        file.write_text(example[0], encoding="utf-8", errors="surrogatepass")
        load_config(file, example[1])

    return read


# Data sets. Each example replaces some files of a valid data set.


def make_data(folder: Path, encoding: str) -> Files:
    images: list[np.ndarray | bytes] = [marked_image(row, 8, 8) for row in range(3)]
    write(memory_source(train=MemoryRows(images), val=MemoryRows(images[:2], labelled=False)), folder, encoding)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def sealed(files: Files, changed: Files) -> Files:
    """Make sizes and checksums in dataset.json agree with the changed files, as an attacker would."""
    dataset = json.loads(files["dataset.json"])
    for split in dataset["splits"].values():
        for entry in (split["index"], *split["shards"]):
            content = {**files, **changed}[entry["file"]]
            entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    return {**changed, "dataset.json": json.dumps(dataset).encode()}


@st.composite
def damaged_data(draw: Draw, files: Files) -> Files:
    """Draw changed files: values of dataset.json, columns of an index, or bytes of any file."""
    kind = draw(st.sampled_from(["json", "json", "columns", "bytes", "info"]))
    if kind in ("json", "info"):
        name = "dataset.json" if kind == "json" else "_info.json"
        return {name: json.dumps(draw(altered(json.loads(files[name])))).encode()}
    if kind == "columns":
        name = draw(st.sampled_from(["train.index.npz", "val.index.npz"]))
        return sealed(files, {name: draw(damaged_index(files[name]))})
    name = draw(st.sampled_from(sorted(files)))
    changed = {name: draw(damaged(files[name]))}
    return sealed(files, changed) if draw(st.booleans()) and name != "dataset.json" else changed


@st.composite
def damaged_index(draw: Draw, content: bytes) -> bytes:
    with np.load(io.BytesIO(content)) as opened:
        arrays = dict(opened)
    name = draw(st.sampled_from(sorted(arrays)))
    numbers = st.sampled_from([-1, 0, 1, 2, 511, 512, 1024, 2**31 - 1, 2**40, -(2**40), 2**62])
    dtype = draw(st.sampled_from(["<i4", "<i8", "<f8", "<c16", "<U3", "|S4", ">i8", "|b1", "<M8[s]"]))
    shape = draw(st.sampled_from([(3,), (2,), (0,), (), (3, 1), (1, 3), (5,)]))
    values = np.array([draw(numbers) for _ in range(int(np.prod(shape)))], object).reshape(shape)
    try:
        arrays[name] = values.astype(dtype)
    except (ValueError, OverflowError, TypeError):
        del arrays[name]
    buffer = io.BytesIO()
    (np.savez_compressed if draw(st.booleans()) else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def read_data(folder: Path, files: Files) -> Callable[[Files], None]:
    """Return a target that opens a data set, reads every sample like training, and verifies it."""

    def read(changed: Files) -> None:
        for name, content in {**files, **changed}.items():
            (folder / name).write_bytes(content)
        verify(folder)
        for name in load_dataset(folder).splits:
            split = open_split(folder, name)
            for sample in range(len(split)):
                begin = int(split.address[sample])
                split.content[begin : begin + int(split.size[sample])].tobytes()
                split.describe(sample)
            split.source_rows()
            if split.encoding == "npy":
                view, rows = split.pixel_rows()
                view[rows].sum()

    return read


# Checkpoints, weights, run folders.


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


STATE = {"format": 1, "model": {"weight": torch.arange(6.0).reshape(2, 3)}, "config": "name: x\n",
         "position": {"epoch": 1, "step": 0}, "sums": torch.zeros(3)}  # fmt: skip


def read_checkpoint(folder: Path, *, is_sealed: bool) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        file = folder / "x.pt"
        file.write_bytes(forged(content, 1, 0) if is_sealed else content)
        store.load(file)

    return read


def weights_files() -> dict[str, bytes]:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}
    return {".safetensors": save_tensors(state), ".pth": saved(state)}


def read_weights_file(folder: Path, suffix: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        file = folder / f"x{suffix}"
        file.write_bytes(content)
        read_weights(file)

    return read


def run_files(folder: Path) -> Files:
    """Return checkpoints of two epochs of a run."""
    (folder / "made.yaml").write_text("data: {path: x}\nmodel: {name: lenet}")
    line = {"epoch": 0, "step": 10, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.0, "val_top1": 0.6,
            "val_top5": 1.0, "lr": 0.1, "images_per_s": 1e4, "epoch_time_s": 2.0, "memory_gib": None}  # fmt: skip
    lines = [json.dumps({**line, "epoch": epoch}) for epoch in range(2)]
    return {
        "config.yaml": to_yaml(load_config(folder / "made.yaml")).encode(),
        "metrics.jsonl": "".join(f"{line}\n" for line in lines).encode(),
        "facts.json": b'{"global_batch": 128}',
    }


@st.composite
def damaged_run(draw: Draw, files: Files) -> Files:
    name = draw(st.sampled_from(sorted(files)))
    if name == "config.yaml" or draw(st.booleans()):
        return {name: draw(damaged(files[name]))}
    lines = [draw(altered(json.loads(line))) for line in files[name].decode().splitlines()]
    return {name: "".join(json.dumps(line) + "\n" for line in lines).encode()}


def read_run_folder(folder: Path, files: Files) -> Callable[[Files], None]:
    """Return a target that compares runs like tools/compare.py, without the plot."""

    def read(changed: Files) -> None:
        for name, content in {**files, **changed}.items():
            (folder / name).write_bytes(content)
        records = [read_run(path) for path in find_runs([folder])]
        names = run_labels(records)
        comparison_rows(records, names)
        curve_rows(records, names)

    return read
