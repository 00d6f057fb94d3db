"""Connect all ranks to rank 0, so that every rank learns immediately when another rank fails or is lost.

A killed rank cannot report anything, but the kernel closes its connection, so the ranks connected to it notice. torch's
store cannot do this: it does not watch its clients, and its host may be the machine that fails. `launcher` decides how
a rank reacts to a failure.

Each end of a connection first sends the line `LAUNCH_ID RANK`, rank 0 before the other rank. Each start or restart of
the ranks has a new launch id, so that stale processes from before a restart are ignored. The lines that follow are
failures as JSON, or null from a rank that leaves.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO

import torch.distributed as dist

from configs.utils.errors import UserError
from train.distributed.process_group import Ranks

ADDRESS_KEY = "zhu/failure_channel"
SEND_TIMEOUT_S = 2  # limit for a rank that does not read, and for a program at the address of an earlier rank 0
MAX_HELLO_BYTES = 100  # a longer first line is not from a rank
# A failed machine does not close its connections, so it counts as lost after about 55 s without an answer.
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 8}


@dataclass(frozen=True)
class Failure:
    """A failure of one rank."""

    rank: int
    summary: str  # one line
    is_user_error: bool = False
    is_lost: bool = False  # the connection ended without a message


class FailureChannel:
    """One rank's end of the failure channel.

    Rank 0 is connected to all other ranks. It decides which failure came first, and sends it to them. The other ranks
    are connected to rank 0 only.

    Args:
        ranks: Rank and world size of this process.
        on_failure: Called in a separate thread with the first failure of any rank, unless this rank failed first.
        launch_id: Identifies this start or restart of the ranks.
    """

    def __init__(self, ranks: Ranks, on_failure: Callable[[Failure], None], launch_id: str) -> None:
        self.launch_id = launch_id
        self._ranks, self._on_failure = ranks, on_failure
        self._expected = set(range(1, ranks.world_size)) if ranks.is_first else {0}
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._all_connected = threading.Event()
        self._first: Failure | None = None
        self._has_failed = threading.Event()
        self._lock = threading.Lock()
        self._is_closed = False

    def first_failure(self, timeout_s: float = 0.0) -> Failure | None:
        """Wait up to `timeout_s` for a failure, and return the first failure of any rank, or None if there is none."""
        self._has_failed.wait(timeout_s)
        return self._first

    def report_failure(self, failure: Failure, timeout_s: float = 5.0) -> Failure:
        """Report a failure of this rank to all ranks.

        Returns:
            The first failure that rank 0 has received, or `failure` if rank 0 does not answer within `timeout_s`.
        """
        if self._ranks.is_first:
            self._record(failure)
        else:
            _send(self._connections[0], failure)
        return self.first_failure(timeout_s) or failure

    def all_connected(self, timeout_s: float) -> bool:
        """On rank 0, wait up to `timeout_s` for ranks that are still starting. Return True if all are connected.

        Other ranks do not wait, and always return True.
        """
        return self._all_connected.wait(timeout_s)

    def missing_ranks(self) -> list[int]:
        """Return the ranks that have not connected to rank 0 yet. On other ranks, the list is always empty."""
        with self._lock:
            return sorted(self._expected - self._connections.keys())

    def close(self) -> None:
        """Leave the channel. The other ranks do not count this as a failure."""
        self._is_closed = True
        with self._lock:
            for connection in self._connections.values():
                _send(connection, None)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def accept(self, server: socket.socket) -> None:
        """On rank 0, accept connections of the other ranks until the channel is closed."""
        while not self._is_closed:
            with suppress(OSError):
                connection, _ = server.accept()
                threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError):  # it is not from a rank of this launch
            self.join(connection)

    def join(self, connection: socket.socket) -> None:
        """Add a connection to the channel, and listen to it in a separate thread.

        Raises:
            OSError, ValueError: The other end does not answer, or is not a rank of this launch.
        """
        try:
            hello, lines = f"{self.launch_id} {self._ranks.rank}\n".encode(), connection.makefile("rb")
            if self._ranks.is_first:
                connection.sendall(hello)
            launch_id, number = lines.readline(MAX_HELLO_BYTES).decode().split()
            if launch_id != self.launch_id or (rank := int(number)) not in self._expected:
                raise ValueError("a rank of another launch")
            if not self._ranks.is_first:  # not before: rank 0 would count a rank that gives up waiting as lost
                connection.sendall(hello)
            _set_options(connection)
        except (OSError, ValueError):
            connection.close()
            raise
        with self._lock:
            self._connections[rank] = connection
            if self._first is not None:
                _send(connection, self._first)
            if self._connections.keys() == self._expected:
                self._all_connected.set()
        threading.Thread(target=self._listen, args=(rank, lines), daemon=True, name="failure-channel").start()

    def _listen(self, rank: int, lines: BinaryIO) -> None:
        """Receive failures from a rank. If the connection ends without the rank leaving, the rank is lost."""
        has_left = False
        with suppress(OSError, ValueError):
            for line in lines:
                if (content := json.loads(line)) is None:
                    has_left = True
                else:
                    self._record(Failure(**content))
        if not has_left and not self._is_closed:
            self._record(Failure(rank, "", is_lost=True))

    def _record(self, failure: Failure) -> None:
        """If the failure is the first one, send it on from rank 0, and call `on_failure` unless it is this rank's."""
        with self._lock:
            if self._first is not None:
                return
            self._first = failure
            self._has_failed.set()
            if self._ranks.is_first:
                for connection in self._connections.values():
                    _send(connection, failure)
        if failure.rank != self._ranks.rank:
            threading.Thread(target=self._on_failure, args=(failure,), daemon=True).start()


