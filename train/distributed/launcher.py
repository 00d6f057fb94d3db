"""One bad rank, all ranks know: how a program of several ranks ends, what it prints, and with which exit code.

The rank that failed first shows its error; all others say in one line that they were stopped, and why. 2: the user can
mend it; 1: any other error, and every rank that was stopped. Whatever happens, no rank is waited for without bound.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from configs.utils.errors import UserError, printable, run_main
from train.distributed import process_group
from train.distributed.failure_channel import Failure, Lifeline, connect
from train.distributed.process_group import Ranks
from train.distributed.signals import end_with_torchrun

# What a rank is given to end by itself when another one failed: to finish its log and trackers. With NCCL it waits
# inside a collective anyhow, and the first rank to leave makes NCCL kill the others: so all are quick, and the rank
# that failed leaves last.
PATIENCE_S = 10.0
PATIENCE_ON_GPU_S = 2.0
LINGER_ON_GPU_S = 3.0
REPORT_S = 3.0  # how long the cause of a broken connection may take to become known
MISSED_S = 60.0  # after which ranks that have not come are named: slow disks import for minutes, so nothing ends yet
STARTING_S = 30.0  # how long a first rank that failed at once waits for ranks that are still starting, to tell them
AFTER_S = 0.3  # so that the line of a rank that was stopped comes after the error that stopped it

LOST = "ended without a word"
LIKELY = "as a process does that was killed (out of memory?) or crashed"
CUT_OFF = "lost the connection to another rank, which was probably killed (out of memory?) or crashed"


def run_ranks(main: Callable[[], int | None]) -> None:
    """Run an entry point as `run_main` does, on all ranks: an error on one of them ends them all.

    SystemExit and Ctrl-C are no errors, and are not told.
    """

    def run() -> int | None:
        end_with_torchrun()
        ranks = Ranks.from_environment()
        return _Ending(ranks).run(main) if ranks.world_size > 1 else _run_alone(main)

    run_main(run, is_result_printed=False)


def _run_alone(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except Exception as error:
        _tell_torchrun(str(error) if isinstance(error, UserError) else _summary(error))
        raise


class _Ending:
    """Of one rank; whoever has the last word, its main thread or the one that stops it, ends the process."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._last_word = threading.Lock()  # taken once
        self._lifeline: Lifeline | None = None
        self._has_come = threading.Event()  # everybody, or an end
        self._is_in_a_hurry = False

    def run(self, main: Callable[[], int | None]) -> int | None:
        waits_s = process_group.GROUP_TIMEOUT.total_seconds()
        threading.Thread(target=self._name_missing, args=(waits_s,), daemon=True).start()
        try:
            store, address = process_group.open_store(self._ranks)
            self._lifeline = connect(self._ranks, store, address, self._stop_soon, waits_s)
            os.environ[process_group.START] = self._lifeline.word
            code = main()
        except Exception as error:
            self._has_come.set()
            self._fail(error)
        except (SystemExit, KeyboardInterrupt):
            self._leave()
            raise
        if (first := self._lifeline.first_failure()) is not None:
            self._last_word.acquire()
            self._end_stopped(first)
        self._leave()
        return code

    def _name_missing(self, waits_s: float) -> None:
        """In a thread. Of all ranks that wait, the first says so, and the second where it waits for the first."""
        if self._has_come.wait(MISSED_S) or self._ranks.rank > 1:
            return
        missing = self._lifeline.missing() if self._lifeline is not None else None  # None: it is not known who
        if missing != []:
            others = f"rank {', '.join(map(str, missing))}" if missing else "others"
            _say(f"warning: rank {self._ranks.rank} has waited {MISSED_S:.0f} s for {others} to come (killed in "
                 f"starting, or slow?), and waits for up to {waits_s / 60:.3g} minutes")  # fmt: skip

    def _leave(self) -> None:
        self._has_come.set()
        if self._lifeline is not None:
            self._lifeline.leave()

    def _fail(self, error: Exception) -> NoReturn:
        """In the main thread, which an error has left with nothing to do."""
        self._last_word.acquire()
        signal.signal(signal.SIGTERM, self._hurry)  # torchrun sends it at once when any of its ranks ends
        failure = self._failure_of(error)
        first = self._lifeline.tell(failure) if self._lifeline is not None else failure
        if first == failure:
            self._show(error, failure)
            self._wait_for_others()
            if torch.cuda.is_initialized():
                time.sleep(LINGER_ON_GPU_S)
            _exit(2 if failure.is_user_error else 1)
        if first.is_user_error and failure.is_user_error and first.summary == failure.summary:
            _tell_torchrun(failure.summary, is_consequence=True)  # all ranks found the same, and one has said so
            _exit(2)
        time.sleep(AFTER_S)
        if not process_group.is_lost_peer(error):
            _say(f"rank {failure.rank} failed as well: {failure.summary}")
        self._end_stopped(first)

    def _failure_of(self, error: Exception) -> Failure:
        if isinstance(error, UserError):
            return Failure(self._ranks.rank, printable(str(error)), is_user_error=True)
        if not process_group.is_lost_peer(error):
            return Failure(self._ranks.rank, _summary(error))
        if self._lifeline is not None and (first := self._lifeline.first_failure(REPORT_S)) is not None:
            return Failure(self._ranks.rank, f"stopped with rank {first.rank}")
        if process_group.is_timeout(error):
            minutes = process_group.GROUP_TIMEOUT.total_seconds() / 60
            return Failure(
                self._ranks.rank, f"waited {minutes:.3g} minutes for another rank, which is stopped or hangs"
            )
        return Failure(self._ranks.rank, CUT_OFF)

    def _show(self, error: Exception, failure: Failure) -> None:
        """The error that stops all ranks."""
        if failure.is_user_error:
            _say(f"error: {failure.summary} (rank {failure.rank})")
        elif process_group.is_lost_peer(error):
            _say(f"rank {failure.rank} {failure.summary}; {_advice()}")
        else:
            _say(f"rank {failure.rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
        _tell_torchrun(failure.summary)

    def _wait_for_others(self) -> None:
        """Those that are still starting; where torchrun ends its ranks they will not come."""
        end = time.monotonic() + STARTING_S
        while self._lifeline is not None and time.monotonic() < end and not self._is_in_a_hurry:
            if self._lifeline.all_are_told(0.1):
                return

    def _hurry(self, *_: object) -> None:
        self._is_in_a_hurry = True

    def _stop_soon(self, first: Failure) -> None:
        """In a thread, when another rank failed: the main thread may wait for that rank in a collective for ever."""
        if first.is_lost and self._ranks.rank == (1 if first.rank == 0 else 0):  # one says at once what it could not
            _say(f"rank {first.rank} {LOST}, {LIKELY}; {_advice()}")
        time.sleep(PATIENCE_ON_GPU_S if torch.cuda.is_initialized() else PATIENCE_S)
        self._last_word.acquire()
        self._end_stopped(first)

    def _end_stopped(self, first: Failure) -> NoReturn:
        why = f"stopped, since rank {first.rank} {LOST if first.is_lost else f'failed: {first.summary}'}"
        _say(f"rank {self._ranks.rank} {why}")
        _tell_torchrun(why, is_consequence=True)
        self._wait_for_others()
        _exit(1)


def _summary(error: BaseException) -> str:
    return traceback.format_exception_only(error)[0].strip().split("\n")[0]


def _advice() -> str:
    """How a run goes on whose process was killed."""
    started, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if started < limit:
        return "torchrun starts all ranks again"
    return "go on with --resume auto; torchrun --max-restarts=3 goes on by itself"


def _say(text: str) -> None:
    """In one piece, since several ranks write to one place."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _tell_torchrun(message: str, *, is_consequence: bool = False) -> None:
    """Its report takes the failure with the earliest second for the cause, and what this file says for the reason."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            timestamp = int(time.time()) + (2 if is_consequence else 0)
            Path(path).write_text(json.dumps({"message": message, "timestamp": timestamp}), encoding="utf-8")


def _exit(code: int) -> NoReturn:
    """At once: what Python runs at its exit may wait for ranks that are gone."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
