"""How long a run takes, counted in two ways. Linux only, as the project is."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Clock:
    """`training_s`: whitening, epochs and the last evaluation, as the CIFAR-10 speedruns are compared.

    What is counted holds no compilation (train.warm_up comes before) and no loading, logging or saving.
    """

    def __init__(self) -> None:
        self._begun_s = command_start_s()
        self.training_s = 0.0

    def add(self, seconds: float) -> None:
        self.training_s += seconds

    def __enter__(self) -> None:
        """What runs inside of `with clock:` is counted; it must end with the device waited for."""
        self._entered_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.add(time.perf_counter() - self._entered_s)

    @property
    def command_s(self) -> float:
        """Since the command was started: interpreter, imports and, under torchrun, its own start-up included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._begun_s


def command_start_s() -> float:
    """When this process, or the torchrun that started it, began, on the clock that counts from the machine's start."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in clock ticks
