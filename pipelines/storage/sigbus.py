"""Turn SIGBUS on a mapped shard (truncated file, failing disk) into a flag instead of a crash.

Reading a mapped page beyond the end of its file raises SIGBUS. By default, this signal ends the process without a
Python traceback. The handler in `cpu.sigbus_handler` stores the address of the fault in a table and maps zeros in place
of the page and the rest of the file. Readers check the table before they use the bytes they have read. A SIGBUS outside
the registered ranges is passed to the previous handler.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import threading
from collections import defaultdict

import numpy as np

from pipelines.cpu import sigbus_handler as layout

MAX_ROWS = 2**20  # maximum number of mapped files per process; only the rows of registered files occupy memory
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART = 4, 0x08000000, 0x10000000


class _Action(ctypes.Structure):
    """`struct sigaction` of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()
_before = _Action()  # previous action of the signal; the handler reads it until the process ends
_table = np.empty(0, np.int64)
_free: defaultdict[int, list[int]] = defaultdict(list)  # number of rows -> first rows of unregistered groups


def register(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Register address ranges with the handler. The first call installs the handler.

    Args:
        ranges: Start and end address of each mapped file, multiples of the page size, int64 [files, 2].

    Returns:
        The rows to pass to `unregister`, and a view, int64 [files], in which the handler stores the address of the last
        failed read in each range. The initial value is 0.

    Raises:
        ValueError: More than `MAX_ROWS` files would be mapped.
        OSError: The handler cannot be installed.
    """
    with _lock:
        if not len(_table):
            _install()
        if _free[len(ranges)]:
            first = _free[len(ranges)].pop()
        else:
            first = int(_table[layout.ROWS])
            if first + len(ranges) > MAX_ROWS:
                raise ValueError(f"more than {MAX_ROWS:,} mapped files")
        rows = _rows(first, len(ranges))
        rows[:, layout.FAULT] = 0
        rows[:, layout.END] = ranges[:, 1]
        rows[:, layout.START] = ranges[:, 0]
        _table[layout.ROWS] = max(int(_table[layout.ROWS]), first + len(ranges))
    return rows, rows[:, layout.FAULT]


def unregister(rows: np.ndarray) -> None:
    """Unregister the ranges of `rows`, as returned by `register`. Call this function before unmapping the memory."""
    rows[:, layout.START] = rows[:, layout.END] = 0
    first = (rows.ctypes.data - _table.ctypes.data) // _table.itemsize - layout.FIRST_ROW
    _free[len(rows)].append(first // layout.COLUMNS)  # atomic: a finalizer may run within `register`, under its lock


def _rows(first: int, count: int) -> np.ndarray:
    start = layout.FIRST_ROW + first * layout.COLUMNS
    return _table[start : start + count * layout.COLUMNS].reshape(count, layout.COLUMNS)


def _install() -> None:
    global _table
    size = 8 * (layout.FIRST_ROW + layout.COLUMNS * MAX_ROWS)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has a separate table
    table = np.frombuffer(memory, np.int64)
    table[layout.PAGE], table[layout.PREVIOUS] = mmap.PAGESIZE, ctypes.addressof(_before)
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    prototype(layout.handler.address)(layout.TAKE_TABLE, table.ctypes.data, None)
    action = _Action(handler=layout.handler.address, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_RESTART)
    if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before)):
        raise OSError(ctypes.get_errno(), "cannot handle SIGBUS")
    _table = table
