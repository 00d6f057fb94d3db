"""Locks, signals, and the lives of parent processes: the one mechanism for each, on Linux."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Literal

LOCK_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_libc = ctypes.CDLL(None)  # looked up before any fork


def acquire_lock(
    file: BinaryIO, timeout_s: float = 0.0, *, is_inherited: bool = True, on_wait: Callable[[], object] = lambda: None
) -> bool:
    """Lock an open file exclusively, and return False if another process still holds the lock after the timeout.

    The kernel releases the lock when the file is closed or the process ends, however it ends. A process that holds the
    lock for long can call `os.utime` on the file from time to time: the timeout counts from the last change of the
    file's modification time.

    Args:
        file: A file open for writing.
        timeout_s: Time to wait, in seconds.
        is_inherited: Whether the lock belongs to the open file (flock), so that child processes that inherit it hold
            the lock too. Otherwise it belongs to this process (a POSIX lock), and closing any other file object for the
            same file in this process releases it.
        on_wait: Called repeatedly while the lock is held elsewhere.

    Raises:
        OSError: The file system does not support locks.
    """
    lock = fcntl.flock if is_inherited else fcntl.lockf
    changed_ns, waiting_since_s = None, time.monotonic()
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):  # another process holds the lock
            pass
        if (modified_ns := os.fstat(file.fileno()).st_mtime_ns) != changed_ns:
            changed_ns, waiting_since_s = modified_ns, time.monotonic()
        if time.monotonic() - waiting_since_s >= timeout_s:
            return False
        on_wait()
        time.sleep(LOCK_POLL_S)


def lock_byte(file: BinaryIO, place: int, kind: Literal["shared", "exclusive", "none"]) -> bool:
    """Lock one byte of an open file, or release it, without waiting.

    Return False if another open file, in this process or another one, holds a conflicting lock. Locks belong to the
    open file: a second call changes its own lock, and closing the file or ending the process releases all of them.

    Args:
        file: A file open for reading and writing. It may be shorter than `place`.
        place: Position of the byte.
        kind: "shared" locks exclude exclusive ones, and "exclusive" locks all others; "none" releases the lock.

    Raises:
        OSError: The file system does not support locks.
    """
    number = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "none": fcntl.F_UNLCK}[kind]
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", number, os.SEEK_SET, place, 1, 0))  # struct flock
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def importing_torch() -> Iterator[None]:
    """Import torch in this context in three quarters of the time, by pausing Python's garbage collector.

    The imports make 700,000 objects and hardly any garbage. Later collections skip the objects that exist at the end of
    the context. No-op if torch is already imported, such as in a notebook, whose objects must stay collectable.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `handler` when one of these signals arrives in this context.

    Signals that are ignored, such as SIGHUP under nohup, or SIGINT in the background of a shell, stay ignored. A
    handler of C code cannot be restored, so its signal has the default action afterwards. Python allows signal handlers
    only in the main thread, so this context does nothing in other threads.
    """
    is_main = threading.current_thread() is threading.main_thread()
    caught = [number for number in numbers if is_main and signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, signal.SIG_DFL if previous_handler is None else previous_handler)


def die_with_parent(number: int, parent: int | None = None) -> None:
    """Tell the kernel to send this process a signal when the thread that started it ends, however it ends.

    Args:
        number: The signal, e.g. SIGKILL.
        parent: PID of the parent, if known. If the parent has already died, this process exits with code 1.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def start_time_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot. Raises OSError if it has ended."""
    status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(status.rpartition(")")[2].split()[19])  # field 22 of proc(5); the command in parentheses may have spaces
