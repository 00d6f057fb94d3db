"""Where the images of jpeg shards come from: decoded here for the CPU's graph, or as files that DALI decodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import simplejpeg
import torch

from pipelines.cpu import jpeg_headers
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.loader.bad_samples import Undecodable
from pipelines.loader.sources import SampleSource, SlotBuffers
from pipelines.storage.jpeg_check import UNDECODABLE, decode_with_pillow, file_of, header_error, sides_of
from pipelines.storage.split import Split


class HostJpegs(SampleSource):
    """jpeg shards, decoded on the CPU into memory that stays in the cache, and from there through a graph."""

    CHUNK = 2**20  # bytes of decoded pixels

    def __init__(self, split: Split, slots: SlotBuffers, graph: CpuGraph | None = None) -> None:
        self._split, self._slots, self._graph, self.monitor = split, slots, graph, split.monitor
        self._pixels = split.heights.astype(np.int64) * split.widths * 3
        self._scratch: deque[np.ndarray] = deque()

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3]"""
        out = self._slots(slot, len(indices))
        sizes = self._pixels[indices]
        if self._graph is None:
            self._decode(indices, sizes, out.reshape(-1))
            return torch.from_numpy(out)
        piece = (np.cumsum(sizes) - 1) // self.CHUNK  # samples of one piece are decoded together
        bounds = [*np.flatnonzero(np.diff(piece, prepend=-1)), len(indices)]
        scratch = self._taken(int(max(sizes[start:stop].sum() for start, stop in pairwise(bounds))))
        for start, stop in pairwise(bounds):
            some = indices[start:stop]
            offsets = self._decode(some, sizes[start:stop], scratch)
            shapes = self._split.heights[some].astype(np.int64), self._split.widths[some].astype(np.int64)
            drawn = {name: values[start:stop] for name, values in draws.items()}
            self._graph(Images(scratch, offsets, *shapes), drawn, out[start:stop])
        self._scratch.append(scratch)
        return torch.from_numpy(out)

    def defect(self, sample: int) -> str | None:
        try:
            self._decode(np.array([sample]), self._pixels[[sample]], np.empty(self._pixels[sample], np.uint8))
        except Undecodable as found:
            return found.defects[sample]
        return None

    def _taken(self, size: int) -> np.ndarray:
        """Memory of at least `size` bytes that no other thread uses."""
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = np.empty(0, np.uint8)
        return scratch if len(scratch) >= size else np.empty(max(size, 2 * self.CHUNK), np.uint8)

    def _decode(self, indices: np.ndarray, sizes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Write the images one after another into pixels (uint8, flat); returns where each offsets.

        sizes: of the decoded images, bytes. The decoder is libjpeg-turbo, as in DALI, and gives the same pixels.
        """
        split, content, decode = self._split, self._split.content, simplejpeg.decode_jpeg
        offsets = np.cumsum(sizes) - sizes
        columns = indices, split.address[indices], split.size[indices], offsets, sizes
        shapes = zip(split.heights[indices].tolist(), split.widths[indices].tolist(), strict=True)
        rows = zip(*(column.tolist() for column in columns), shapes, strict=True)
        for index, address, length, begin, size, sides in rows:  # small images feel every operation here
            target = pixels[begin : begin + size]
            try:  # a header of a size that does not fit into the target is refused before anything is decoded
                is_sound = decode(content[address : address + length], buffer=target).shape[:2] == sides
            except ValueError:  # also for a warning; Pillow, slower, tells those from an image that is cut short
                is_sound = (decoded := decode_with_pillow(file_of(split, index), sides)) is not None
                if decoded is not None:
                    target[:] = decoded.reshape(-1)
            if not is_sound:
                raise Undecodable({index: header_error(file_of(split, index), sides) or UNDECODABLE})
        return offsets


class MappedFiles(SampleSource):
    """jpeg shards: views of the encoded bytes, which the decoder reads straight from the page cache."""

    def __init__(self, split: Split, decodes: Callable[[np.ndarray], bool]) -> None:
        """decodes: whether DALI can decode a file, which it is given on its own."""
        self._split, self._decodes, self.monitor = split, decodes, split.monitor
        self._content, self._address, self._size = split.content, split.address, split.size
        self._sound: set[int] = set()  # suspects that DALI decodes

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> list[np.ndarray]:
        """B arrays uint8 [bytes].

        Raises Undecodable for headers that DALI cannot parse: in a batch, such a file may end the process, since DALI's
        decoder gives up while its threads still work on the other files (DALI 2.4).
        """
        offsets, sizes = self._address[indices], self._size[indices]
        is_suspect = np.empty(len(indices), bool)
        sides = self._split.heights[indices], self._split.widths[indices]
        jpeg_headers.find_mismatches(self._content, offsets, sizes, *sides, is_suspect)
        if is_suspect.any():
            self._check(indices, np.flatnonzero(is_suspect))
        places = zip(offsets.tolist(), sizes.tolist(), strict=True)
        return [self._content[begin : begin + size] for begin, size in places]

    def _check(self, indices: np.ndarray, suspects: np.ndarray) -> None:
        """Raise Undecodable where DALI cannot decode a suspect; suspects: places in indices."""
        bad = [place for place in suspects if indices[place] not in self._sound and self.defect(indices[place])]
        if bad:
            # Those before the last one are decoded as well, so that an error names the first of the stream.
            found = {sample: self.defect(sample) for sample in indices[: bad[-1] + 1].tolist()}
            raise Undecodable({sample: wrong for sample, wrong in found.items() if wrong is not None})
        self._sound.update(indices[suspects].tolist())

    def defect(self, sample: int) -> str | None:
        """Return what is wrong with a sample as DALI sees it: it decodes files that Pillow refuses, and the reverse."""
        file, sides = file_of(self._split, sample), sides_of(self._split, sample)
        if (wrong := header_error(file, sides)) is not None:
            return wrong
        return None if self._decodes(file) else UNDECODABLE