def connect(
    ranks: Ranks, store: dist.Store, address: str, on_failure: Callable[[Failure], None], timeout_s: float
) -> FailureChannel:
    """Open the channel on this rank. Ranks other than 0 wait for rank 0.

    torchrun keeps its store across restarts, so the store may contain the port of an earlier rank 0. The other ranks
    retry until the current rank 0 answers.

    Args:
        ranks: Rank and world size of this process.
        store: Store through which rank 0 publishes its port and launch id.
        address: The host of rank 0.
        on_failure: Called in a separate thread with the first failure of any rank, unless this rank failed first.
        timeout_s: How long to wait for rank 0.

    Raises:
        UserError: Rank 0 does not answer in time.
    """
    if ranks.is_first:
        channel = FailureChannel(ranks, on_failure, uuid.uuid4().hex)
        server = _create_server(ranks.world_size)
        threading.Thread(target=channel.accept, args=(server,), daemon=True, name="failure-channel").start()
        store.set(ADDRESS_KEY, f"{server.getsockname()[1]} {channel.launch_id}")
        return channel
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if store.check([ADDRESS_KEY]):  # `get` would wait for the key
            port, launch_id = store.get(ADDRESS_KEY).decode().split()
            channel = FailureChannel(ranks, on_failure, launch_id)
            with suppress(OSError, ValueError):
                channel.join(socket.create_connection((address, int(port)), timeout=SEND_TIMEOUT_S))
                return channel
        time.sleep(0.05)
    raise UserError(
        f"rank 0 did not answer at {address} within {timeout_s:.0f} s; check whether it was started, and whether a "
        "firewall blocks connections between the machines"
    )


def _create_server(connections: int) -> socket.socket:
    """Listen on a free port on all network interfaces."""
    backlog = max(128, connections)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def _set_options(connection: socket.socket) -> None:
    """Let receiving wait forever, sending up to SEND_TIMEOUT_S, and detect failed machines."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(connection: socket.socket, failure: Failure | None) -> None:
    """Send a failure, or None to say that this rank leaves. If the other end is gone, do nothing."""
    with suppress(OSError):
        connection.sendall(json.dumps(failure and asdict(failure)).encode() + b"\n")
