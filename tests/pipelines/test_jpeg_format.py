"""JPEG bytes are kept if Pillow, libjpeg-turbo and DALI decode the same pixels; others are re-encoded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.backends import use_dali
from helpers.damage import claiming, segments, stray_bytes
from helpers.jpeg import decode
from helpers.loaders import evaluation
from helpers.memory_source import MemoryRows, jpeg_file, memory_source, write
from pipelines import jpeg_format
from pipelines.convert.encode import encode
from pipelines.convert.source import Encoding
from pipelines.cpu.jpeg import headers
from pipelines.gpu import dali_graph
from pipelines.gpu.dali_runner import DecodeCheck
from pipelines.storage.open import open_split
from pipelines.storage.verify import verify
from tools import convert

PIXELS = np.asarray(Image.open(io.BytesIO(jpeg_file(3))))


def saved(mode: str = "RGB", kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def inserted(content: bytes, segment: int = 1, file: bytes | None = None) -> bytes:
    """Insert bytes before a segment of a JPEG. Segments are counted from 0; the last is the scan."""
    file = saved() if file is None else file
    place = segments(file)[segment][1]
    return file[:place] + content + file[place:]


def frame_changed(change: Callable[[bytearray, int], None]) -> bytes:
    """Return a JPEG with a changed frame header; `change` takes the file and the header's start."""
    file = bytearray(saved())
    change(file, next(place for marker, place in segments(bytes(file)) if marker == 0xC0))
    return bytes(file)


def without_adobe_segment() -> bytes:
    """Return a JPEG with RGB components that differ from YCbCr only in their names."""
    file = saved(keep_rgb=True)
    return file[:2] + file[segments(file)[1][1] :]


KEPT = {
    "baseline": saved(),
    "progressive": saved(progressive=True),
    "greyscale": saved("L"),
    "progressive greyscale": saved("L", progressive=True),
    "full chroma": saved(subsampling=0),
    "restart markers": saved(restart_marker_blocks=3),
    "fill bytes": inserted(b"\xff\xff\xff"),
    "a fill byte in front of the scan": inserted(b"\xff", -1),
    "a comment with markers in it": saved(comment=b"\xff\xda\xff\xd9" * 20),
    "data behind the image": saved() + b"\0\xff\xc9" * 50,
}
REENCODED = {
    "four stray bytes": (inserted(b"\0\0\0\0"), "JPEG with bytes between segments"),
    "one stray byte": (inserted(b"A"), "JPEG with bytes between segments"),
    "a stuffed byte": (inserted(b"\xff\0"), "JPEG with bytes between segments"),
    "a stray byte in front of the scan": (inserted(b"\0", -1), "JPEG with bytes between segments"),
    "RGB by the Adobe segment": (saved(keep_rgb=True), "JPEG with RGB components"),
    "RGB by the names": (without_adobe_segment(), "JPEG with RGB components"),
    "CMYK": (saved("CMYK"), "JPEG of 4 components"),
    "PNG": (saved(kind="PNG"), "PNG"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_jpeg_that_all_decoders_decode_alike_keeps_its_bytes(kind: str) -> None:
    file = KEPT[kind]
    encoded = encode(file, Encoding("jpeg"))
    assert (encoded.payload, encoded.reencoded) == (file, None)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(decode(file), expected)
    np.testing.assert_array_equal(by_dali(file), expected)


@pytest.mark.parametrize("kind", REENCODED)
def test_other_files_become_jpegs_that_all_decoders_read(kind: str) -> None:
    file, reason = REENCODED[kind]
    encoded = encode(file, Encoding("jpeg"))
    assert encoded.reencoded == reason
    assert jpeg_format.inspect(encoded.payload) == (1, None)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    assert np.abs(by_dali(encoded.payload) - expected).mean() < 4
    assert encode(file, Encoding("npy")).reencoded is None


def by_dali(file: bytes) -> np.ndarray:
    stored = dali_graph.ImageSpec("jpeg", None, False)
    pipeline = dali_graph.decoding_graph(stored, dali_graph.PipelineConfig(None, 1, 1, 0.0))
    pipeline.feed_input("images", [np.frombuffer(file, np.uint8)])
    pipeline.schedule_run()
    (images,) = pipeline.outputs()
    return np.array(images.at(0))


def set_frame_type(marker: int) -> bytes:
    return frame_changed(lambda file, place: file.__setitem__(place + 1, marker))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (set_frame_type(0xC1), None),
        (set_frame_type(0xC3), "of frame type SOF3"),
        (set_frame_type(0xC9), "of frame type SOF9"),
        (frame_changed(lambda file, place: file.__setitem__(place + 4, 12)), "of 12 bits"),
        (
            frame_changed(lambda file, place: file.__setitem__(slice(place + 5, place + 7), bytes(2))),
            "without a height in its frame header",
        ),
        (frame_changed(lambda file, place: file.__setitem__(place + 9, 2)), "of 2 components"),
        (frame_changed(lambda file, place: file.__setitem__(place + 9, 9)), "without a frame header"),
        (b"\xff\xd8\xff\xd9", "without a frame header"),
        (saved()[:-2], "without an end-of-image marker"),  # Pillow decodes some of them
        (b"\xff\xd8", "without an end-of-image marker"),
        (b"\xff\xd8\xff\xe0", "without an end-of-image marker"),
        (b"\xff\xd8\xff\xee\x00\x0cAdobe", "without an end-of-image marker"),
        (b"", "without a start-of-image marker"),
        (inserted(b"\xff\xe1\0\0"), "with a segment of impossible length"),
        (inserted(b"\xff\xe1\0\1"), "with a segment of impossible length"),
        (inserted(b"\xff\xfe\0\0"), "with a segment of impossible length"),
        (inserted(saved()[segments(saved())[-2][1] : segments(saved())[-1][1]] * 3, -1), None),  # further tables
    ],
)
def test_header_shows_why_decoders_disagree(file: bytes, reason: str | None) -> None:
    assert jpeg_format.inspect(file)[1] == reason


