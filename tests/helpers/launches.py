"""Launch torchrun and kill its processes, and run the same training without interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from helpers.ranks import Ended, end_of
from helpers.training import CLEAN, DIGITS, ROOT
from train import ddp
from train.distributed import launcher
from train.distributed.process_group import Ranks
from train.reporting import figures

STEPS_PER_EPOCH = 44  # 1,437 samples in global batches of 32
NAME = "digits_lenet"  # of the run folder


def options_of(ranks: int, epochs: int) -> list[str]:
    """Return the settings of a short training: global batch 32, or slightly less if `ranks` does not divide it."""
    return [
        f"train.epochs={epochs}",
        "train.warmup_epochs=0",
        "train.lr=3e-3",
        "train.save_every_steps=5",
        f"data.batch_size={32 // ranks}",
        "aug.flip=0.5",
        "model.drop_rate=null",
    ]


def arguments(data: Path, output: Path, ranks: int, epochs: int, *more: str) -> list[str]:
    return [
        "--cfg",
        str(DIGITS),
        "--data-path",
        str(data),
        "--output",
        str(output),
        *more,
        "--opts",
        *options_of(ranks, epochs),
    ]


def train_here(ranks: Ranks, commands: list[list[str]]) -> int | None:
    """Run train/ddp.py as this rank, with its command line, without drawing curves."""
    figures.save = lambda *_: None  # type: ignore[assignment]  # in this process only
    launcher.SHUTDOWN_GRACE_S = 1.0
    sys.argv = ["train/ddp.py", *commands[ranks.rank]]
    return ddp.main()


def run_unbroken(data: Path, output: Path, ranks: int, epochs: int) -> Path:
    """Train without interruption and return the run folder."""
    ended = end_of(ranks, train_here, output.parent, [arguments(data, output, ranks, epochs)] * ranks, timeout_s=300)
    assert ended.codes == [0] * ranks, ended.printed
    return output / NAME


def end_of_commands(folder: Path, commands: list[list[str]]) -> Ended:
    """Run train/ddp.py with a command line for each rank, without torchrun."""
    return end_of(len(commands), train_here, folder, commands)


class Launch:
    """Context in which a torchrun runs. Its output goes to a file."""

    def __init__(self, folder: Path, launcher: list[str], command: list[str], **environment: str) -> None:
        number = len(list(folder.glob("printed*.txt")))
        self._printed = folder / f"printed{number}.txt"
        self._file = self._printed.open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train" / "ddp.py"), *command],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**CLEAN, **environment},
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._file.close()

    @property
    def printed(self) -> str:
        return self._printed.read_text()

    def workers(self) -> dict[int, int]:
        """Return the process ids of the running ranks."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, ValueError, StopIteration):
                if int(status.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    variables = (status.parent / "environ").read_bytes().decode(errors="replace").split("\0")
                    rank = next(one for one in variables if one.startswith("RANK="))
                    found[int(rank.removeprefix("RANK="))] = int(status.parent.name)
        return found

    def kill_rank(self, rank: int, signum: int = signal.SIGKILL) -> bool:
        """Send a signal to a rank; return True if it was running."""
        if (pid := self.workers().get(rank)) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
        return True

    def kill_all(self) -> None:
        """Kill the agent, then its ranks, so that it starts no new ones."""
        workers = self.workers()
        self.process.kill()
        for pid in workers.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        """Return the exit code; fail after `timeout_s`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s; printed so far: {self.printed}") from None


def saved_steps(folder: Path) -> int:
    """Return the number of optimizer steps in the last checkpoint; -1 without one."""
    try:
        position = torch.load(folder / "last.pt", weights_only=True)["position"]
    except FileNotFoundError:
        return -1
    return int(position["epoch"] * STEPS_PER_EPOCH + position["step"])


def wait_until(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.02)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Compare last.pt of two runs at the same position, bitwise."""
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (ours, theirs))
    assert one["position"] == other["position"]
    assert [name for name in other["model"] if not torch.equal(one["model"][name], other["model"][name])] == []
