"""Read and write the objects of a data set in S3, Google Cloud Storage or on a web server, through fsspec.

Requests that fail for a while (timeouts, lost connections, HTTP 408, 425, 429 and 5xx, truncated bodies) are sent again
with exponential back-off. Credentials, endpoints and proxies come from the environment, as the libraries of the stores
read them; messages contain none of them.
"""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from configs.utils.errors import UserError

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}  # scheme -> package
TRIES = 10
RETRY_S = 180.0  # time after which no request is sent again
MAX_DELAY_S = 20.0
STALL_S = 60.0  # a request without any bytes for this long counts as failed
POLL_S = 0.1
RETRIED_STATUS = {408, 425, 429, *range(500, 600)}
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # of the file that is written
# Exceptions without an HTTP status that sending the request again does not help, by class name: these packages are
# imported only where they are used.
PERMANENT = {
    "FileNotFoundError",
    "PermissionError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidURL",
    "ValueError",
    "TypeError",
}

T = TypeVar("T")


class StoppedError(Exception):
    """Raised by a transfer that was stopped, because nothing waits for its result anymore."""


class _TooLargeError(Exception):
    """Raised within a transfer that exceeds its expected size."""


class StoredObject(NamedTuple):
    """An object in a store."""

    name: str  # below the URL of the store
    bytes: int
    version: str  # ETag or generation; "" if the server gives none


class Stopped(Protocol):
    """A flag that ends transfers, such as threading.Event."""

    def is_set(self) -> bool: ...


