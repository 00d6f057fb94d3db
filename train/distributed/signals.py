"""Handle signals that ask a run to stop. The handlers set a flag that the training loop reads between steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.utils.errors import UserError
from configs.utils.process import die_with_parent, handle_signals

# SIGTERM: from a scheduler, or from torchrun when it stops; SIGINT: Ctrl-C; SIGUSR1: Slurm's warning (--signal=USR1);
# SIGHUP: the terminal was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SUBREAPERS = (b"systemd", b"tini", b"dumb-init", b"conmon", b"containerd-shim")
REPEATED_SIGINT_S = 1.0  # the terminal and torchrun may both send SIGINT at once; a later one is a second Ctrl-C


class Preempted(Exception):
    """Raised when a run stops because of a signal, after the checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # shell convention


@dataclass
class PendingSignal:
    """The number of the first signal that arrived, or 0."""

    number: int = 0


@contextmanager
def catch_signals() -> Iterator[PendingSignal]:
    """Keep SIGNALS from ending the process, and record the first one that arrives in the yielded object.

    A Ctrl-C more than REPEATED_SIGINT_S after the first signal raises KeyboardInterrupt. Ignored signals stay ignored,
    and in threads other than the main thread, this context does nothing.
    """
    pending, first_s = PendingSignal(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if pending.number == 0:
            pending.number, first_s = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first_s > REPEATED_SIGINT_S:
            signal.default_int_handler(number, frame)

    with handle_signals(SIGNALS, handle):
        yield pending


def die_with_launcher() -> None:
    """Tell the kernel to send this process SIGTERM when its torchrun dies, even if torchrun is killed by SIGKILL.

    Otherwise the ranks would continue running, and keep their GPUs and the lock of the run folder. Without torchrun,
    this function does nothing.

    Raises:
        UserError: torchrun has already died.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)
        if is_reparented(os.getppid()):
            raise UserError("torchrun, which started this rank, was killed before the rank was ready; start it again")


def is_reparented(parent: int, proc: Path = Path("/proc")) -> bool:
    """Return True if the process with PID `parent` is init or a subreaper, i.e. the launcher has died.

    PID 1 does not count if it is torchrun itself, as in a container. `proc` is the mount point of procfs.
    """
    command = name = b""
    with suppress(OSError):  # /proc may hide the processes of other users
        command = (proc / str(parent) / "cmdline").read_bytes()
        name = (proc / str(parent) / "comm").read_bytes().strip()
    if parent != 1:
        return name in SUBREAPERS
    return b"python" not in command and b"torchrun" not in command
