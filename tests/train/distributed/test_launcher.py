"""A failing rank ends all ranks: exit codes and output, in groups of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.utils.errors import UserError
from helpers.ranks import end_of
from helpers.training import CLEAN, ROOT, free_port
from train.distributed import collectives, launcher, process_group
from train.distributed.launcher import run_distributed
from train.distributed.process_group import Ranks


def sums_forever() -> None:
    while True:
        collectives.sum_over_ranks(torch.ones(1))


def one_raises(ranks: Ranks, rank: int, error: Exception, in_group: bool) -> None:
    """Raise on one rank while the others wait for it, in a collective or to create the group."""
    if not in_group:
        launcher.SHUTDOWN_GRACE_S = 3.0  # of this process
        if ranks.rank == rank:
            raise error
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        if ranks.rank == rank:
            raise error
        sums_forever()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "in_group"), [(2, True), (0, True), (1, False)])
def test_user_error_on_one_rank_ends_all_ranks(rank: int, in_group: bool, tmp_path: Path) -> None:
    ended = end_of(3, one_raises, tmp_path, rank, UserError("shard 7 is short"), in_group)
    assert [ended.codes[rank], *sorted(set(ended.codes))] == [2, 1, 2]
    assert ended.lines[0] == f"error: shard 7 is short (rank {rank})"
    others = [other for other in range(3) if other != rank]
    stopped = [f"rank {other} stopped because rank {rank} failed: shard 7 is short" for other in others]
    assert sorted(ended.lines[1:]) == stopped


def test_other_errors_are_printed_with_one_traceback(tmp_path: Path) -> None:
    ended = end_of(3, one_raises, tmp_path, 1, ZeroDivisionError("of images by nothing"), True)
    assert ended.codes == [1, 1, 1]
    assert ended.lines[:2] == ["rank 1 failed:", "Traceback (most recent call last):"]
    assert ended.printed.count("Traceback") == 1
    assert ended.lines[-3] == "ZeroDivisionError: of images by nothing"
    why = "stopped because rank 1 failed: ZeroDivisionError: of images by nothing"
    assert sorted(ended.lines[-2:]) == [f"rank 0 {why}", f"rank 2 {why}"]


def all_raise(ranks: Ranks, differ: bool) -> None:
    launcher.STOPPED_DELAY_S = 2.0  # of this process
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        raise UserError(f"the loss is not finite{f' on {ranks.rank}' if differ else ''}")


def test_same_error_on_all_ranks_is_printed_once(tmp_path: Path) -> None:
    ended = end_of(3, all_raise, tmp_path, False)
    assert ended.codes == [2, 2, 2]
    assert len(ended.lines) == 1
    assert ended.lines[0].startswith("error: the loss is not finite (rank ")


def test_different_errors_are_all_printed(tmp_path: Path) -> None:
    ended = end_of(2, all_raise, tmp_path, True)
    assert sorted(ended.codes) == [1, 2]
    first = ended.codes.index(2)
    assert ended.lines == [
        f"error: the loss is not finite on {first} (rank {first})",
        f"rank {1 - first} failed as well: the loss is not finite on {1 - first}",
        f"rank {1 - first} stopped because rank {first} failed: the loss is not finite on {first}",
    ]


def one_is_killed(ranks: Ranks, rank: int, busy_s: float) -> None:
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        if ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(busy_s)
        sums_forever()


@pytest.mark.parametrize("rank", [0, 2])
def test_killed_rank_is_named_by_all_others(rank: int, tmp_path: Path) -> None:
    ended = end_of(3, one_is_killed, tmp_path, rank, 0.0)
    assert [ended.codes[rank], *sorted(set(ended.codes))] == [-9, -9, 1]
    assert ended.lines[0].startswith(f"rank {rank} was lost without an error: it was probably killed (out of mem")
    assert "resume with --resume auto" in ended.lines[0]
    stopped = [
        f"rank {other} stopped because rank {rank} was lost without an error" for other in range(3) if other != rank
    ]
    assert sorted(ended.lines[1:]) == stopped


def test_busy_rank_is_stopped_as_well(tmp_path: Path) -> None:
    ended = end_of(2, with_short_grace, tmp_path)
    assert ended.codes == [-9, 1]
    assert ended.lines[-1] == "rank 1 stopped because rank 0 was lost without an error"


def with_short_grace(ranks: Ranks) -> None:
    launcher.SHUTDOWN_GRACE_S = 0.5  # of this process
    one_is_killed(ranks, 0, 1000)


def one_is_stopped(ranks: Ranks) -> None:
    """Stop one rank, so that it neither answers nor ends."""
    process_group.GROUP_TIMEOUT = timedelta(seconds=6)  # of this process
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        sums_forever()


@pytest.mark.slow
def test_stopped_rank_is_awaited_until_the_group_timeout(tmp_path: Path) -> None:
    ended = end_of(3, one_is_stopped, tmp_path, stopped=1)
    assert ended.codes == [1, -9, 1]
    assert "waited 0.1 minutes for another rank, which is stopped or hangs; resume with --resume auto" in ended.lines[0]
    assert len(ended.lines) == 2


def exits(ranks: Ranks, code: int) -> int:
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        if ranks.rank == 0:
            time.sleep(0.5)  # the others have closed the channel by then
        if code == 143:
            sys.exit(code)
        return code


@pytest.mark.parametrize("code", [0, 130, 143])
def test_ranks_that_end_together_keep_their_exit_code(code: int, tmp_path: Path) -> None:
    ended = end_of(3, exits, tmp_path, code)
    assert ended.codes == [code] * 3
    assert ended.printed == ""


def test_rank_0_may_finish_before_the_others(tmp_path: Path) -> None:
    ended = end_of(2, last_rank_is_slow, tmp_path)
    assert (ended.codes, ended.printed) == ([0, 0], "")


def last_rank_is_slow(ranks: Ranks) -> None:
    with process_group.process_group(ranks):
        collectives.sum_over_ranks(torch.ones(1))
        time.sleep(ranks.rank)


def test_torchrun_error_file_dates_cause_before_consequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = int(time.time())

    def fail() -> int:
        raise UserError("no such file")

    with pytest.raises(SystemExit) as stopped:
        run_distributed(fail)
    assert stopped.value.code == 2
    cause = json.loads((tmp_path / "error.json").read_text())
    assert cause["message"] == "no such file"
    launcher._write_torchrun_error("stopped", is_consequence=True)
    assert json.loads((tmp_path / "error.json").read_text())["timestamp"] > cause["timestamp"] >= before


def test_missing_rank_0_is_reported_with_its_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_group, "GROUP_TIMEOUT", timedelta(seconds=1))
    names = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name, value in {**names, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), sys.exit(code)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        run_distributed(lambda: pytest.fail("main was called"))
    assert codes == [2]
    assert "rank 1 of 2 found no rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT=1 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "missing", "who"),
    [(0, [2, 5], "rank 2, 5"), (0, None, "other ranks"), (1, None, "other ranks"), (0, [], None), (2, None, None)],
)
def test_missing_ranks_are_named(
    rank: int,
    missing: list[int] | None,
    who: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher, "JOIN_WARNING_S", 0.1)
    supervisor = launcher.RankSupervisor(Ranks(rank, rank, 6, 6))
    if missing is not None:
        monkeypatch.setattr(supervisor, "_channel", SimpleNamespace(missing_ranks=lambda: missing))
    supervisor._warn_missing(600.0)
    said = f"warning: rank {rank} has waited 0 s for {who} to start (killed, or slow?), and waits up to "
    assert capsys.readouterr().err == (f"{said}10 minutes\n" if who else "")


@contextmanager
def both_ranks(script: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a script as two ranks without torchrun, and kill those that still run at the end."""
    common = {**CLEAN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


LATE = """
import os, time
from train.distributed import collectives, launcher
from train.distributed.process_group import Ranks, process_group

def main():
    with process_group(Ranks.from_environment()):
        collectives.from_all_ranks(0)

launcher.JOIN_WARNING_S = 1.0
time.sleep(4 * int(os.environ["RANK"]))
launcher.run_distributed(main)
"""


@pytest.mark.slow
def test_late_rank_triggers_warning_and_is_awaited() -> None:
    """The warning comes from a thread while torch waits for all ranks, and the run succeeds."""
    with both_ranks(LATE) as ranks:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert "warning: rank 0 has waited 1 s for other ranks to start" in errors[0]


TENSOR_RELEASED_AT_EXIT = """
import atexit, ctypes, os, sys, time

# gloo's thread waits for the GIL from second 3, when rank 1 joins the reduction, and checks for finalization 3 s later.
# The main thread keeps the GIL until second 4 in an exit handler, and then until second 7 during finalization.
class HoldsGil:
    def __del__(self, sleep=ctypes.PyDLL(None).sleep):  # does not release the GIL
        sleep(3)

def hold_gil():  # registered first, so called last
    sys.setswitchinterval(3)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        pass

rank = int(os.environ["RANK"])
if rank == 0:
    atexit.register(hold_gil)
    atexit.register(lambda: print(", exit handler", end=""))
    finalized = HoldsGil()  # deleted during finalization

import torch
from torch import distributed as dist
from train.distributed import launcher

def main():
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 0:
        dist.all_reduce(torch.ones(1), async_op=True)  # waits for rank 1, then releases the tensor
    else:
        time.sleep(3)
        dist.all_reduce(torch.ones(1))
    print("done", end="")

launcher.run_distributed(main)
"""


@pytest.mark.slow
def test_gloo_may_release_a_tensor_while_a_rank_exits() -> None:
    """A thread of gloo that waits for the GIL while Python is finalized aborts the process."""
    with both_ranks(TENSOR_RELEASED_AT_EXIT) as ranks:
        printed = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert [stdout for stdout, _ in printed] == ["done, exit handler", "done"]


def test_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 is set without RANK and LOCAL_RANK and LOCAL_WORLD_SIZE"):
        Ranks.from_environment()


def test_rank_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "-1", "LOCAL_RANK": "first", "WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"RANK=-1, LOCAL_RANK=first, WORLD_SIZE= must be whole numbers"):
        Ranks.from_environment()


def test_ranks_ended_by_torchrun_are_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 failed while others were starting, and torchrun stopped them meanwhile."""

    class NoRanks:
        def all_connected(self, timeout_s: float) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return False

    monkeypatch.setattr(launcher, "JOIN_TIMEOUT_S", 1000.0)
    supervisor = launcher.RankSupervisor(Ranks(0, 0, 2, 2))
    monkeypatch.setattr(supervisor, "_channel", NoRanks())
    before = signal.signal(signal.SIGTERM, supervisor._on_sigterm)
    try:
        supervisor._wait_for_others()
    finally:
        signal.signal(signal.SIGTERM, before)
