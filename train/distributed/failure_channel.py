"""Connect all ranks to rank 0, so that every rank learns immediately when another rank fails or is lost.

A killed rank cannot report anything, but the kernel closes its connection, so the ranks connected to it notice.
`launcher` decides how a rank reacts to a failure. Messages are newline-delimited JSON. Each start or restart of the
ranks has a new launch id, so that stale processes from before a restart are ignored.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from configs.utils.errors import UserError
from train.distributed.process_group import Ranks

ADDRESS_KEY = "zhu/failure_channel"
SEND_TIMEOUT_S = 2.0  # limit for a rank that does not read
MAX_LINE_BYTES = 200_000  # a longer message is not from a rank
# A failed machine does not close its connections, so it counts as lost after about 55 s without an answer.
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 8}


class Store(Protocol):
    """Key-value store that all ranks share, with the methods of `torch.distributed.Store` that this module uses.

    `get` waits for a missing key, so call `check` first.
    """

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Failure:
    """A failure of one rank."""

    rank: int
    summary: str  # one line
    is_user_error: bool = False
    is_lost: bool = False  # the connection ended without a message


class FailureChannel:
    """One rank's end of the failure channel.

    Args:
        ranks: Rank and world size of this process.
        on_failure: Called in a separate thread with the first failure of any rank, unless this rank failed first.
        launch_id: Identifies this start or restart of the ranks.
    """

    def __init__(self, ranks: Ranks, on_failure: Callable[[Failure], None], launch_id: str) -> None:
        self.launch_id = launch_id
        self._ranks, self._on_failure = ranks, on_failure
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
        raise NotImplementedError

    def close(self) -> None:
        """Leave the channel. The other ranks do not count this as a failure."""
        raise NotImplementedError

    def all_connected(self, timeout_s: float) -> bool:
        """On rank 0, wait up to `timeout_s` for ranks that are still starting. Return True if all are connected.

        Other ranks do not wait, and always return True.
        """
        return True

    def missing_ranks(self) -> list[int]:
        """Return the ranks that have not connected to rank 0 yet. On other ranks, the list is always empty."""
        return []

    def _set_first(self, failure: Failure) -> None:
        """Store the first failure. If another rank failed, call `on_failure` in a separate thread.

        The caller must hold `_lock`.
        """
        self._first = failure
        self._has_failed.set()
        if failure.rank != self._ranks.rank:
            threading.Thread(target=self._on_failure, args=(failure,), daemon=True).start()


def connect(
    ranks: Ranks, store: Store, address: str, on_failure: Callable[[Failure], None], timeout_s: float
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
        coordinator = Coordinator(ranks, on_failure, uuid.uuid4().hex)
        store.set(ADDRESS_KEY, f"{coordinator.port} {coordinator.launch_id}")
        return coordinator
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if store.check([ADDRESS_KEY]):
            port, launch_id = store.get(ADDRESS_KEY).decode().split()
            with suppress(OSError):
                return Member(ranks, on_failure, launch_id, _handshake(address, int(port), launch_id, ranks.rank))
        time.sleep(0.05)
    raise UserError(
        f"rank 0 did not answer at {address} within {timeout_s:.0f} s; check whether it was started, and whether a "
        "firewall blocks connections between the machines"
    )


def _handshake(address: str, port: int, launch_id: str, rank: int) -> socket.socket:
    """Connect to rank 0. Raises OSError if this fails, or if the greeting does not contain `launch_id`."""
    connection = socket.create_connection((address, port), timeout=SEND_TIMEOUT_S)
    try:
        greeting = b""
        while not greeting.endswith(b"\n") and len(greeting) < 100:
            if not (received := connection.recv(1)):
                raise ConnectionError("no greeting")
            greeting += received
        if greeting.decode(errors="replace").strip() != launch_id:
            raise ConnectionError("the greeting of another launch")
        _send(connection, {"launch_id": launch_id, "rank": rank})
    except OSError:
        connection.close()
        raise
    return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _parse_failure(message: dict[str, Any]) -> Failure:
    return Failure(**message["failure"])


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


@dataclass
class _Peer:
    """One connection and its state. `rank` is None until the peer has identified itself."""

    connection: socket.socket
    rank: int | None = None
    buffer: bytes = b""
    has_closed: bool = False

    def read_messages(self) -> list[dict[str, Any]] | None:
        """Receive data and return the complete messages, or None if the connection has ended or is not from a rank."""
        try:
            received = self.connection.recv(65536)
            if not received or len(self.buffer) > MAX_LINE_BYTES:
                return None
            *lines, self.buffer = (self.buffer + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Member(FailureChannel):
    """End of the failure channel on a rank other than 0."""

    def __init__(
        self, ranks: Ranks, on_failure: Callable[[Failure], None], launch_id: str, connection: socket.socket
    ) -> None:
        super().__init__(ranks, on_failure, launch_id)
        _keep_alive(connection)
        connection.settimeout(None)
        self._peer = _Peer(connection, rank=0)
        threading.Thread(target=self._listen, daemon=True, name="failure-channel").start()

    def _listen(self) -> None:
        while (messages := self._peer.read_messages()) is not None:
            for message in messages:
                if "failure" in message:
                    self._receive(_parse_failure(message))
                elif "closed" in message:
                    self._peer.has_closed = True
        if not self._peer.has_closed and not self._is_closed:
            self._receive(Failure(0, "", is_lost=True))

    def _receive(self, failure: Failure) -> None:
        with self._lock:
            if self._first is None:
                self._set_first(failure)

    def report_failure(self, failure: Failure, timeout_s: float = 5.0) -> Failure:
        with suppress(OSError):
            _send(self._peer.connection, {"failure": asdict(failure)})
        return self.first_failure(timeout_s) or failure  # this failure, if rank 0 does not answer

    def close(self) -> None:
        self._is_closed = True
        with suppress(OSError):
            _send(self._peer.connection, {"closed": True})
            self._peer.connection.shutdown(socket.SHUT_RDWR)


class Coordinator(FailureChannel):
    """End of the failure channel on rank 0. Decides which failure came first, and sends it to all other ranks."""

    def __init__(self, ranks: Ranks, on_failure: Callable[[Failure], None], launch_id: str) -> None:
        super().__init__(ranks, on_failure, launch_id)
        self._peers: list[_Peer] = []
        self._all_connected = threading.Event()
        self._server = _create_server(ranks.world_size)
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        threading.Thread(target=self._serve, daemon=True, name="failure-channel").start()

    def _serve(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(timeout=1.0):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.settimeout(SEND_TIMEOUT_S)
            _keep_alive(connection)
            connection.sendall(f"{self.launch_id}\n".encode())
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        messages = peer.read_messages()
        if messages is None:
            self._selector.unregister(peer.connection)
            peer.connection.close()
            if peer.rank is not None and not peer.has_closed and not self._is_closed:
                self._record(Failure(peer.rank, "", is_lost=True))
            return
        for message in messages:
            if peer.rank is None:
                self._register(peer, message)
            elif "failure" in message:
                self._record(_parse_failure(message))
            elif "closed" in message:
                peer.has_closed = True

    def _register(self, peer: _Peer, message: dict[str, Any]) -> None:
        if message.get("launch_id") != self.launch_id:
            return
        with self._lock:
            peer.rank = int(message["rank"])
            self._peers.append(peer)
            if self._first is not None:
                self._send_to(peer, {"failure": asdict(self._first)})
            if len(self._peers) == self._ranks.world_size - 1:
                self._all_connected.set()

    def _record(self, failure: Failure) -> Failure:
        """Record a failure, and send it to the other ranks if it is the first one. Return the first failure."""
        with self._lock:
            if self._first is None:
                self._set_first(failure)
                for peer in self._peers:
                    self._send_to(peer, {"failure": asdict(failure)})
            assert self._first is not None
            return self._first

    @staticmethod
    def _send_to(peer: _Peer, message: dict[str, Any]) -> None:
        with suppress(OSError):
            _send(peer.connection, message)

    def report_failure(self, failure: Failure, timeout_s: float = 5.0) -> Failure:
        return self._record(failure)

    def all_connected(self, timeout_s: float) -> bool:
        return self._all_connected.wait(timeout_s)

    def missing_ranks(self) -> list[int]:
        with self._lock:
            return sorted(set(range(1, self._ranks.world_size)) - {peer.rank for peer in self._peers})

    def close(self) -> None:
        self._is_closed = True
        with self._lock:
            for peer in self._peers:
                self._send_to(peer, {"closed": True})
                with suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_RDWR)


def _create_server(connections: int) -> socket.socket:
    """Listen on a free port on all network interfaces."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=max(128, connections)
            )
    return socket.create_server(("", 0), backlog=max(128, connections))
