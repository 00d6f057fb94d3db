"""Connections of all ranks with the first one, over which they learn at once that one of them failed or is gone.

A rank that is killed cannot say so, but the system closes its connections: that is how the others notice. What happens
then is not known here, and nothing of torch is. Lines of JSON travel, and a word that names this start of the ranks, so
that whoever knocks from an earlier one is not taken for one of them.
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
SEND_TIMEOUT_S = 2.0  # a rank that does not read is not waited for any longer
MAX_LINE_BYTES = 200_000  # bytes: whoever sends more is no rank
# A machine that is gone closes no connection: after about 55 s without an answer it counts as gone.
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 8}


class Store(Protocol):
    """What all ranks can read and write: torch's, where it waits for nothing."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Failure:
    """Of one rank; all ranks agree on which was the first."""

    rank: int
    summary: str  # one line
    is_user_error: bool = False
    is_lost: bool = False  # its connection ended without a word


class FailureChannel:
    """What a rank holds of it. `on_failure` is called in a thread, once, for the first failure of another rank."""

    def __init__(self, ranks: Ranks, on_failure: Callable[[Failure], None], launch_id: str) -> None:
        self.launch_id = launch_id  # names this start of the ranks: no other has it
        self._ranks, self._on_failure = ranks, on_failure
        self._first: Failure | None = None
        self._known = threading.Event()
        self._lock = threading.Lock()
        self._is_closed = False

    def first_failure(self, timeout_s: float = 0.0) -> Failure | None:
        """Waits for one at most that long."""
        self._known.wait(timeout_s)
        return self._first

    def report_failure(self, failure: Failure, timeout_s: float = 5.0) -> Failure:
        """Let all ranks know of this rank's failure; returns the one that all agree was the first."""
        raise NotImplementedError

    def close(self) -> None:
        """This rank has ended well."""
        raise NotImplementedError

    def all_connected(self, timeout_s: float) -> bool:
        """Wait at most that long for ranks that are still starting; only the first rank has to."""
        return True

    def missing_ranks(self) -> list[int]:
        """Ranks that have not come yet; only the first rank knows."""
        return []

    def _set_first(self, failure: Failure) -> None:
        """Of the first failure; the lock is held."""
        self._first = failure
        self._known.set()
        if failure.rank != self._ranks.rank:
            threading.Thread(target=self._on_failure, args=(failure,), daemon=True).start()


def connect(
    ranks: Ranks, store: Store, address: str, on_failure: Callable[[Failure], None], timeout_s: float
) -> FailureChannel:
    """Wait for the first rank; address: where it can be reached. Raises UserError where it does not come.

    The store may be older than these ranks, since torchrun keeps it when it starts them again, and hold the address of
    a first rank that is gone.
    """
    if ranks.is_first:
        hub = Coordinator(ranks, on_failure, uuid.uuid4().hex)
        store.set(ADDRESS_KEY, f"{hub.port} {hub.launch_id}")
        return hub
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if store.check([ADDRESS_KEY]):
            port, launch_id = store.get(ADDRESS_KEY).decode().split()
            with suppress(OSError):
                return Member(ranks, on_failure, launch_id, _handshake(address, int(port), launch_id, ranks.rank))
        time.sleep(0.05)
    raise UserError(
        f"rank 0 did not answer at {address} within {timeout_s:.0f} s; see whether it was started, and whether a "
        "firewall stands between the machines"
    )


def _handshake(address: str, port: int, launch_id: str, rank: int) -> socket.socket:
    """A connection with the first rank; raises OSError where it is another start's or another program's."""
    connection = socket.create_connection((address, port), timeout=SEND_TIMEOUT_S)
    try:
        greeting = b""
        while not greeting.endswith(b"\n") and len(greeting) < 100:
            if not (received := connection.recv(1)):
                raise ConnectionError("no greeting")
            greeting += received
        if greeting.decode(errors="replace").strip() != launch_id:
            raise ConnectionError("the greeting of another start")
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
    """A connection as the first rank sees it; rank None: it has not said yet who it is."""

    connection: socket.socket
    rank: int | None = None
    buffer: bytes = b""
    has_closed: bool = False

    def read_messages(self) -> list[dict[str, Any]] | None:
        """Whole messages that have come; None: the connection has ended, or speaks another language."""
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
    """Of any rank but the first."""

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
        return self.first_failure(timeout_s) or failure  # where the first rank does not answer

    def close(self) -> None:
        self._is_closed = True
        with suppress(OSError):
            _send(self._peer.connection, {"closed": True})
            self._peer.connection.shutdown(socket.SHUT_RDWR)


class Coordinator(FailureChannel):
    """Of the first rank: it hears all others, decides which failure was the first, and tells them."""

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
    """For every address of this machine, at a port that is free."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=max(128, connections)
            )
    return socket.create_server(("", 0), backlog=max(128, connections))
