"""Sources that read JPEG shards and either decode them for the CPU graph or pass the encoded files to DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from pipelines.cpu.graph import CpuGraph, Images, Parts, whole_parts
from pipelines.cpu.jpeg import headers
from pipelines.cpu.jpeg.decoder import JpegDecoder
from pipelines.interfaces import Draws, SampleSource
from pipelines.loader.bad_samples import Undecodable
from pipelines.loader.buffers import LentBuffers, SlotBuffers
from pipelines.storage.jpeg_check import UNDECODABLE, decode_with_pillow, header_error
from pipelines.storage.split import Split


class HostJpegs(SampleSource):
    """Source that decodes JPEG shards on the CPU.

    If there is a graph, only the parts of images that it reads are decoded. Images are decoded in pieces of about CHUNK
    bytes, so that the pixels are still in the CPU cache when the graph reads them.

    Args:
        split: Split of JPEG shards.
        buffers: Buffers to fill.
        graph: Graph that transforms the images, or None if all images have the size of the buffers.
        fast: Whether to use the fast inverse transform, and to decode an image at 1/2, 1/4 or 1/8 of its size if the
            graph would reduce it further.
        to_end: Whether to read each file to its end. Otherwise, damage below the part that the graph reads is not
            found.
        views: Images per sample, which are made from one decoded image, unless `fast` reduces it differently for them.
    """

    CHUNK = 2**20  # bytes of decoded pixels per piece

    def __init__(
        self,
        split: Split,
        buffers: SlotBuffers | LentBuffers,
        graph: CpuGraph | None = None,
        *,
        fast: bool = False,
        to_end: bool = True,
        views: int = 1,
    ) -> None:
        self._split, self._buffers, self._graph, self.monitor = split, buffers, graph, split.monitor
        self._fast, self.to_end, self._views = fast, to_end, views
        self._tools: deque[tuple[JpegDecoder, np.ndarray]] = deque()  # decoders and memory for pixels, one per thread

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images, uint8 [B, H, W, 3].

        Raises:
            Undecodable: A sample cannot be decoded or does not have the size given by the index.
        """
        out = self._buffers(slot, len(indices))
        sides = self._split.heights[indices].astype(np.int64), self._split.widths[indices].astype(np.int64)
        parts = whole_parts(*sides) if self._graph is None else self._graph.parts(*sides, draws, self._fast)
        bounds = np.arange(len(indices) + 1)  # of the images that are made from one decoded image
        if self._views > 1:
            bounds, parts = _share_parts(indices, parts)
        decoder, pixels = self._take_tools()
        if self._graph is None:
            size = out[0].size if len(out) else 0
            whole = Images(out.reshape(-1), np.arange(len(indices)) * size, *sides, parts)
            self._decode(indices[bounds[:-1]], whole.take(bounds[:-1]), decoder)
            if self._views > 1:
                out[:] = out[bounds[:-1].repeat(np.diff(bounds))]
        else:
            whole = Images(pixels, np.empty(0, np.int64), *sides, parts)
            pixels = self._transform(self._graph, indices, whole, bounds, draws, decoder, out)
        self._tools.append((decoder, pixels))
        return torch.from_numpy(out)

    def _transform(
        self,
        graph: CpuGraph,
        indices: np.ndarray,
        images: Images,
        bounds: np.ndarray,
        draws: Draws,
        decoder: JpegDecoder,
        out: np.ndarray,
    ) -> np.ndarray:
        """Decode and transform a batch in pieces.

        Args:
            graph: The transforms.
            indices: Sample indices, int64 [B].
            images: The parts to decode, and memory for them, which need not suffice. Offsets are ignored.
            bounds: int64 [N + 1]. The images from bounds[i] to bounds[i + 1] are made from one decoded part.
            draws: See `SampleSource.fill`.
            decoder: Decoder that no other thread uses.
            out: Receives the images, uint8 [B, H, W, 3].

        Returns:
            The memory of `images`, or larger memory that replaces it.
        """
        parts, pixels = images.parts or whole_parts(images.heights, images.widths), images.content
        tops, lefts, bottoms, rights = parts.boxes[bounds[:-1]].T
        sizes = (bottoms - tops) * (rights - lefts) * 3
        sizes += sizes % 2
        offsets = np.cumsum(sizes) - sizes + 1  # odd, see `decoder.ODD`
        piece = (offsets + sizes) // self.CHUNK  # the samples of a piece are decoded, then transformed
        pieces = [*pairwise([*np.flatnonzero(np.diff(piece, prepend=-1)), len(sizes)])]
        space = 1 + max(int(sizes[start:stop].sum()) for start, stop in pieces)
        pixels = pixels if len(pixels) >= space else np.empty(max(space, 2 * self.CHUNK), np.uint8)
        images = images._replace(content=pixels, offsets=offsets.repeat(np.diff(bounds)))
        for start, stop in pieces:
            some, firsts = slice(bounds[start], bounds[stop]), bounds[start:stop]
            images.offsets[some] += 1 - offsets[start]
            self._decode(indices[firsts], images.take(firsts), decoder)
            graph(images.take(some), {name: values[some] for name, values in draws.items()}, out[some])
        return pixels

    def defect(self, sample: int) -> str | None:
        height, width = self._split.image_size(sample)
        sides = np.array([height]), np.array([width])
        pixels = np.empty(height * width * 3, np.uint8)
        images = Images(pixels, np.zeros(1, np.int64), *sides, whole_parts(*sides))
        try:
            self._decode(np.array([sample]), images, JpegDecoder())
        except Undecodable as found:
            return found.defects[sample]
        return None

    def _take_tools(self) -> tuple[JpegDecoder, np.ndarray]:
        """Return a decoder and memory that no other thread uses."""
        try:
            return self._tools.pop()
        except IndexError:
            return JpegDecoder(), np.empty(0, np.uint8)

    def _decode(self, indices: np.ndarray, images: Images, decoder: JpegDecoder) -> None:
        """Decode parts of images to `images.content`.

        Accurate decoding gives the same pixels as DALI. Pillow decodes the images for which libjpeg-turbo reports an
        error or a warning.

        Args:
            indices: Sample indices, int64 [B].
            images: The parts to decode.
            decoder: Decoder that no other thread uses.

        Raises:
            Undecodable: A sample cannot be decoded or does not have the size given by the index.
        """
        split, parts = self._split, images.parts or whole_parts(images.heights, images.widths)
        files = split.content, split.address[indices], split.size[indices].astype(np.int64)
        place = 0
        while True:
            place = decoder.decode(
                *files,
                images.heights,
                images.widths,
                *parts,
                fast=self._fast,
                to_end=self.to_end,
                out=images.content,
                offsets=images.offsets,
                first=place,
            )
            if place == len(indices):
                return
            index, sides = int(indices[place]), (int(images.heights[place]), int(images.widths[place]))
            if (decoded := decode_with_pillow(split.image_bytes(index), sides)) is None:
                raise Undecodable({index: header_error(split.image_bytes(index), sides) or UNDECODABLE})
            part = _cut(decoded, parts.boxes[place].tolist(), int(parts.denominators[place]))
            images.content[images.offsets[place] :][: part.size] = part.reshape(-1)
            place += 1


