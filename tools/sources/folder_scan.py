"""List the image files below a folder in a fixed order, and count skipped entries by extension and reason."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError, printable

# Extensions of the formats that pipelines.convert.encode decodes, except .pfm, whose values have no declared range.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".ppm", ".pgm",
              ".pbm", ".pnm", ".gif", ".tif", ".tiff")  # fmt: skip
MAX_FILE_BYTES = 1 << 30  # over five times the raw RGB pixels of the largest image allowed by default
LITTER = ("__macosx", ".ds_store", "thumbs.db", "desktop.ini")  # left by archives and file managers; case-insensitive
MAX_SUFFIX = 10  # characters of an extension in a note
MAX_LISTED = 10  # classes named in a note
MAX_LISTED_GROUPS = 8  # groups of skipped entries in a note


class Scan:
    """Lists the files in a source folder, refuses links that lead out of it, and counts skipped entries.

    Args:
        root: The folder, as an absolute path without links.
        follow_links: Whether to read links that lead out of the root, and links to folders below classes.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root
        self.follow_links = follow_links
        self.expected: set[str] = set()  # absolute paths of files that are neither listed nor counted as skipped
        self.touched = hashlib.sha256()  # hash of the modification times of the files
        self._skipped: dict[tuple[str, str], tuple[int, str]] = {}  # (kind, reason) -> (count, first path)

    def entries(self, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
        """List the subfolders and image files of a folder, whose path is relative to the root.

        Returns:
            The names of subfolders, and (name, size in bytes) of image files, both sorted by name.

        Raises:
            UserError: The folder cannot be read, a link leads out of the root, or a file is too large.
        """
        folders, files = [], []
        try:
            with os.scandir(self.root / folder) as found:
                for entry in sorted(found, key=lambda entry: entry.name):
                    if is_litter(entry.name):
                        continue
                    if reason := self._skip_reason(entry):
                        self.skip(join_path(folder, entry.name), reason, entry.is_dir(follow_symlinks=False))
                    elif entry.is_dir():
                        folders.append(entry.name)
                    elif entry.path not in self.expected:
                        files.append((entry.name, self._checked_size(entry)))
        except OSError as error:
            raise UserError(f"cannot list {self.root / folder} ({error.strerror}); check its permissions") from None
        return folders, files

    def images(self, folder: str) -> list[tuple[str, int]]:
        """Return the path and size in bytes of every image file at any depth below a folder, sorted by path.

        Links to folders are skipped unless `follow_links` is set, since they could list files twice. A link to one of
        the folders that contain it is always skipped. Raises UserError for the same reasons as `entries`.
        """
        found: list[tuple[str, int]] = []
        waiting = [(folder, frozenset(self._identity(str(parent)) for parent in Path(folder).parents))]
        while waiting:
            parent, above = waiting.pop()
            identity = self._identity(parent)
            if identity in above:
                self.skip(parent, "link to a folder that contains it", is_folder=True)
                continue
            folders, files = self.entries(parent)
            for name in folders:
                inner = join_path(parent, name)
                if not self.follow_links and (self.root / inner).is_symlink():
                    self.skip(inner, "link to a folder (--follow-links reads it)", is_folder=True)
                else:
                    waiting.append((inner, above | {identity}))
            found += [(join_path(parent, name), size) for name, size in files]
        return sorted(found)

    def _identity(self, folder: str) -> tuple[int, int]:
        """Return the device and inode number of a folder, by which a cycle of links is recognized."""
        status = os.stat(self.root / folder)
        return status.st_dev, status.st_ino

    def skip(self, path: str, reason: str, is_folder: bool = False) -> None:
        suffix = Path(path).suffix.lower()
        kind = "folder" if is_folder else suffix or "without extension"
        if len(suffix) > MAX_SUFFIX and not is_folder:
            kind = "with a long extension"
        count, first = self._skipped.get((kind, reason), (0, path))
        self._skipped[kind, reason] = (count + 1, first)

    def skip_all(self, files: list[tuple[str, int]]) -> None:
        """Skip image files that are in no class folder."""
        for path, _ in files:
            self.skip(path, "outside of the class folders")

    def summary(self) -> str:
        """Return text that counts the skipped entries by kind and reason, or '' if nothing was skipped.

        Example: '3 .txt, not an image (a/x.txt …); 1 .jpg, hidden (a/.x.jpg)'.
        """
        groups = sorted(self._skipped.items(), key=lambda item: (-item[1][0], item[0]))
        texts = [
            f"{count:,} {kind}, {reason} ({first}{' …' * (count > 1)})"
            for (kind, reason), (count, first) in groups[:MAX_LISTED_GROUPS]
        ]
        if rest := sum(count for _, (count, _) in groups[MAX_LISTED_GROUPS:]):
            texts.append(f"{rest:,} more")
        return "; ".join(texts)

    def hint(self) -> str:
        """Return `summary` as a clause for an error message about missing images, or '' if nothing was skipped."""
        return f"; skipped: {self.summary()}" if self._skipped else ""

    def note_skipped(self) -> None:
        if self._skipped:
            total = sum(count for count, _ in self._skipped.values())
            note(f"skipped {total:,} {'entry' if total == 1 else 'entries'}: {self.summary()}")

    def _skip_reason(self, entry: os.DirEntry[str]) -> str:
        """Return the reason to skip an entry, or '' for folders, image files and expected files.

        Raises UserError if the entry is a link that leads out of the root and links are not followed.
        """
        if entry.name.startswith("."):
            return "hidden"
        if entry.is_symlink() and not self._has_target(Path(entry.path)):
            return "link that leads nowhere"
        if entry.is_dir():
            return ""
        if not entry.name.lower().endswith(EXTENSIONS) and entry.path not in self.expected:
            return "not an image"
        return "" if entry.is_file() else "not a regular file"

    def _has_target(self, link: Path) -> bool:
        """Return True if the target of a link exists.

        Raises:
            UserError: The target is outside the root, and links are not followed.
        """
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a cycle of links, before Python 3.13
            return False
        if not self.follow_links and not target.is_relative_to(self.root):
            raise UserError(
                f"symbolic link {link} leads out of the source folder, to {target}; give --follow-links to read it, or "
                f"copy the files into {self.root}"
            )
        return True

    def _checked_size(self, entry: os.DirEntry[str]) -> int:
        status = entry.stat()
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(
                f"{entry.path} has {status.st_size:,} bytes, but at most {MAX_FILE_BYTES:,} are allowed; remove it"
            )
        self.touched.update(status.st_mtime_ns.to_bytes(8, "little", signed=True))
        return status.st_size


def read_regular_file(path: Path) -> bytes:
    """Read a file that a scan has listed. Opening does not block, even if the file has been replaced by a pipe.

    Raises:
        UserError: The file is no longer a regular file, or has become too large.
        OSError: The file cannot be opened or read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} changed while it was converted; start again")
        return file.read(status.st_size)


def is_litter(name: str) -> bool:
    """Return True if a file or folder with this name was created by an archiver or a file manager."""
    return name.startswith("._") or name.lower() in LITTER


def join_path(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def note_missing_classes(what: str, labels: Sequence[int] | np.ndarray, names: Sequence[object]) -> None:
    """Print a note about classes without samples. `what` begins the sentence, e.g. 'val has no images'."""
    missing = np.setdiff1d(np.arange(len(names)), labels).tolist()
    if missing:
        shown = ", ".join(str(names[number]) for number in missing[:MAX_LISTED]) + " …" * (len(missing) > MAX_LISTED)
        note(f"{what} of {len(missing):,} of {len(names):,} classes: {shown}")


def note(text: str) -> None:
    print(printable(f"note: {text}"), file=sys.stderr)
