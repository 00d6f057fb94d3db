"""An S3 server on loopback behind a proxy that counts requests and makes them fail."""

from __future__ import annotations

import http.client
import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest

BUCKET = "bucket"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Answer(NamedTuple):
    """The answer to one request, which a fault may replace."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    sent: int | None = None  # bytes of the body after which the connection is closed; None: all
    pause_s: float = 0.0  # in the middle of the body


Fault = Callable[[str, str, Answer], Answer | None]  # method, path and answer -> its replacement, or None


class ObjectStore:
    """A proxy in front of a server.

    Attributes:
        url: URL of the proxy.
        requests: Number of requests by (method, path without the query).
        fault: Changes answers; None: nothing fails.
    """

    def __init__(self, ask: Callable[[str, str, dict[str, str], bytes], Answer]) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.fault: Fault | None = None
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                with store._lock:
                    store.requests[self.command, path] += 1
                answer = ask(self.command, self.path, dict(self.headers.items()), body)
                if store.fault is not None:
                    answer = store.fault(self.command, path, answer) or answer
                self.send(answer)

            def send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers:
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                length = next((value for name, value in answer.headers if name == "Content-Length"), None)
                is_head = self.command == "HEAD"
                self.send_header("Content-Length", length if is_head and length else str(len(answer.body)))
                self.end_headers()
                if is_head:
                    return
                sent = len(answer.body) if answer.sent is None else answer.sent
                half = sent // 2 if answer.pause_s else sent
                self.wfile.write(answer.body[:half])
                if answer.pause_s:
                    self.wfile.flush()
                    time.sleep(answer.pause_s)
                    self.wfile.write(answer.body[half:sent])
                if sent < len(answer.body):
                    self.close_connection = True
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass  # clients close connections

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, ending: str = ".tar") -> int:
        """Return the number of requests for paths with this ending."""
        return sum(number for (_, path), number in self.requests.items() if path.endswith(ending))

    def per_object(self, ending: str = ".tar") -> list[int]:
        """Return the number of GET requests of each object with this ending."""
        return [
            number
            for (method, path), number in sorted(self.requests.items())
            if method == "GET" and path.endswith(ending)
        ]


def failing(share: float, seed: int = 0) -> Fault:
    """Return a fault that lets a share of all requests fail: 429, 503, a truncated body or a closed connection."""
    draw, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        with lock:
            fails, kind = draw.random() < share, draw.randrange(4)
        if not fails or method not in ("GET", "HEAD"):
            return None
        if kind == 0:
            return Answer(429, [], b"")
        if kind == 1:
            return Answer(503, [], b"<Error><Code>SlowDown</Code><Message>Slow down</Message></Error>")
        return answer._replace(sent=len(answer.body) // 2 if kind == 2 else 0)

    return fault


def folder_server(folder: Path) -> ObjectStore:
    """Return a plain web server of a folder, without ranges or lists."""

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        file = folder / unquote(path.lstrip("/"))
        if method not in ("GET", "HEAD"):
            return Answer(405, [], b"")
        if not file.is_file():
            return Answer(404, [], b"missing")
        return Answer(200, [("ETag", f'"{file.stat().st_mtime_ns}"')], file.read_bytes())

    return ObjectStore(ask)


@contextmanager
def s3_server() -> Iterator[ObjectStore]:
    """Start an S3 server with a bucket behind a proxy, and set the variables by which clients find it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        headers = {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = Answer(response.status, response.getheaders(), response.read())
        connection.close()
        return answer

    store = ObjectStore(ask)
    variables = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    ask("PUT", f"/{BUCKET}", {}, b"")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            yield store
    finally:
        store.close()
        moto.stop()


def upload(store: ObjectStore, folder: Path, name: str = "set") -> str:
    """Copy the files of a data set into the bucket, and return its URL."""
    for file in sorted(folder.iterdir()):
        put(store, f"{name}/{file.name}", file.read_bytes())
    store.requests.clear()
    return f"s3://{BUCKET}/{name}"


def put(store: ObjectStore, key: str, content: bytes) -> None:
    connection = http.client.HTTPConnection(store.url.removeprefix("http://"), timeout=60)
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
    connection.request("PUT", f"/{BUCKET}/{key}", content, signed)  # moto checks only that there is a signature
    response = connection.getresponse()
    assert response.status == 200, (key, response.status, response.read())
    connection.close()