def _share_parts(indices: np.ndarray, parts: Parts) -> tuple[np.ndarray, Parts]:
    """Widen the parts of consecutive images of the same sample, at the same scale, so that all need the same pixels.

    Returns:
        The bounds of the runs of such images, int64 [runs + 1], and the parts.
    """
    scales = parts.denominators
    begins = np.flatnonzero((np.diff(indices, prepend=-1) != 0) | (np.diff(scales, prepend=0) != 0))
    low, high = np.minimum.reduceat(parts.boxes, begins), np.maximum.reduceat(parts.boxes, begins)
    bounds = np.append(begins, len(indices))
    boxes = np.concatenate([low[:, :2], high[:, 2:]], axis=1).repeat(np.diff(bounds), axis=0)
    return bounds, Parts(boxes, scales)


def _cut(image: np.ndarray, box: list[int], denominator: int) -> np.ndarray:
    """Reduce an image, uint8 [H, W, 3], by averaging denominator x denominator pixels, and return a part of it.

    `box` (top, left, bottom, right) is in pixels of the reduced image.
    """
    top, left, bottom, right = box
    if denominator > 1:
        height, width = (-(-side // denominator) * denominator for side in image.shape[:2])
        image = np.pad(image, [(0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)], "edge")
        blocks = image.reshape(height // denominator, denominator, width // denominator, denominator, 3)
        image = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return image[top:bottom, left:right]


class MappedFiles(SampleSource):
    """Source of encoded JPEG files. The files are views of the mapped shards, so DALI reads from the page cache.

    Args:
        split: Split of JPEG shards.
        decodes: Function that returns True if DALI can decode a single file, uint8 [bytes].
    """

    def __init__(self, split: Split, decodes: Callable[[np.ndarray], bool]) -> None:
        self._split, self._decodes, self.monitor = split, decodes, split.monitor
        self._content, self._address, self._size = split.content, split.address, split.size
        self._copies = split.residency is not None and split.residency.evicts  # DALI reads files after `fill`
        self._sound: set[int] = set()  # suspicious samples that DALI decodes

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> list[np.ndarray]:
        """Return the encoded files as B arrays, uint8 [bytes].

        Files with suspicious headers (see `headers.find_mismatches`) are tested one by one. Within a batch, an
        undecodable header may crash the process, since DALI 2.4's decoder returns while its threads are still working
        on the other files.

        Raises:
            Undecodable: A file with a suspicious header is defective (see `defect`).
            RuntimeError: DALI failed for another reason.
        """
        offsets, sizes = self._address[indices], self._size[indices]
        is_suspect = np.empty(len(indices), bool)
        sides = self._split.heights[indices], self._split.widths[indices]
        headers.find_mismatches(self._content, offsets, sizes, *sides, is_suspect)
        if is_suspect.any():
            self._check(indices, np.flatnonzero(is_suspect))
        places = zip(offsets.tolist(), sizes.tolist(), strict=True)
        files = [self._content[offset : offset + size] for offset, size in places]
        return [file.copy() for file in files] if self._copies else files

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
