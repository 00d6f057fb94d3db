"""The failure channel, with ranks as threads of one process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from torch.distributed import HashStore

from configs.utils.errors import UserError
from train.distributed.failure_channel import ADDRESS_KEY, Failure, FailureChannel, connect
from train.distributed.process_group import Ranks

HERE = "127.0.0.1"


def ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, rank, world_size, world_size)


class Group:
    """A channel for each rank, and the failures that its callback received."""

    def __init__(self, world_size: int, store: HashStore) -> None:
        self.called: list[list[Failure]] = [[] for _ in range(world_size)]
        self.channels = [
            connect(ranks(rank, world_size), store, HERE, self.called[rank].append, timeout_s=10)
            for rank in range(world_size)
        ]
        self.channels[0].all_connected(10)


@contextmanager
def group(world_size: int, store: HashStore | None = None) -> Iterator[Group]:
    with ExitStack() as stack:
        made = Group(world_size, store or HashStore())
        for channel in made.channels:
            stack.callback(channel.close)
        yield made


def die(channel: FailureChannel) -> None:
    """Close the connection, as the kernel does for a killed process."""
    connection = channel._connections[0]
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("rank", [0, 2])
def test_failure_reaches_all_ranks_and_calls_only_others(rank: int) -> None:
    with group(4) as made:
        failure = Failure(rank, "no shard 7", is_user_error=True)
        assert made.channels[rank].report_failure(failure) == failure
        assert [channel.first_failure(5) for channel in made.channels] == [failure] * 4
        for other in set(range(4)) - {rank}:
            wait_for(lambda other=other: made.called[other])
        assert made.called == [[] if at == rank else [failure] for at in range(4)]


def wait_for(holds: object) -> None:
    for _ in range(500):
        if holds():  # type: ignore[operator]
            return
        threading.Event().wait(0.01)


def test_simultaneous_failures_yield_one_first_failure() -> None:
    with group(6) as made:
        answers: list[Failure] = []
        begin = threading.Barrier(6)

        def fail(rank: int) -> None:
            begin.wait()
            answers.append(made.channels[rank].report_failure(Failure(rank, f"error {rank}")))

        threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 6
        assert len({answer.rank for answer in answers}) == 1
        assert len({channel.first_failure(5) for channel in made.channels}) == 1


def test_lost_rank_is_reported_and_closed_rank_is_not() -> None:
    with group(4) as made:
        made.channels[1].close()
        assert made.channels[0].first_failure(0.2) is None
        die(made.channels[3])
        for at in (0, 2):
            failure = made.channels[at].first_failure(5)
            assert failure is not None
            assert (failure.rank, failure.is_lost) == (3, True)
        assert made.called[1] == []


def test_lost_rank_0_is_noticed_and_closed_is_not() -> None:
    with group(3) as made:
        made.channels[0].close()
        assert [channel.first_failure(0.2) for channel in made.channels] == [None] * 3
    with group(3) as made:
        with made.channels[0]._lock:  # a lost rank sends nothing
            for connection in made.channels[0]._connections.values():
                connection.shutdown(socket.SHUT_RDWR)
        failures = [made.channels[at].first_failure(5) for at in (1, 2)]
        assert [(failure.rank, failure.is_lost) for failure in failures if failure] == [(0, True)] * 2


def test_late_rank_learns_of_an_earlier_failure() -> None:
    store, called = HashStore(), []
    first = connect(ranks(0, 3), store, HERE, called.append, timeout_s=10)
    failure = first.report_failure(Failure(0, "no config"))
    assert first.missing_ranks() == [1, 2]
    late = connect(ranks(2, 3), store, HERE, called.append, timeout_s=10)
    wait_for(lambda: first.missing_ranks() == [1])
    assert (first.missing_ranks(), late.missing_ranks()) == ([1], [])
    assert late.first_failure(5) == failure
    for channel in (late, first):
        channel.close()


def test_address_of_an_earlier_launch_is_ignored() -> None:
    """torchrun keeps the store over restarts, so its address may be free, or belong to another program."""
    store = HashStore()
    with socket.create_server((HERE, 0)) as stranger:
        gone = stranger.getsockname()[1]
    store.set(ADDRESS_KEY, f"{gone} earlier")
    with socket.create_server((HERE, 0)) as stranger:
        found: list[FailureChannel] = []
        thread = threading.Thread(
            target=lambda: found.append(connect(ranks(1, 2), store, HERE, lambda _: None, timeout_s=20))
        )
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        store.set(ADDRESS_KEY, f"{stranger.getsockname()[1]} earlier")
        connection, _ = stranger.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\n")
        first = connect(ranks(0, 2), store, HERE, lambda _: None, timeout_s=10)
        thread.join(20)
        connection.close()
    assert found[0].launch_id == first.launch_id != "earlier"
    for channel in (*found, first):
        channel.close()


def test_connection_without_launch_id_is_ignored() -> None:
    store = HashStore()
    with group(2, store) as made:
        port = int(store.get(ADDRESS_KEY).split()[0])
        for sent in (b"", b"GET / HTTP/1.1\n\n", b'guess 1\n{"rank": 1, "summary": "error"}\n', b"x" * 300_000):
            with suppress(ConnectionError), socket.create_connection((HERE, port)) as stranger:
                stranger.sendall(sent)
        assert made.channels[0].first_failure(0.3) is None
        failure = Failure(1, "a real one")
        assert made.channels[1].report_failure(failure) == failure


def test_missing_rank_0_is_an_error_with_its_address() -> None:
    with pytest.raises(
        UserError, match=r"rank 0 did not answer at 127\.0\.0\.1 within 0 s; check whether it was started"
    ):
        connect(ranks(1, 2), HashStore(), HERE, lambda _: None, timeout_s=0.1)
