"""Run an entry point on several ranks. If one rank fails, all ranks exit with a clear error.

The rank that failed first prints its error. Every other rank prints why it stopped, unless it failed with the same
`UserError`. Ranks that raised the `UserError` that ended the run exit with code 2. All other ranks that failed or
stopped exit with code 1. Every wait has a time limit.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from configs.utils.errors import UserError, flush_streams, print_error, printable, run_main
from train.distributed import process_group
from train.distributed.failure_channel import Failure, FailureChannel, connect
from train.distributed.process_group import Ranks
from train.distributed.signals import die_with_launcher

# Time for a rank to end by itself after another rank failed, so that it can finish its log and trackers. With NCCL, a
# rank is blocked in a collective anyway, and the first rank that exits makes NCCL abort the others. So GPU ranks wait
# less, and the rank that failed exits last.
SHUTDOWN_GRACE_S = 10.0
GPU_SHUTDOWN_GRACE_S = 2.0
GPU_EXIT_DELAY_S = 3.0
CAUSE_TIMEOUT_S = 3.0  # for the cause of a broken connection to arrive
JOIN_WARNING_S = 60.0  # then missing ranks are named but still awaited, as slow imports can take minutes
JOIN_TIMEOUT_S = 30.0  # a failed rank waits this long for ranks that are still starting, to tell them
STOPPED_DELAY_S = 0.3  # so that the error of the first rank is printed before the lines of stopped ranks

LOST = "was lost without an error"
LOST_CAUSE = "it was probably killed (out of memory?) or crashed"
LOST_CONNECTION = "lost the connection to another rank, which was probably killed (out of memory?) or crashed"


def run_distributed(main: Callable[[], int | None]) -> None:
    """Run an entry point with `run_main`, possibly as one of several ranks. If any rank fails, all ranks end.

    SystemExit and Ctrl-C do not count as failures, and are not reported to other ranks.
    """

    def run() -> int | None:
        die_with_launcher()
        ranks = Ranks.from_environment()
        if ranks.world_size == 1:
            return _run_alone(main)
        if not ranks.is_first:
            warnings.simplefilter("ignore")  # rank 0 prints them
        _exit_without_finalization(RankSupervisor(ranks).run(main))

    run_main(run, is_result_printed=False)


def _run_alone(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except Exception as error:
        _write_torchrun_error(_error_line(error))
        raise


def _exit_without_finalization(code: int | None) -> NoReturn:
    """Run Python's exit handlers and end the process without finalizing Python.

    After a DistributedDataParallel has been created, gloo's threads outlive `destroy_process_group`. If one of them
    releases a tensor during finalization, the process aborts (https://github.com/pytorch/pytorch/issues/190489).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads
    atexit._run_exitfuncs()
    flush_streams()
    os._exit(code or 0)


class RankSupervisor:
    """Runs an entry point on this rank, and ends this rank if any rank fails.

    The rank waits for the others, runs, and then succeeds, fails, or is stopped because another rank failed first. Both
    the main thread and the thread that is notified of a failure may end the process. The first one to acquire
    `_exit_lock`, which is never released, does so.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._exit_lock = threading.Lock()
        self._channel: FailureChannel | None = None  # None before this rank has connected
        self._has_ended = threading.Event()
        self._is_terminating = False  # torchrun sent SIGTERM while this rank was ending

    def run(self, main: Callable[[], int | None]) -> int | None:
        """Run `main` and return its exit code. If any rank fails, exit the process instead."""
        timeout_s = process_group.GROUP_TIMEOUT.total_seconds()
        threading.Thread(target=self._warn_missing, args=(timeout_s,), daemon=True).start()
        try:
            store = process_group.open_store(self._ranks)
            self._channel = connect(self._ranks, store, os.environ["MASTER_ADDR"], self._on_peer_failure, timeout_s)
            os.environ[process_group.LAUNCH_ID_VARIABLE] = self._channel.launch_id
            code = main()
        except Exception as error:
            self._exit_failed(error)
        else:
            if (first := self._channel.first_failure()) is not None:
                self._exit_lock.acquire()
                self._exit_stopped(first)
            return code
        finally:  # also after SystemExit and Ctrl-C
            self._has_ended.set()
            if self._channel is not None:
                self._channel.close()

    def _warn_missing(self, timeout_s: float) -> None:
        """Warn if ranks have not started within JOIN_WARNING_S. Only rank 0 warns, or rank 1 if rank 0 is late."""
        if self._has_ended.wait(JOIN_WARNING_S) or self._exit_lock.locked() or self._ranks.rank > 1:
            return
        missing = self._channel.missing_ranks() if self._channel is not None else None  # None: unknown
        if missing != []:
            others = f"rank {', '.join(map(str, missing))}" if missing else "other ranks"
            print_error(
                f"warning: rank {self._ranks.rank} has waited {JOIN_WARNING_S:.0f} s for {others} to start (killed, or "
                f"slow?), and waits up to {timeout_s / 60:.3g} minutes"
            )

    def _on_peer_failure(self, first: Failure) -> None:
        """End this rank after a grace period, because another rank failed first.

        This method is called in a separate thread, since the main thread may be blocked in a collective forever.
        """
        if first.is_lost and self._ranks.rank == (1 if first.rank == 0 else 0):  # only one rank prints this
            print_error(f"rank {first.rank} {LOST}: {LOST_CAUSE}; {_resume_advice()}")
        time.sleep(GPU_SHUTDOWN_GRACE_S if torch.cuda.is_initialized() else SHUTDOWN_GRACE_S)
        self._exit_lock.acquire()
        self._exit_stopped(first)

    def _exit_failed(self, error: Exception) -> NoReturn:
        """End this rank after an error in its main thread."""
        self._exit_lock.acquire()
        # torchrun sends SIGTERM as soon as any of its ranks ends
        signal.signal(signal.SIGTERM, self._on_sigterm)
        failure = Failure(self._ranks.rank, self._summarize(error), isinstance(error, UserError))
        first = self._channel.report_failure(failure) if self._channel is not None else failure
        if first == failure:
            self._exit(2 if failure.is_user_error else 1, _error_text(error, failure), failure.summary)
        if first.is_user_error and failure.is_user_error and first.summary == failure.summary:
            self._exit(2, None, failure.summary, is_consequence=True)  # the same error on all ranks is printed once
        time.sleep(STOPPED_DELAY_S)
        if not process_group.is_lost_peer(error):
            print_error(f"rank {failure.rank} failed as well: {failure.summary}")
        self._exit_stopped(first)

    def _summarize(self, error: Exception) -> str:
        """Return one line about an error, without naming this rank."""
        if not process_group.is_lost_peer(error):
            return _error_line(error)
        if self._channel is not None and (first := self._channel.first_failure(CAUSE_TIMEOUT_S)) is not None:
            return f"stopped with rank {first.rank}"
        if process_group.is_timeout(error):
            minutes = process_group.GROUP_TIMEOUT.total_seconds() / 60
            return f"waited {minutes:.3g} minutes for another rank, which is stopped or hangs"
        return LOST_CONNECTION

    def _exit_stopped(self, first: Failure) -> NoReturn:
        """End this rank because another rank failed first."""
        reason = f"stopped because rank {first.rank} {LOST if first.is_lost else f'failed: {first.summary}'}"
        self._exit(1, f"rank {self._ranks.rank} {reason}", reason, is_consequence=True)

    def _exit(self, code: int, text: str | None, summary: str, *, is_consequence: bool = False) -> NoReturn:
        """End this process. Every rank that does not succeed ends here, while its thread holds `_exit_lock`.

        Python's exit handlers do not run, since they may wait for lost ranks.

        Args:
            code: The exit code.
            text: What to print on stderr.
            summary: One line for torchrun.
            is_consequence: Whether another rank failed first.
        """
        if text is not None:
            print_error(text)
        _write_torchrun_error(summary, is_consequence=is_consequence)
        self._wait_for_others()
        if not is_consequence and torch.cuda.is_initialized():
            time.sleep(GPU_EXIT_DELAY_S)
        flush_streams()
        os._exit(code)

    def _wait_for_others(self) -> None:
        """On rank 0, wait up to JOIN_TIMEOUT_S for ranks that are still starting, so that they learn of the failure.

        Stop waiting if torchrun sends SIGTERM, since the missing ranks will then never connect.
        """
        end = time.monotonic() + JOIN_TIMEOUT_S
        while self._channel is not None and time.monotonic() < end and not self._is_terminating:
            if self._channel.all_connected(0.1):
                return

    def _on_sigterm(self, *_: object) -> None:
        self._is_terminating = True


def _error_line(error: Exception) -> str:
    """Return one line about an error: the message of a UserError, or the type and message of any other error."""
    if isinstance(error, UserError):
        return printable(str(error))
    return traceback.format_exception_only(error)[0].strip().split("\n")[0]


def _error_text(error: Exception, failure: Failure) -> str:
    """Return what the first rank to fail prints."""
    if failure.is_user_error:
        return f"error: {failure.summary} (rank {failure.rank})"
    if process_group.is_lost_peer(error):
        return f"rank {failure.rank} {failure.summary}; {_resume_advice()}"
    return f"rank {failure.rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"


def _resume_advice() -> str:
    """Return advice, for an error message, on how to resume after a process was killed."""
    counts = [os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if all(map(str.isdecimal, counts)) and int(counts[0]) < int(counts[1]):
        return "torchrun restarts all ranks"
    return "resume with --resume auto; torchrun --max-restarts=3 restarts and resumes by itself"


def _write_torchrun_error(message: str, *, is_consequence: bool = False) -> None:
    """Write the file from which torchrun reads the reason for a failure.

    torchrun takes the failure with the earliest timestamp, in seconds, as the cause. A rank that stopped because of
    another rank (`is_consequence`) therefore writes a later timestamp.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            timestamp = int(time.time()) + (2 if is_consequence else 0)
            Path(path).write_text(json.dumps({"message": message, "timestamp": timestamp}), encoding="utf-8")
