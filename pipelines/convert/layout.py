"""Layout of a conversion: its blocks of source rows, its shards, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.convert.source import Options
from pipelines.storage import tar_format

GROUPS = 16  # maximum number of shard groups per split; a group's spool files are deleted once its shards are written


@dataclass(frozen=True)
class SplitLayout:
    """Layout of one split, shared by both passes of the shuffle and fixed before the first pass."""

    dataset: str
    split: str
    classes: int
    options: Options
    image_shape: tuple[int, int, int] | None
    payload_bytes: int  # bytes per sample; an estimate for JPEG
    rows: int
    block_rows: int
    shard_rows: int
    shuffled: bool
    spool: Path
    out: Path

    @property
    def stored_bytes(self) -> int:
        """Bytes per sample in a shard, at most; an estimate for JPEG."""
        return self.payload_bytes + 4 * tar_format.BLOCK

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def group_shards(self) -> int:
        return -(-self.shard_count // GROUPS)

    @property
    def groups(self) -> int:
        return -(-self.shard_count // self.group_shards)

    def block_table(self, block: int) -> Path:
        return self.spool / f"block-{block:06d}.npz"

    def block_group(self, block: int, group: int) -> Path:
        return self.spool / f"block-{block:06d}.group-{group:02d}.bin"

    def shard_table(self, shard: int) -> Path:
        return self.spool / f"shard-{shard:06d}.npz"

    def shard_file(self, shard: int) -> Path:
        return self.out / f"{self.dataset}-{self.split}-{shard:06d}.tar"

    def shard_files(self, shard: int) -> tuple[Path, Path]:
        """Return the files of a shard, the tar last."""
        file = self.shard_file(shard)
        return file.with_suffix(".idx"), file

    def upload_mark(self, shard: int) -> Path:
        """Return the file that exists if the files of a shard were uploaded, and may be deleted here."""
        return self.spool / f"shard-{shard:06d}.uploaded"

    def is_written(self, shard: int, present: set[str]) -> bool:
        """Return True if the files of a shard are among the names of files `present` in `spool` and `out`."""
        is_kept = {file.name for file in self.shard_files(shard)} <= present
        return self.shard_table(shard).name in present and (is_kept or self.upload_mark(shard).name in present)

    def block_size(self, block: int) -> int:
        """Return the number of rows of a block. The last block may be smaller than `block_rows`."""
        return min(self.block_rows, self.rows - block * self.block_rows)

    def shard_size(self, shard: int) -> int:
        """Return the number of source rows assigned to a shard. The quarantined rows among them are not written."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)
