"""Compiles loops over pixels with Numba, and keeps the machine code for as long as nothing that it is made of changes.

It lies beside the source, or in the user's cache where that folder cannot be written. Knows no kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import cfunc, njit

SOURCES = ("*kernels.py", "vector_*.py", "ops.py")  # files beside this one whose code or constants kernels hold


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call; without fast-math, so that every processor gives the same pixels."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        # Numba looks at the function's own file, but the kept code also holds what the function calls.
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _digest_of_sources())
        return compiled
    except (RuntimeError, AttributeError):  # no folder for compiled code, or a Numba that keeps it in another way
        return njit(**options)(function)


def native_callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile what C code calls, at once; `address` of the result is a function pointer. It may call no kernel."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True)(function)
        except RuntimeError:  # no folder for compiled code
            return cfunc(signature)(function)

    return compile_


@lru_cache(maxsize=1)
def _digest_of_sources() -> bytes:
    folder = Path(__file__).parent
    files = sorted({file for pattern in SOURCES for file in folder.glob(pattern)})
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).digest()