CLAIMING = claiming(PIXELS.shape[0], PIXELS.shape[1] + 1)(saved())
HEADERS = {
    **{kind: (file, False) for kind, file in KEPT.items()},
    **{kind: (REENCODED[kind][0], True) for kind in REENCODED if "stray" in kind or "stuffed" in kind or kind == "PNG"},
    "another width": (CLAIMING, True),
    "no frame": (saved()[:2] + saved()[segments(saved())[-1][1] :], True),
    "cut in the header": (saved()[: segments(saved())[-1][1]], True),
    "cut behind the header": (saved()[: segments(saved())[-1][1] + 20], False),
    "start alone": (b"\xff\xd8\xff\xff\xff\xff", True),
    "empty": (b"", True),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_kernel_finds_headers_that_dali_cannot_parse(kind: str) -> None:
    """In a batch these files may crash the process; alone they raise an error."""
    file, is_unlike = HEADERS[kind]
    content = np.frombuffer(saved() + file + saved(), np.uint8).copy()
    sizes = np.array([len(saved()), len(file), len(saved())], np.int32)
    sides = np.full((2, 3), np.array(PIXELS.shape[:2])[:, None], np.int32)
    out = np.empty(3, bool)
    headers.find_mismatches(content, np.cumsum(sizes) - sizes, sizes, *sides, out)
    assert out.tolist() == [False, is_unlike, False]
    if kind not in ("another width", "cut behind the header", "empty"):
        check = DecodeCheck(
            lambda: dali_graph.decoding_graph(
                dali_graph.ImageSpec("jpeg", None, False), dali_graph.PipelineConfig(None, 1, 1, 0.0)
            )
        )
        assert check.decodes(np.frombuffer(file, np.uint8)) == (not is_unlike or kind == "PNG")


def test_damaged_files_are_inspected_without_an_error() -> None:
    for file in (*KEPT.values(), REENCODED["RGB by the Adobe segment"][0]):
        for place in range(0, len(file), 7):
            jpeg_format.inspect(file[:place])
            jpeg_format.inspect(file[:place] + bytes([file[place] ^ 0xFF]) + file[place + 1 :])


def test_conversion_counts_reencoded_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files: list[np.ndarray | bytes] = [*KEPT.values(), *(file for file, _ in REENCODED.values())]
    files += [saved(kind="PNG"), b"?"]
    dataset = write(memory_source(train=MemoryRows(files), val=MemoryRows([KEPT["greyscale"]])), out, "jpeg")
    train = {
        "JPEG with bytes between segments": 4,
        "JPEG with RGB components": 2,
        "PNG": 2,
        "JPEG of 4 components": 1,
    }
    assert dataset.reencoded == {"train": train, "val": {}}
    assert list(dataset.reencoded["train"]) == list(train)  # most frequent first
    assert json.loads((out / "dataset.json").read_text())["reencoded"] == dataset.reencoded
    text = convert.format_summary(dataset, out, 1.0)
    assert "19 samples" in text
    assert "1 quarantined, 9 re-encoded (4 JPEG with bytes between segments, 2 JPEG with RGB components" in text
    assert "re-encoded" not in text.splitlines()[-1]
    kept = {*KEPT.values()}
    split = open_split(out, "train")
    assert sum(split.image_bytes(sample).tobytes() in kept for sample in range(19)) == len(kept)
    assert "reencoded" not in write(memory_source(train=MemoryRows([PIXELS])), tmp_path / "npy").content


def test_verify_reports_jpeg_unsupported_by_some_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store the file like an earlier version of the converter."""
    with monkeypatch.context() as patch:
        patch.setattr(jpeg_format, "inspect", lambda content: (1, None))
        write(memory_source(train=MemoryRows([stray_bytes(jpeg_file(0))])), tmp_path / "out", "jpeg")
    (problem,) = verify(tmp_path / "out")
    assert "key 000000000, offset 512) is a JPEG with bytes between segments, which not every decoder reads" in problem


@pytest.mark.parametrize("by_dali", [False, True], ids=["kernels", "DALI"])
def test_greyscale_jpegs_are_read_as_rgb(by_dali: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_dali:
        use_dali(monkeypatch)
    write(memory_source(val=MemoryRows([KEPT["greyscale"]] * 2)), tmp_path / "out", "jpeg")
    height, width = PIXELS.shape[:2]
    (batch,) = evaluation(tmp_path / "out", 2, image_size=min(height, width))
    images = batch.images.permute(0, 2, 3, 1).numpy()
    grey = np.asarray(Image.open(io.BytesIO(KEPT["greyscale"])))
    top, left = (height - min(height, width)) // 2, (width - min(height, width)) // 2
    square = grey[top : top + min(height, width), left : left + min(height, width)]
    np.testing.assert_array_equal(images, np.broadcast_to(square[None, ..., None], images.shape))


def test_unrelated_error_is_not_blamed_on_a_file() -> None:
    class NoMemory:
        def feed_input(self, *_: Any) -> None: ...

        def schedule_run(self) -> None: ...

        def outputs(self) -> None:
            raise RuntimeError("CUDA allocation failed")

    built: list[NoMemory] = []
    check = DecodeCheck(lambda: built.append(NoMemory()) or built[-1])  # type: ignore[func-returns-value,return-value]
    for count in (1, 2):
        with pytest.raises(RuntimeError, match="allocation failed"):
            check.decodes(np.zeros(4, np.uint8))
        assert len(built) == count
