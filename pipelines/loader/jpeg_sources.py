"""Sources that read JPEG shards and either decode them for the CPU graph or pass the encoded files to DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import simplejpeg
import torch

from pipelines.cpu import jpeg_headers
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.interfaces import Draws, SampleSource
from pipelines.loader.bad_samples import Undecodable
from pipelines.loader.buffers import LentBuffers, SlotBuffers
from pipelines.storage.jpeg_check import UNDECODABLE, decode_with_pillow, header_error
from pipelines.storage.split import Split


class HostJpegs(SampleSource):
    """Source that decodes JPEG shards on the CPU.

    If there is a graph, images are decoded in pieces of about CHUNK bytes, so that the pixels are still in the CPU
    cache when the graph reads them.
    """

    CHUNK = 2**20  # bytes of decoded pixels per piece

    def __init__(self, split: Split, buffers: SlotBuffers | LentBuffers, graph: CpuGraph | None = None) -> None:
        self._split, self._buffers, self._graph, self.monitor = split, buffers, graph, split.monitor
        self._decoded_sizes = split.heights.astype(np.int64) * split.widths * 3  # bytes
        self._scratch: deque[np.ndarray] = deque()

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3].

        Raises:
            Undecodable: A sample cannot be decoded or does not have the size given by the index.
        """
        out = self._buffers(slot, len(indices))
        sizes = self._decoded_sizes[indices]
        if self._graph is None:
            self._decode(indices, sizes, out.reshape(-1))
            return torch.from_numpy(out)
        piece = (np.cumsum(sizes) - 1) // self.CHUNK  # the samples of a piece are decoded, then transformed
        bounds = [*np.flatnonzero(np.diff(piece, prepend=-1)), len(indices)]
        scratch = self._take_scratch(int(max(sizes[start:stop].sum() for start, stop in pairwise(bounds))))
        for start, stop in pairwise(bounds):
            some = indices[start:stop]
            offsets = self._decode(some, sizes[start:stop], scratch)
            shapes = self._split.heights[some].astype(np.int64), self._split.widths[some].astype(np.int64)
            drawn = {name: values[start:stop] for name, values in draws.items()}
            self._graph(Images(scratch, offsets, *shapes), drawn, out[start:stop])
        self._scratch.append(scratch)
        return torch.from_numpy(out)

    def defect(self, sample: int) -> str | None:
        size = self._decoded_sizes[[sample]]
        try:
            self._decode(np.array([sample]), size, np.empty(size[0], np.uint8))
        except Undecodable as found:
            return found.defects[sample]
        return None

    def _take_scratch(self, size: int) -> np.ndarray:
        """Return a buffer of at least `size` bytes that no other thread uses."""
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = np.empty(0, np.uint8)
        return scratch if len(scratch) >= size else np.empty(max(size, 2 * self.CHUNK), np.uint8)

    def _decode(self, indices: np.ndarray, sizes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Decode images one after another with libjpeg-turbo, which gives the same pixels as DALI.

        Pillow decodes the images for which libjpeg-turbo reports an error or a warning.

        Args:
            indices: Sample indices, int64 [B].
            sizes: Size of each decoded image, bytes, int64 [B].
            pixels: uint8 [bytes], filled with the decoded images.

        Returns:
            The offset of each image in `pixels`, bytes, int64 [B].

        Raises:
            Undecodable: A sample cannot be decoded or does not have the size given by the index.
        """
        split, content, decode = self._split, self._split.content, simplejpeg.decode_jpeg
        offsets = np.cumsum(sizes) - sizes
        columns = indices, split.address[indices], split.size[indices], offsets, sizes
        shapes = zip(split.heights[indices].tolist(), split.widths[indices].tolist(), strict=True)
        rows = zip(*(column.tolist() for column in columns), shapes, strict=True)
        for index, address, length, offset, size, sides in rows:  # every operation here matters for small images
            target = pixels[offset : offset + size]
            try:  # a header that does not fit the target is rejected before decoding
                is_sound = decode(content[address : address + length], buffer=target).shape[:2] == sides
            except ValueError:  # also raised for warnings; Pillow, which is slower, distinguishes them from errors
                is_sound = (decoded := decode_with_pillow(split.image_bytes(index), sides)) is not None
                if decoded is not None:
                    target[:] = decoded.reshape(-1)
            if not is_sound:
                raise Undecodable({index: header_error(split.image_bytes(index), sides) or UNDECODABLE})
        return offsets


class MappedFiles(SampleSource):
    """Source of encoded JPEG files. The files are views of the mapped shards, so DALI reads from the page cache.

    Args:
        split: Split of JPEG shards.
        decodes: Function that returns True if DALI can decode a single file, uint8 [bytes].
    """

    def __init__(self, split: Split, decodes: Callable[[np.ndarray], bool]) -> None:
        self._split, self._decodes, self.monitor = split, decodes, split.monitor
        self._content, self._address, self._size = split.content, split.address, split.size
        self._sound: set[int] = set()  # suspicious samples that DALI decodes

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> list[np.ndarray]:
        """Return the encoded files as B arrays, uint8 [bytes].

        Files with suspicious headers (see `jpeg_headers.find_mismatches`) are tested one by one. Within a batch, an
        undecodable header may crash the process, since DALI 2.4's decoder returns while its threads are still working
        on the other files.

        Raises:
            Undecodable: A file with a suspicious header is defective (see `defect`).
            RuntimeError: DALI failed for another reason.
        """
        offsets, sizes = self._address[indices], self._size[indices]
        is_suspect = np.empty(len(indices), bool)
        sides = self._split.heights[indices], self._split.widths[indices]
        jpeg_headers.find_mismatches(self._content, offsets, sizes, *sides, is_suspect)
        if is_suspect.any():
            self._check(indices, np.flatnonzero(is_suspect))
        places = zip(offsets.tolist(), sizes.tolist(), strict=True)
        return [self._content[offset : offset + size] for offset, size in places]

    def _check(self, indices: np.ndarray, suspects: np.ndarray) -> None:
        """Test the suspicious samples of a batch.

        Args:
            indices: Sample indices of the batch, int64 [B].
            suspects: Positions of the suspicious samples in `indices`.

        Raises:
            Undecodable: At least one suspicious sample is defective (see `defect`).
            RuntimeError: DALI failed for another reason.
        """
        bad = [place for place in suspects if indices[place] not in self._sound and self.defect(indices[place])]
        if bad:
            # Test all samples up to the last bad one, so that an error names the first bad sample of the batch.
            found = {sample: self.defect(sample) for sample in indices[: bad[-1] + 1].tolist()}
            raise Undecodable({sample: reason for sample, reason in found.items() if reason is not None})
        self._sound.update(indices[suspects].tolist())

    def defect(self, sample: int) -> str | None:
        """Return the reason why a sample cannot be used, or None if it can.

        The header must be valid and match the index. DALI itself then decodes the file, since DALI and Pillow accept
        different files.

        Raises:
            RuntimeError: DALI failed for another reason, such as insufficient memory.
        """
        file, sides = self._split.image_bytes(sample), self._split.image_size(sample)
        if (reason := header_error(file, sides)) is not None:
            return reason
        return None if self._decodes(file) else UNDECODABLE
