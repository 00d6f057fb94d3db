"""Compile loops over pixels with Numba, and cache the machine code until its sources change.

The cache is beside the source, or in the user's own cache if that folder is not writable or holds files of another user
that are not readable.
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

# Files beside this one whose code or constants kernels hold.
SOURCES = ("cpu/*.py", "augment/ops.py", "jpeg_format.py")  # relative to pipelines


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call; without fast-math, so that every processor gives the same pixels."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        if not _is_readable(compiled._cache.cache_path):
            with _in_users_cache():
                compiled = njit(cache=True, **options)(function)
        cache = compiled._cache
        # Numba looks at the function's own file, but the kept code also holds what the function calls.
        kept = cache._cache_file
        kept._source_stamp = (kept._source_stamp, _digest_of_sources())
        # Another user may write there at any time.
        cache.load_overload, cache.save_overload = map(_or_none, (cache.load_overload, cache.save_overload))
        return compiled
    except (RuntimeError, AttributeError):  # no folder for compiled code, or a Numba that keeps it in another way
        return njit(**options)(function)


def native_callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile what C code calls, at once; `address` of the result is a function pointer. It may call no kernel."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True)(function)
        except (RuntimeError, OSError):  # no folder for compiled code, or one that cannot be read
            return cfunc(signature)(function)

    return compile_


@lru_cache
def _is_readable(folder: str) -> bool:
    """Return whether all compiled code in a folder can be read; that of another user perhaps cannot."""
    try:
        files = [file for file in os.listdir(folder) if file.endswith((".nbi", ".nbc"))]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return all(os.access(os.path.join(folder, file), os.R_OK) for file in files)


@contextmanager
def _in_users_cache() -> Iterator[None]:
    """Let functions that are decorated inside keep their code there."""
    before = numba.config.CACHE_DIR
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    numba.config.CACHE_DIR = str(cache / "numba")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _or_none(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a cache, so that it returns None where the system refuses a file."""

    @wraps(method)
    def guarded(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except OSError:
            return None

    return guarded


@lru_cache(maxsize=1)
def _digest_of_sources() -> bytes:
    folder = Path(__file__).parents[1]
    files = sorted({file for pattern in SOURCES for file in folder.glob(pattern)})
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).digest()
