"""The flag that signals set, in this process. Whole runs are in tests/faults."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.utils.errors import UserError
from train.distributed import signals
from train.distributed.signals import SIGNALS, Preempted, catch_signals, die_with_launcher, is_reparented


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Do not ignore SIGINT and SIGHUP, as the process that starts the tests may do."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_sets_the_flag_and_ends_nothing(number: signal.Signals) -> None:
    with catch_signals() as pending:
        assert pending.number == 0
        os.kill(os.getpid(), number)
        assert pending.number == number


def test_first_signal_counts() -> None:
    with catch_signals() as pending:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert pending.number == signal.SIGUSR1


def test_only_a_later_second_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with catch_signals() as pending:
        for _ in range(2):  # the terminal and torchrun send one each
            os.kill(os.getpid(), signal.SIGINT)
        assert pending.number == signal.SIGINT
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 2 * signals.REPEATED_SIGINT_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in SIGNALS]
    with catch_signals() as pending:
        os.kill(os.getpid(), signal.SIGINT)
        assert pending.number == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen: list[int] = []

    def listen() -> None:
        with catch_signals() as pending:
            seen.append(pending.number)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [0]


def test_reparenting_is_detected_unless_torchrun_is_pid_1(
    tmp_path: Path,
) -> None:
    for parent, command in ((1, "/sbin/init"), (7, "python3\0-m\0torch.distributed.run"), (8, "bash\0job.sh")):
        (tmp_path / str(parent)).mkdir()
        (tmp_path / str(parent) / "cmdline").write_text(command)
        (tmp_path / str(parent) / "comm").write_text(command.split("/")[-1].split("\0")[0] + "\n")
    assert [is_reparented(parent, tmp_path) for parent in (1, 7, 8)] == [True, False, False]
    (tmp_path / "1" / "cmdline").write_text("/usr/bin/python3\0/usr/local/bin/torchrun\0train/ddp.py")
    assert not is_reparented(1, tmp_path)
    (tmp_path / "8" / "comm").write_text("systemd\n")
    assert is_reparented(8, tmp_path)
    assert is_reparented(1, tmp_path / "hidden")


def test_rank_without_its_torchrun_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "is_reparented", lambda parent: True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    die_with_launcher()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(signals, "die_with_parent", lambda number: None)
    with pytest.raises(UserError, match="torchrun, which started this rank, was killed before the rank was ready"):
        die_with_launcher()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_exit_codes_follow_the_shell_convention(number: signal.Signals, code: int) -> None:
    assert Preempted(number).exit_code == code
    assert str(Preempted(number)) == f"stopped by {number.name}"
