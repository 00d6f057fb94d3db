"""Numba decorators for kernels and C callbacks. The machine code of kernels is cached until a file in SOURCES changes.

The cache is in a folder next to the source. If this folder is not writable or contains cache files that the user cannot
read, the cache is in the user's own cache directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, njit

# Files whose code or constants are compiled into kernels, relative to pipelines.
SOURCES = ("cpu/*.py", "augment/ops.py", "jpeg_format.py")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call. Fast-math is disabled, so that all CPUs produce identical pixels."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        if not _is_readable(compiled._cache.cache_path):
            with _in_users_cache():
                compiled = njit(cache=True, **options)(function)
        cache = compiled._cache
        # Numba checks only the file of the function itself, but the cached code contains the functions it calls too.
        cache_file = cache._cache_file
        cache_file._source_stamp = (cache_file._source_stamp, _sources_digest())
        # Another user may write to the folder at any time, so OSErrors when loading or saving are ignored.
        cache.load_overload, cache.save_overload = map(_or_none, (cache.load_overload, cache.save_overload))
        return compiled
    except (RuntimeError, AttributeError):  # no cache folder, or a Numba version with other internals
        return njit(**options)(function)


def native_callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a C callback immediately. The callback must not call kernels.

    The attribute `address` of the decorated callback is its function pointer.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True)(function)
        except (RuntimeError, OSError):  # no cache folder, or an unreadable one
            return cfunc(signature)(function)

    return compile_


@lru_cache
def _is_readable(folder: str) -> bool:
    """Return True if this user can read all compiled code in a folder, or if the folder does not exist."""
    try:
        files = [file for file in os.listdir(folder) if file.endswith((".nbi", ".nbc"))]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return all(os.access(os.path.join(folder, file), os.R_OK) for file in files)


@contextmanager
def _in_users_cache() -> Iterator[None]:
    """Use the user's cache directory for functions that are decorated within this context."""
    before = numba.config.CACHE_DIR
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    numba.config.CACHE_DIR = str(cache / "numba")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _or_none(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method so that it returns None instead of raising OSError."""

    @wraps(method)
    def guarded(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except OSError:
            return None

    return guarded


@lru_cache(maxsize=1)
def _sources_digest() -> bytes:
    folder = Path(__file__).parents[1]
    files = sorted({file for pattern in SOURCES for file in folder.glob(pattern)})
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).digest()
