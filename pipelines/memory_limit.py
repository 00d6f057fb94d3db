"""Limit the memory that a library can allocate during one call.

A decoder allocates memory for the image size that a header claims, so a tiny file may take gigabytes. A limit on the
address space covers all allocations of a decoder at once.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")  # its first number is the address space of the process in pages


@contextmanager
def at_most(extra_bytes: int) -> Iterator[None]:
    """Limit the growth of this process's address space within the block to `extra_bytes`, summed over all threads.

    Allocations beyond the limit raise MemoryError. Entering and leaving the block takes about 10 µs. No limit is set if
    the kernel does not report the size of the address space.
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
