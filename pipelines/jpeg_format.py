"""Walk the segments of a JPEG file (ITU-T T.81, annex B) without decoding it."""

from __future__ import annotations

import re

MAX_SCANS = 100  # a scan costs as much time as an image; progressive JPEGs have about ten, malicious ones thousands
MAX_SEGMENTS = 100_000
SOF0, SOF2, SOF15, SOI, EOI, SOS, APP0, APP14 = 0xC0, 0xC2, 0xCF, 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
NON_FRAME_MARKERS = (0xC4, 0xC8, 0xCC)  # DHT, JPG and DAC, whose values are between SOF0 and SOF15
_MARKER = re.compile(b"\xff([\x02-\xcf\xd9-\xfe])")  # a marker followed by a length, or EOI


def inspect(content: bytes | memoryview) -> tuple[int, str | None]:
    """Count the scans of a JPEG file and check for features that decoders handle differently.

    For example, libjpeg skips bytes between segments, while nvImageCodec rejects such files. libjpeg detects RGB files,
    while nvImageCodec treats every three-component file as YCbCr. 8-bit Huffman-coded baseline, extended and
    progressive frames are safe. Data after the end-of-image marker is not checked.

    Returns:
        A tuple (scans, reason). `scans` is MAX_SCANS + 1 if the file has more than MAX_SCANS scans or too many
        segments; the rest of the file is then not checked. `reason` is a phrase such as "with bytes between segments",
        or None if no such feature was found.
    """
    place, scans, in_scan = 2, 0, False
    reason = None if bytes(content[:2]) == bytes((0xFF, SOI)) else "without a start-of-image marker"
    frame, transform, is_jfif = b"", None, False
    for _ in range(MAX_SEGMENTS):
        if (found := _MARKER.search(content, place)) is None:
            return scans, reason or "without an end-of-image marker"
        # Any number of 0xff bytes may precede a marker.
        if not in_scan and bytes(content[place : found.start()]).strip(b"\xff"):
            reason = reason or "with bytes between segments"
        marker, start = found.group(1)[0], found.end()
        if marker == EOI:
            return scans, reason or _frame_reason(frame, transform, is_jfif)
        length = int.from_bytes(content[start : start + 2], "big")  # includes these two bytes
        place = start + max(length, 2)
        if place > len(content):
            reason = reason or "without an end-of-image marker"
        elif length < 2:
            reason = reason or "with a segment of impossible length"
        in_scan = marker == SOS
        if in_scan:
            scans += 1
            if scans > MAX_SCANS:
                return scans, reason
        elif SOF0 <= marker <= SOF15 and marker not in NON_FRAME_MARKERS:
            if frame:
                reason = reason or "with several frames"
            frame = bytes((marker, *content[start + 2 : place]))
        elif marker == APP0:
            is_jfif = is_jfif or bytes(content[start + 2 : start + 7]) == b"JFIF\0"
        elif marker == APP14 and bytes(content[start + 2 : start + 7]) == b"Adobe":
            transform = content[start + 13] if place >= start + 14 and place <= len(content) else None
    return MAX_SCANS + 1, reason


def _frame_reason(frame: bytes, transform: int | None, is_jfif: bool) -> str | None:
    """Return the reason decoders may disagree about a frame, or None if all decoders give the same pixels.

    Args:
        frame: Second byte of the frame's marker, followed by the segment without its length field. Empty if there is no
            frame.
        transform: Color transform from the Adobe segment (0 for RGB or CMYK), or None if there is no complete Adobe
            segment.
        is_jfif: Whether the file has a JFIF segment. If so, three components are always YCbCr.
    """
    if len(frame) < 7 or len(frame) < 7 + 3 * frame[6]:
        return "without a frame header"
    if not SOF0 <= frame[0] <= SOF2:
        return f"of frame type SOF{frame[0] - SOF0}"
    if frame[1] != 8:
        return f"of {frame[1]} bits"
    if frame[2:4] == b"\0\0":
        return "without a height in its frame header"
    components = frame[7::3][: frame[6]]
    if len(components) not in (1, 3):
        return f"of {len(components)} components"
    is_rgb = transform == 0 or (transform is None and components == b"RGB")
    return "with RGB components" if len(components) == 3 and is_rgb and not is_jfif else None
