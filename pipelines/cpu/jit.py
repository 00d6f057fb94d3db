"""Numba decorators for kernels and C callbacks. The machine code of kernels is cached until a file in SOURCES changes.

The cache is in a folder next to the source. If this folder is not writable or contains cache files that the user cannot
read, the cache is in the user's own cache directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Protocol, TypeVar

from numba import cfunc, njit
from numba.core.base import BaseContext
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.compiler import CompileResult
from numba.core.typing.templates import Signature

# Files whose code or constants are compiled into kernels, relative to pipelines.
SOURCES = ("cpu/**/*.py", "augment/ops.py", "jpeg_format.py")

Kernel = TypeVar("Kernel", bound=Callable[..., object])


class NativeCallback(Protocol):
    """A compiled C function."""

    address: int  # function pointer


def kernel(function: Kernel) -> Kernel:
    """Compile a function on its first call. Fast-math is disabled, so that all CPUs produce identical pixels."""
    compiled = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # no cache folder
        compiled._cache = _KernelCache(function)
    return compiled


def native_callback(signature: Signature) -> Callable[[Callable[..., None]], NativeCallback]:
    """Return a decorator that compiles a C callback immediately. The callback must not call kernels."""

    def compile_(function: Callable[..., None]) -> NativeCallback:
        try:
            return cfunc(signature, cache=True)(function)
        except (RuntimeError, OSError):  # no cache folder, or an unreadable one
            return cfunc(signature)(function)

    return compile_


class _ReadableFolder:
    """Mixin for Numba's locators of cache folders that skips folders with files that this user cannot read."""

    @classmethod
    def from_function(cls, function: FunctionType, file: str) -> _ReadableFolder | None:
        locator = super().from_function(function, file)  # type: ignore[misc]
        return locator if locator is not None and _is_readable(locator.get_cache_path()) else None


class _CacheFolder(CompileResultCacheImpl):
    _locator_classes = tuple(
        type(locator.__name__, (_ReadableFolder, locator), {}) for locator in CompileResultCacheImpl._locator_classes
    )


class _KernelCache(FunctionCache):
    """Numba's cache of machine code, with two differences.

    Numba checks only the file of the function itself, but the code contains the functions that it calls too. Another
    user may write to the folder at any time, so OSErrors when loading or saving are ignored.
    """

    _impl_class = _CacheFolder

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, _sources_digest())

    def load_overload(self, signature: Signature, context: BaseContext) -> CompileResult | None:
        with suppress(OSError):
            return super().load_overload(signature, context)
        return None

    def save_overload(self, signature: Signature, compiled: CompileResult) -> None:
        with suppress(OSError):
            super().save_overload(signature, compiled)


@lru_cache
def _is_readable(folder: str) -> bool:
    """Return True if this user can read all compiled code in a folder."""
    try:
        files = [file for file in os.listdir(folder) if file.endswith((".nbi", ".nbc"))]
    except OSError:
        return False
    return all(os.access(os.path.join(folder, file), os.R_OK) for file in files)


@lru_cache(maxsize=1)
def _sources_digest() -> bytes:
    folder = Path(__file__).parents[1]
    files = sorted(file for pattern in SOURCES for file in folder.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
