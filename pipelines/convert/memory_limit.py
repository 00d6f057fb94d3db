"""A bound on what foreign bytes may make a library take, around one call: beyond it the allocation fails.

Decoders size their buffers by what a file claims, or by what it inflates to; one check in front of each of their ways
to do so would miss the next one. Knows no format.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")  # its first number: the process's address space in pages


@contextmanager
def at_most(extra_bytes: int) -> Iterator[None]:
    """Let this process grow by `extra_bytes` at most, other threads included; what needs more gets a MemoryError.

    Costs some 10 µs. Without effect where the kernel does not tell how large the process is.
    """
    try:
        size = int(_STATM.read_bytes().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (size + extra_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
