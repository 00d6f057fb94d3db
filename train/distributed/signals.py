"""Signals that ask a run to end: a flag, set at once and looked at between steps. Knows no ranks and no files."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from configs.utils.errors import UserError

# SIGTERM: a scheduler's, and torchrun's when it ends; SIGINT: Ctrl-C; SIGUSR1: Slurm's warning, as --signal=USR1 asks;
# SIGHUP: the terminal is gone
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux
SUBREAPERS = (b"systemd", b"tini", b"dumb-init", b"conmon", b"containerd-shim")
REPEATED_SIGINT_S = 1.0  # Ctrl-C may come twice at once, from the terminal and from torchrun; later, it is meant


class Preempted(Exception):
    """The run has ended early, as a signal asked for, with a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as shells report it


@dataclass
class PendingSignal:
    """signal: the number of the first signal that came; 0: none."""

    signal: int = 0


@contextmanager
def catch_signals() -> Iterator[PendingSignal]:
    """Inside, the signals set the flag instead of ending the process; Ctrl-C a second time ends it at once.

    Python handles signals in the main thread alone: in any other, nothing listens.
    """
    pending, first_s = PendingSignal(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if pending.signal == 0:
            pending.signal, first_s = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first_s > REPEATED_SIGINT_S:
            signal.default_int_handler(number, frame)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # what is ignored, as SIGINT is in a shell's background, stays so
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_launcher() -> None:
    """Have the system send this process SIGTERM once the torchrun that started it is gone, however it went.

    Its ranks would else train on, keep their GPUs, and hold the run's folder. Raises UserError where it is gone
    already.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if is_reparented(os.getppid()):
            raise UserError("torchrun, which started this rank, was killed before the rank was ready; start it again")


def is_reparented(parent: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process of this parent has got it because its own one is gone: the system's first process, which in a
    container may be torchrun itself, or one that takes over the orphans of a user or a container."""
    command = name = b""
    with suppress(OSError):  # another user's, where they are hidden
        command = (proc / str(parent) / "cmdline").read_bytes()
        name = (proc / str(parent) / "comm").read_bytes().strip()
    if parent != 1:
        return name in SUBREAPERS
    return b"python" not in command and b"torchrun" not in command
