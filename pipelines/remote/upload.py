"""Upload the files of a conversion while it runs, so that only a few finished shards are on this machine at a time."""

from __future__ import annotations

import filecmp
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Event

from configs.utils.errors import UserError
from configs.utils.files import atomic_write, user_cache
from pipelines.remote.open import read_dataset
from pipelines.remote.store import Store
from pipelines.storage.dataset import DatasetInfo

MAX_UPLOADS = 4  # shards that are uploaded at a time
TRIES = 3  # uploads of a file whose object differs from it
UNFINISHED = "_conversion.json"  # object that exists during a conversion
MD5 = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """The files of one conversion on their way to an object store.

    Use it as a context in which files are uploaded. Leaving it with an error stops all transfers.

    Args:
        url: URL of the data set.

    Attributes:
        most: Number of shards that are uploaded at a time.

    Raises:
        UserError: The URL is not supported or cannot be written to.
    """

    most = MAX_UPLOADS

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self.url = self.store.url
        self.store.check_writable()
        self._stop = Event()
        self._pool = ThreadPoolExecutor(MAX_UPLOADS, thread_name_prefix="upload")
        self._pending: set[Future[None]] = set()
        self._sizes: dict[str, int] = {}  # of the files that this process has uploaded

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def load(self) -> DatasetInfo | None:
        """Return the finished data set at the URL, or None if there is none."""
        if self.store.find("dataset.json") is None:
            return None
        return read_dataset(self.store)[0]

    def check_place(self, folder: Path) -> None:
        """Raise UserError if there are objects at the URL that an unfinished conversion in `folder` did not write."""
        if not (folder / ".spool" / "request.json").exists() and (found := self.store.objects()):
            raise UserError(
                f"--out {self.url} is not empty ({found[0].name}) and contains no data set, and {folder} has no "
                "conversion to resume; choose another URL, delete the objects, or give the --spool of the conversion "
                "that wrote them"
            )

    def start(self, request: dict[str, object]) -> None:
        """Write an object that describes the conversion. This fails before anything is encoded if access is denied."""
        self.store.write(UNFINISHED, json.dumps(request).encode())

    def submit(
        self, files: Sequence[Path], mark: Path | None = None, done: Callable[[], object] = lambda: None
    ) -> None:
        """Upload files in a thread, and delete them here. Wait while MAX_UPLOADS calls are unfinished.

        Args:
            files: The files. Their names are the names of the objects.
            mark: File that is written once all objects are confirmed, before the files are deleted. If it exists, the
                files are not uploaded again.
            done: Called in the thread afterwards.

        Raises:
            UserError, OSError: An earlier upload has failed.
        """
        while len(self._pending) >= MAX_UPLOADS:
            self._wait_for_one()
        self._pending.add(self._pool.submit(self._upload, files, mark, done))

    def wait(self) -> None:
        """Wait for all uploads.

        Raises:
            UserError, OSError: An upload has failed.
        """
        while self._pending:
            self._wait_for_one()

    def finish(self, folder: Path, content: bytes) -> DatasetInfo:
        """Upload the rest of the files, check that all objects are stored, and then write dataset.json.

        Args:
            folder: Folder of the conversion.
            content: Content of dataset.json.

        Returns:
            The data set, as it is stored.

        Raises:
            UserError: An object was removed or replaced after its upload, or an object cannot be written.
        """
        self.submit(sorted(file for file in folder.iterdir() if file.is_file()))
        self.wait()
        expected = dict(self._sizes)
        for mark in (folder / ".spool").glob("*/*.uploaded"):
            expected |= json.loads(mark.read_bytes())
        stored = {found.name: found.bytes for found in self.store.objects()}
        for name, size in sorted(expected.items()):
            if stored.get(name) != size:
                state = f"has {stored[name]:,} bytes instead of {size:,}" if name in stored else "is missing"
                raise UserError(
                    f"{self.store.join(name)} {state}, though it was uploaded; delete all objects of {self.url} and "
                    f"the folder {folder}, and convert again when nothing else writes there"
                )
        self.store.write("dataset.json", content)
        with suppress(UserError):  # deleting may not be allowed
            self.store.remove(UNFINISHED)
        return read_dataset(self.store)[0]

    def _wait_for_one(self) -> None:
        ended, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in ended:
            future.result()

    def _upload(self, files: Sequence[Path], mark: Path | None, done: Callable[[], object]) -> None:
        if mark is None or not mark.exists():
            sizes = {file.name: self._put(file) for file in files}
            self._sizes |= sizes
            if mark is not None:
                atomic_write(mark, lambda opened: opened.write(json.dumps(sizes).encode()))
        for file in files:
            file.unlink(missing_ok=True)
        done()

    def _put(self, file: Path) -> int:
        """Upload a file, and return its size in bytes once the object is known to be equal."""
        for _ in range(TRIES):
            self.store.put(file.name, file, stopped=self._stop)
            if self._is_stored(file):
                return file.stat().st_size
        raise UserError(
            f"{self.store.join(file.name)} was written {TRIES} times and still differs from {file}; check the store, "
            "and that nothing else writes there"
        )

    def _is_stored(self, file: Path) -> bool:
        """Compare the size of an object, and its MD5 if the store gives one, with a file."""
        found = self.store.find(file.name, stopped=self._stop)
        if found is None or found.bytes != file.stat().st_size:
            return False
        tag = found.version.strip('"')
        # Only objects that were uploaded in one part have such a tag. They are small.
        if not MD5.fullmatch(tag) or hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == tag:
            return True
        # The tag of an encrypted object may not be its MD5: compare the bytes.
        copy = file.with_name(f"{file.name}.stored.tmp")
        try:
            self.store.fetch(file.name, copy, found.bytes, stopped=self._stop)
            return filecmp.cmp(file, copy, shallow=False)
        finally:
            copy.unlink(missing_ok=True)


def spool_folder(url: str) -> Path:
    """Return the default folder on this machine for a conversion into a URL."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", url.rstrip("/").rpartition("/")[2])[:100]
    try:
        root = user_cache("convert")
    except RuntimeError:  # no home folder
        root = Path(tempfile.gettempdir()) / "model-zhu-convert"
    return root / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