class Store:
    """The objects below a URL, such as s3://bucket/set. All methods are thread-safe.

    Methods raise UserError if an object cannot be read or written, and StoppedError if `stopped` is set meanwhile.

    Args:
        url: URL of the data set.

    Raises:
        UserError: The scheme is not supported, its package is not installed, or the URL contains credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self._scheme = urlsplit(self.url).scheme
        self._files = _file_system(self._scheme, self.url)

    def join(self, name: str) -> str:
        """Return the URL of the object `name`."""
        return f"{self.url}/{quote(name) if self._scheme.startswith('http') else name}"

    def read(self, name: str) -> bytes:
        """Return the content of a small object."""
        content: bytes = self._request(name, "read", lambda: self._files._cat_file(self.join(name)))
        return content

    def fetch(
        self,
        name: str,
        file: Path,
        most: int,
        *,
        stopped: Stopped | None = None,
        count: Callable[[int], object] = lambda size: None,
    ) -> None:
        """Write an object to a local file, which is overwritten.

        Check the content of the file: the object may be shorter or longer than expected.

        Args:
            name: The object.
            file: The file.
            most: Expected size in bytes. The transfer ends once it exceeds this size.
            stopped: Flag that ends the transfer.
            count: Called with the number of bytes that each piece adds, and with a negative number if a failed transfer
                starts again.

        Raises:
            OSError: The file cannot be written.
        """
        received = 0

        def add(size: int) -> None:
            nonlocal received
            received += size
            count(size)

        def start() -> Coroutine[object, object, object]:
            add(-received)
            return self._files._get_file(self.join(name), str(file), callback=_Progress(add, most))

        with suppress(_TooLargeError):
            self._request(name, "read", start, stopped, lambda: received)

    def put(self, name: str, file: Path, *, stopped: Stopped | None = None) -> None:
        """Write a local file as an object, which is replaced if it exists."""
        sent = 0
        # Compare the MD5 that Google Cloud Storage returns. S3 compares a CRC that is sent along.
        checked = {"consistency": "md5"} if self._scheme == "gs" else {}

        def add(size: int) -> None:
            nonlocal sent
            sent += size

        def start() -> Coroutine[object, object, object]:
            return self._files._put_file(str(file), self.join(name), callback=_Progress(add), **checked)

        self.check_writable()
        # The libraries report a multi-part upload part by part, so a slow part must not count as stalled.
        self._request(name, "write", start, stopped, lambda: sent, 10 * STALL_S)

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, which is replaced if it exists."""
        self.check_writable()
        self._request(name, "write", lambda: self._files._pipe_file(self.join(name), content))

    def remove(self, name: str) -> None:
        """Remove an object, which may be missing."""
        self.check_writable()
        if self.find(name) is not None:
            self._request(name, "remove", lambda: self._files._rm_file(self.join(name)))

    def find(self, name: str, *, stopped: Stopped | None = None) -> StoredObject | None:
        """Return size and version of an object, or None if it does not exist. `stopped` ends the request."""

        async def find() -> StoredObject | None:
            try:
                self._files.invalidate_cache()
                return _stored(name, await self._files._info(self.join(name)))
            except FileNotFoundError:
                return None

        return self._request(name, "examine", find, stopped)

    def objects(self) -> list[StoredObject]:
        """Return all objects directly below the URL. Web servers do not list theirs, so the list may be incomplete."""

        async def entries() -> list[StoredObject]:
            try:
                self._files.invalidate_cache()
                found = await self._files._ls(self.url, detail=True)
            except FileNotFoundError:
                return []
            files = [entry for entry in found if entry["type"] == "file"]
            return [_stored(unquote(entry["name"].rstrip("/").rpartition("/")[2]), entry) for entry in files]

        return self._request("", "list", entries)

    def check_writable(self) -> None:
        """Raise UserError if objects of this kind of URL cannot be written."""
        if self._scheme.startswith("http"):
            raise UserError(f"cannot write to {self.url}: web servers are only read; give an s3:// or gs:// URL")

    def _request(
        self,
        name: str,
        verb: str,
        start: Callable[[], Coroutine[object, object, T]],
        stopped: Stopped | None = None,
        progress: Callable[[], int] = lambda: 0,
        stall_s: float = STALL_S,
    ) -> T:
        """Send a request until it succeeds, and return its result.

        Args:
            name: The object, for messages.
            verb: What is done with it, for messages.
            start: Returns the coroutine that sends the request.
            stopped: Flag that ends the request.
            progress: Returns the number of bytes transferred so far.
            stall_s: Time without progress after which a try fails, in seconds.
        """
        begin_s = time.monotonic()
        for number, delay_s in enumerate(_delays(), start=1):
            try:
                return self._wait(start(), stopped, progress, stall_s)
            except (StoppedError, _TooLargeError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                    raise
                status, elapsed_s = _status(error), time.monotonic() - begin_s
                if not _is_temporary(error, status) or number == TRIES or elapsed_s + delay_s > RETRY_S:
                    raise UserError(self._message(name, verb, error, status, number, elapsed_s)) from None
                _sleep(delay_s, stopped)
        raise AssertionError("unreachable")

    def _wait(
        self,
        request: Coroutine[object, object, T],
        stopped: Stopped | None,
        progress: Callable[[], int],
        stall_s: float,
    ) -> T:
        future = asyncio.run_coroutine_threadsafe(request, self._files.loop)
        seen, changed_s = progress(), time.monotonic()
        try:
            while not wait([future], POLL_S if stopped is not None else 1.0).done:
                if stopped is not None and stopped.is_set():
                    raise StoppedError
                if (done := progress()) != seen:
                    seen, changed_s = done, time.monotonic()
                if time.monotonic() - changed_s > stall_s:
                    raise TimeoutError(f"no answer for {stall_s:.0f} s")
        finally:
            future.cancel()  # does nothing to a request that has ended
        return future.result()

    def _message(self, name: str, verb: str, error: Exception, status: int, tries: int, elapsed_s: float) -> str:
        place = self.join(name) if name else self.url
        if status == 404 or isinstance(error, FileNotFoundError):
            return f"{place} does not exist; check the URL, and that all files of the data set were uploaded"
        how = "; see `Object stores` in docs/data-format.md"
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            reason = f"HTTP {status}" if status else type(error).__name__
            return f"access to {place} is denied ({reason}); check the credentials and their permissions{how}"
        reason = f"HTTP {status}" if status else _reason(error)
        after = f" after {tries} tries in {elapsed_s:.0f} s" if tries > 1 else ""
        return f"cannot {verb} {place}: {reason}{after}; check the store and the network, then start again"


class _Progress:
    """The callback of fsspec that counts the bytes of a transfer, and ends one that exceeds `most` bytes."""

    def __init__(self, add: Callable[[int], None], most: int | None = None) -> None:
        self._add, self._most, self._total = add, most, 0

    def set_size(self, size: int | None) -> None:
        pass

    def relative_update(self, inc: int = 1) -> None:
        self._total += inc
        self._add(inc)
        if self._most is not None and self._total > self._most:
            raise _TooLargeError

    def absolute_update(self, value: int) -> None:
        self.relative_update(value - self._total)


def _checked(url: str) -> str:
    """Return a URL without a trailing slash. Raises UserError if it is not supported."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if scheme not in PACKAGES:
        raise UserError(f"{shown} has the unsupported scheme {scheme!r}; use s3://, gs:// or https://")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"the URL of {shown} contains a user, a query or a fragment; give credentials in environment variables or "
            "in ~/.netrc, and the plain URL of the folder"
        )
    if not parts.netloc or (scheme in ("s3", "gs") and not parts.path.strip("/")):
        raise UserError(f"{shown} does not name a folder; give e.g. {scheme}://bucket/data-set")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _file_system(scheme: str, url: str) -> AsyncFileSystem:
    package = PACKAGES[scheme]
    try:
        __import__(package)
        import fsspec
    except ImportError:
        raise UserError(
            f"reading {url} needs the package {package}; install the extra `remote`: pip install -e '.[remote]'"
        ) from None
    # The libraries' own retries are switched off where they can be: this module repeats requests.
    options: dict[str, object] = {}
    if scheme == "s3":
        # One request per object: several objects are fetched at a time instead.
        options = {"max_concurrency": 1, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    elif scheme != "gs":
        import aiohttp

        options = {"client_kwargs": {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=15)}}
    files: AsyncFileSystem = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    if scheme == "s3":
        files.retries = 1
    return files


def _stored(name: str, entry: dict[str, Any]) -> StoredObject:
    """Return an object as listed by fsspec."""
    version = next((str(entry[key]) for key in ("ETag", "etag", "generation") if entry.get(key)), "")
    return StoredObject(name, int(entry.get("size") or 0), version)


def _delays() -> Iterator[float]:
    """Yield the seconds to wait after each failed try: exponential, with jitter so that ranks spread."""
    for number in range(TRIES):
        yield min(MAX_DELAY_S, 0.25 * 2**number) * random.uniform(0.5, 1)


def _sleep(seconds: float, stopped: Stopped | None) -> None:
    if isinstance(stopped, threading.Event):
        stopped.wait(seconds)
    else:
        time.sleep(seconds)


def _status(error: BaseException | None) -> int:
    """Return the HTTP status that an error of a library reports, or 0."""
    while error is not None:
        response = getattr(error, "response", None)
        found: object = None
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(error).__name__ in ("ClientResponseError", "HttpError"):  # of aiohttp and of gcsfs
            found = getattr(error, "status", None) or getattr(error, "code", None)
        if str(found).isdecimal() and 100 <= int(str(found)) < 600:
            return int(str(found))
        error = error.__cause__
    return 403 if str(error).startswith("Forbidden") else 0


def _is_temporary(error: Exception, status: int) -> bool:
    if status:
        return status in RETRIED_STATUS or status < 300  # an error despite success: a truncated body
    return not any(kind.__name__ in PERMANENT for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    # Only the class of other errors: their text may contain a signed URL.
    return text if isinstance(error, TimeoutError) and text else f"the connection failed ({type(error).__name__})"


def shown_size(size: float) -> str:
    """Return a number of bytes in GiB or MiB, for messages."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
