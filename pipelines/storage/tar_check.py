"""Compare a mapped shard with the index and describe the differences.

Headers and labels are compared in chunks, and images are checked one by one. This is slower than comparing the sha256
of the shard, so use it only to explain a mismatch or to check a data set thoroughly.
"""

from __future__ import annotations

import tarfile
from typing import NamedTuple

import numpy as np

from pipelines import jpeg_format
from pipelines.storage import tar_format
from pipelines.storage.dataset import EXTENSIONS, MAX_PIXELS
from pipelines.storage.jpeg_check import UNDECODABLE, decode_with_pillow, header_error
from pipelines.storage.split import Split

MAX_LISTED = 3  # samples named in a message


class Damage(NamedTuple):
    """Damage to a shard, as found by `diagnose`."""

    text: str  # for an error message
    in_content_only: bool  # whether headers, keys and labels are intact, so that every sample can be found


def diagnose(split: Split, number: int, sha256: str) -> Damage:
    """Find the damage to a shard whose sha256 differs from dataset.json.

    Args:
        split: Split that contains the shard.
        number: Index of the shard in the split.
        sha256: Actual hash of the shard.
    """
    for name, other in split.dataset.splits.items():
        for shard in other.shards:
            if shard.sha256 == sha256 and shard is not split.info.shards[number]:
                return Damage(f"it has the content of {shard.file} of split {name!r}", False)
    chosen = np.flatnonzero(split.shard == number)
    if problem := layout_error(split, number, chosen):
        return Damage(problem, False)
    found = []
    for sample in chosen.tolist():
        if problem := image_error(split, sample):
            found.append(f"{split.describe(sample)} {problem}")
        if len(found) == MAX_LISTED:
            break
    if found:
        return Damage(" and ".join(found), True)
    return Damage("headers, labels and sizes are correct, so image bytes differ", True)


def layout_error(split: Split, number: int, chosen: np.ndarray) -> str | None:
    """Compare offsets, headers, keys, labels and the end of a shard's tar with the index.

    Args:
        split: Split that contains the shard.
        number: Index of the shard in the split.
        chosen: Indices of all samples in the shard, int64 [N].

    Returns:
        A description of the first difference found, or None if there is none.
    """
    start_byte = number * split.slot_bytes
    content = split.content[start_byte : start_byte + split.info.shards[number].bytes]
    offsets, sizes = split.address[chosen] - start_byte, split.size[chosen].astype(np.int64)
    strides = tar_format.sample_bytes(sizes, split.label_digits)
    expected = np.cumsum(strides) - strides + tar_format.BLOCK
    if (wrong := offsets != expected).any():
        return f"the index places {split.describe(int(chosen[np.argmax(wrong)]))} where no member can begin"
    end = int(strides.sum())
    if len(content) != end + len(tar_format.END_OF_ARCHIVE) or content[end:].any():
        return "it does not end where the index says"
    for start in range(0, len(chosen), tar_format.CHUNK_SAMPLES):
        if problem := _member_error(split, chosen[start : start + tar_format.CHUNK_SAMPLES]):
            return problem
    return _key_error(split, chosen)


def _member_error(split: Split, samples: np.ndarray) -> str | None:
    """Compare the headers and labels of samples with the index. `samples` are sample indices, int64 [N]."""
    images, sizes = split.address[samples], split.size[samples].astype(np.int64)
    problem = _header_error(split, samples, images, EXTENSIONS[split.encoding], sizes, "where the index places")
    if problem or split.labels is None:
        return problem
    expected = tar_format.digits(split.labels[samples], tar_format.count_label_digits(len(split.classes)))
    labels, width = images + tar_format.padded(sizes) + tar_format.BLOCK, expected.shape[1]
    if problem := _header_error(split, samples, labels, "cls", np.full(len(samples), width), "as the label of"):
        return problem
    found = split.content[labels[:, None] + np.arange(width)]
    if (wrong := (found != expected).any(axis=1)).any():
        row = int(np.argmax(wrong))
        sample, label = int(samples[row]), found[row].tobytes()
        return f"it gives {label!r} as the label of {split.describe(sample)}, but the index says {split.labels[sample]}"
    return None


def _header_error(
    split: Split, samples: np.ndarray, starts: np.ndarray, extension: str, sizes: np.ndarray, relation: str
) -> str | None:
    """Return an error message about a wrong tar header, or None if all headers are correct.

    Args:
        split: Split that contains the samples.
        samples: Indices of the samples, int64 [N].
        starts: Start of each member's content in `split.content`, int64 [N].
        extension: Extension of the members, without a dot.
        sizes: Size of each member's content in bytes, int64 [N].
        relation: Words between the description of the header and that of the sample.
    """
    found = split.content[(starts - tar_format.BLOCK)[:, None] + np.arange(tar_format.BLOCK)]
    wrong = (found != tar_format.headers(split.keys(samples), extension, sizes)).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        return f"{_describe_header(found[row])} {relation} {split.describe(int(samples[row]))}"
    return None


def _key_error(split: Split, samples: np.ndarray) -> str | None:
    """Return an error message about the first key that is not a source row or is not unique, or None if all are valid.

    `samples` are sample indices, int64 [N].
    """
    rows = split.source_rows(samples)
    wrong = (split.keys(samples) - np.uint8(ord("0")) > 9).any(axis=1) | (rows >= split.info.source_rows)
    wrong[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
    if wrong.any():
        sample = int(samples[np.argmax(wrong)])
        return f"{split.describe(sample)} has a key that is not a row of the source, or that is used twice"
    return None


def _describe_header(header: np.ndarray) -> str:
    """Describe the name and size in a tar header, for an error message."""
    try:
        member = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "replace")
    except tarfile.TarError as error:
        return f"it has a damaged tar header ({error})"
    return f"it has a header of {member.name!r} with {member.size:,} bytes"


def image_error(split: Split, sample: int, decodes: bool = True) -> str | None:
    """Describe what is wrong with a stored image, or return None if the image is valid.

    Args:
        split: Split that contains the image.
        sample: Index of the sample in the split.
        decodes: Whether to decode JPEG images of up to MAX_PIXELS after checking the header. Use True if the shard may
            be damaged. If False, only check the header and that all decoders support the file.
    """
    file, sides = split.image_bytes(sample), split.image_size(sample)
    if split.encoding == "npy":
        shape = split.image_shape
        if shape is None or not file.tobytes().startswith(tar_format.npy_header(shape)):
            return "is not a .npy file of the data set's shape"
        if shape[:2] != sides:
            return f"has {shape[0]:,} x {shape[1]:,} pixels where the index says {sides[0]:,} x {sides[1]:,}"
        return None
    if (wrong := header_error(file, sides)) is not None:
        return wrong
    if not decodes:
        reason = jpeg_format.inspect(file.tobytes())[1]
        return None if reason is None else f"is a JPEG {reason}, which not every decoder reads"
    is_defect = sides[0] * sides[1] <= MAX_PIXELS and decode_with_pillow(file, sides) is None
    return UNDECODABLE if is_defect else None
