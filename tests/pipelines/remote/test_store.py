"""Requests to object stores: retries, errors and what messages show."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.utils.errors import UserError
from configs.utils.files import is_url
from helpers.object_store import Answer, ObjectStore, failing, folder_server, put, s3_server, upload
from pipelines.remote import store as module
from pipelines.remote.store import StoppedError, Store

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(CONTENT)
    server.fault = None
    monkeypatch.setattr(module, "MAX_DELAY_S", 0.01)
    return Store(upload(server, tmp_path / "files"))


def test_urls_are_told_from_folders() -> None:
    assert all(map(is_url, ("s3://bucket/set", "https://host/set", "GS://b/s")))
    assert not any(map(is_url, ("data/cifar10", "/s3://x", Path("s3"), "~/s3:/x")))


def test_objects_are_read_fetched_listed_and_written(s3: Store, server: ObjectStore, tmp_path: Path) -> None:
    s3 = Store(upload(server, tmp_path / "files", "alone"))  # other tests write to the same server
    s3.fetch("a.bin", tmp_path / "copy", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT == s3.read("a.bin")
    s3.put("b.bin", tmp_path / "copy")
    s3.write("c", b"text")
    assert [(entry.name, entry.bytes) for entry in s3.objects()] == [
        ("a.bin", len(CONTENT)),
        ("b.bin", len(CONTENT)),
        ("c", 4),
    ]
    before = s3.find("c")
    s3.write("c", b"next")
    after = s3.find("c")
    assert before is not None
    assert after is not None
    assert before.version != after.version
    s3.remove("c")
    s3.remove("c")
    assert s3.find("c") is None


def test_failing_requests_are_sent_again(s3: Store, server: ObjectStore, tmp_path: Path) -> None:
    server.fault = failing(0.4)
    for _ in range(10):
        counts: list[int] = []
        s3.fetch("a.bin", tmp_path / "copy", len(CONTENT), count=counts.append)
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert sum(counts) == len(CONTENT)
    assert server.count("a.bin") > 10


@pytest.mark.parametrize(
    ("answer", "message", "tries"),
    [
        (Answer(403, [], b""), "access to s3://bucket/set/a.bin is denied (HTTP 403); check the credentials", 1),
        (Answer(404, [], b""), "s3://bucket/set/a.bin does not exist; check the URL", 1),
        (Answer(400, [], b""), "cannot read s3://bucket/set/a.bin: HTTP 400; check the store", 1),
        (Answer(503, [], b""), "cannot read s3://bucket/set/a.bin: HTTP 503 after 3 tries in ", 3),
        (Answer(200, [], bytes(100), 50), "cannot read s3://bucket/set/a.bin: the connection failed (", 3),
    ],
)
def test_errors_that_stay_are_one_sentence(
    answer: Answer,
    message: str,
    tries: int,
    s3: Store,
    server: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TRIES", 3)
    server.fault = lambda method, path, original: answer
    server.requests.clear()
    with pytest.raises(UserError) as error:
        s3.fetch("a.bin", tmp_path / "copy", len(CONTENT))
    assert str(error.value).startswith(message)
    assert "testing" not in str(error.value)
    assert server.count("a.bin") == tries


def test_a_stalled_request_fails_and_a_stopped_one_ends_at_once(
    s3: Store, server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    monkeypatch.setattr(module, "TRIES", 1)
    server.fault = lambda method, path, answer: answer._replace(pause_s=3.0)
    with pytest.raises(UserError, match="no answer for 0 s"):
        s3._request("a.bin", "read", lambda: s3._files._cat_file(s3.join("a.bin")), threading.Event(), stall_s=0.2)
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    start_s = time.monotonic()
    with pytest.raises(StoppedError):
        s3.fetch("a.bin", tmp_path / "copy", len(CONTENT), stopped=stopped)
    assert time.monotonic() - start_s < 2.5


def test_an_object_that_is_too_large_is_not_fetched_to_its_end(s3: Store, server: ObjectStore, tmp_path: Path) -> None:
    put(server, "set/large", bytes(2**22))
    s3.fetch("large", tmp_path / "copy", 1000)
    assert 1000 < (tmp_path / "copy").stat().st_size < 2**22


def test_errors_of_the_local_disk_are_raised_as_they_are(s3: Store) -> None:
    with pytest.raises(OSError, match="No space left"):
        s3.fetch("a.bin", Path("/dev/full"), len(CONTENT))


def test_web_servers_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DELAY_S", 0.01)
    (tmp_path / "a b.bin").write_bytes(CONTENT)
    web = folder_server(tmp_path)
    files = Store(f"{web.url}/")
    assert files.read("a b.bin") == CONTENT
    web.fault = failing(0.4)
    files.fetch("a b.bin", tmp_path / "copy", len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(UserError, match="does not exist"):
        files.read("other")
    with pytest.raises(UserError, match="web servers are only read"):
        files.write("a", b"")
    web.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/set", "unsupported scheme 'ftp'; use s3://"),
        ("https://me:secret@host/set", "of https://host/set contains a user, a query"),
        ("https://host/set?signature=secret", "of https://host/set contains a user, a query"),
        ("s3://bucket", "s3://bucket does not name a folder"),
    ],
)
def test_other_urls_are_refused_without_showing_credentials(url: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Store(url)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs the package gcsfs; .*pip install -e '\.\[remote\]'"):
        Store("gs://bucket/set")
