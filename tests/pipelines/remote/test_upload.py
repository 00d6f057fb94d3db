"""Conversion into an object store: byte-identical, resumed without repeating uploads, and never a wrong object."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.utils.errors import UserError
from helpers.gcs_server import gcs_server
from helpers.imports import ROOT
from helpers.memory_source import MemoryRows, memory_source, tiny_source, write
from helpers.object_store import BUCKET, Answer, ObjectStore, folder_server, put, s3_server
from helpers.training import restore_signal_handlers
from pipelines.convert import checks
from pipelines.remote import store as store_module
from pipelines.remote import upload as module
from pipelines.remote.store import Store
from pipelines.remote.upload import Uploads, spool_folder
from pipelines.remote.verify import verify

SHARD = "tiny-train-000001.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: ObjectStore, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new data set."""
    server.fault = None
    server.requests.clear()
    monkeypatch.setattr(store_module, "MAX_DELAY_S", 0.01)
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid))}"


def objects(url: str) -> dict[str, bytes]:
    """Return the content of all objects by name."""
    store = Store(url)
    return {found.name: store.read(found.name) for found in store.objects()}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(server: ObjectStore) -> Counter[str]:
    """Return the number of times that each object was written, by name."""
    return Counter(
        {path.rpartition("/")[2]: count for (method, path), count in server.requests.items() if method == "PUT"}
    )


def start(url: str, spool: Path, workers: int = 1, kill_at: int = 0, encoding: str = "npy") -> subprocess.Popen[str]:
    arguments = [str(spool), encoding, str(workers), str(kill_at), url]
    command = [sys.executable, str(ROOT / "tests/helpers/memory_source.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=restore_signal_handlers
    )


@pytest.mark.parametrize("encoding", ["npy", pytest.param("jpeg", marks=pytest.mark.slow)])
def test_result_is_byte_identical_to_a_folder(
    encoding: str, url: str, server: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dataset = write(tiny_source(encoding), tmp_path / "spool", encoding, uploads=Uploads(url))
    expected = request.getfixturevalue(f"{encoding}_data")
    assert objects(url) == files(expected)
    assert dataset.splits["train"].samples in (520, 700)
    assert list((tmp_path / "spool").iterdir()) == []
    assert written(server) == {**dict.fromkeys(files(expected), 1), "_conversion.json": 1}
    (last,) = [path for method, path in list(server.requests) if method == "PUT"][-1:]
    assert last.endswith("/dataset.json")


def test_result_in_google_cloud_storage_is_byte_identical(
    npy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_DELAY_S", 0.01)
    damages = iter(range(2))

    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        """Store other bytes than those sent, twice."""
        if method != "POST" or b'"name": "set/tiny-val' not in answer.body or next(damages, None) is None:
            return None
        return answer._replace(body=answer.body.replace(b'"md5Hash": "', b'"md5Hash": "x'))

    with gcs_server() as (server, bucket):
        server.fault = fault
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(f"gs://{BUCKET}/set"))
        assert next(damages, None) is None
        assert bucket.objects == {f"set/{name}": content for name, content in files(npy_data).items()}
        assert verify(f"gs://{BUCKET}/set")[1] == []
        (tmp_path / "large").write_bytes(bytes(6 * 2**20))  # sent in parts
        Store(f"gs://{BUCKET}/set").put("large", tmp_path / "large")
        assert bucket.objects["set/large"] == bytes(6 * 2**20)


def test_few_finished_shards_are_here_at_a_time(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UPLOADS", 1)
    most, put_file = 0, Store.put

    def watched(store: Store, name: str, file: Path, **options: Any) -> None:
        nonlocal most
        most = max(most, len([*file.parent.glob("*.tar")]))
        put_file(store, name, file, **options)

    monkeypatch.setattr(Store, "put", watched)
    dataset = write(memory_source(train=MemoryRows(2000)), tmp_path / "spool", uploads=Uploads(url))
    assert 1 <= most <= 2 < len(dataset.splits["train"].shards)


def test_finished_data_set_is_left_alone(url: str, server: ObjectStore, tmp_path: Path) -> None:
    write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    server.requests.clear()
    dataset = write(tiny_source("npy"), tmp_path / "other", uploads=Uploads(url))
    assert dataset.splits["train"].samples == 700
    assert not written(server)
    with pytest.raises(UserError, match=f"{url} already contains the data set 'tiny', converted from another source"):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url), seed=1)
    assert not written(server)


def test_url_with_other_objects_is_refused(url: str, server: ObjectStore, tmp_path: Path) -> None:
    put(server, f"{url.rpartition('/')[2]}/notes.txt", b"mine")
    for _ in range(2):
        with pytest.raises(UserError, match=r"is not empty \(notes.txt\) and contains no data set, and .*spool has no"):
            write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    assert objects(url) == {"notes.txt": b"mine"}


def test_spool_of_another_url_and_full_folders_are_refused(url: str, server: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"--spool .*full is not empty and contains no conversion"):
        write(tiny_source("npy"), tmp_path / "full", uploads=Uploads(url))
    server.fault = lambda method, path, answer: Answer(403, [], b"") if path.endswith(".tar") else None
    with pytest.raises(UserError, match="is denied"):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    server.fault = None
    with pytest.raises(UserError, match=r"unfinished conversion of another source.*choose another --spool"):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(f"{url}-other"))


def test_denied_access_is_noticed_before_anything_is_encoded(
    url: str, server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda method, path, answer: Answer(403, [], b"") if method == "PUT" else None
    source = tiny_source("npy")
    reads: list[int] = []
    read = MemoryRows.read
    monkeypatch.setattr(MemoryRows, "read", lambda *arguments: reads.append(arguments[2]) or read(*arguments))
    with pytest.raises(UserError, match=r"access to .* is denied"):
        write(source, tmp_path / "spool", uploads=Uploads(url))
    assert len(reads) == 3  # one sample of each split, for the layout


def test_failing_uploads_are_repeated(url: str, server: ObjectStore, npy_data: Path, tmp_path: Path) -> None:
    tries: Counter[str] = Counter()

    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        if method != "PUT":
            return None
        tries[path] += 1
        return Answer((503, 429)[tries[path] - 1], [], b"") if tries[path] <= 2 else None

    server.fault = fault
    write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    server.fault = None
    assert objects(url) == files(npy_data)
    assert set(tries.values()) == {3}


@pytest.mark.slow
def test_upload_that_stays_impossible_is_one_sentence_and_resumable(
    url: str, server: ObjectStore, npy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TRIES", 2)
    server.fault = lambda method, path, answer: Answer(503, [], b"") if path.endswith(SHARD) else None
    with pytest.raises(UserError, match=f"cannot write .*{SHARD}: HTTP 503 after 2 tries"):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    server.fault = None
    assert "dataset.json" not in objects(url)
    done = {mark.read_text() for mark in (tmp_path / "spool").rglob("*.uploaded")}
    server.requests.clear()
    write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    assert objects(url) == files(npy_data)
    again = written(server)
    assert again[SHARD] == 1
    assert not any(f'"{name}"' in text for text in done for name in again)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 9])
def test_stored_bytes_are_compared_with_the_file(
    times: int, url: str, server: ObjectStore, npy_data: Path, tmp_path: Path
) -> None:
    damages = iter(range(times))

    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        if method == "PUT" and path.endswith(SHARD) and answer.status == 200 and next(damages, None) is not None:
            server.fault = None
            put(server, path.removeprefix(f"/{BUCKET}/"), bytes((npy_data / SHARD).stat().st_size))
            server.fault = fault
        return None

    server.fault = fault
    if times == 1:
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
        server.fault = None
        assert objects(url) == files(npy_data)
        return
    with pytest.raises(UserError, match=f"{SHARD} was written 3 times and still differs from "):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    assert (tmp_path / "spool" / SHARD).read_bytes() == (npy_data / SHARD).read_bytes()


def test_tag_that_is_no_md5_is_accepted_if_the_bytes_are_equal(
    url: str, server: ObjectStore, npy_data: Path, tmp_path: Path
) -> None:
    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        headers = [(name, f'"{32 * "a"}"' if name.lower() == "etag" else value) for name, value in answer.headers]
        return answer._replace(headers=headers)

    server.fault = fault
    write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    server.fault = None
    assert objects(url) == files(npy_data)
    assert written(server)[SHARD] == 1


def lose(server: ObjectStore, key: str) -> None:
    Store(f"s3://{BUCKET}/{key.rpartition('/')[0]}").remove(key.rpartition("/")[2])


def shorten(server: ObjectStore, key: str) -> None:
    put(server, key, b"short")


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "state"), [(lose, "is missing"), (shorten, "has 5 bytes instead of ")])
def test_object_changed_after_its_upload_is_noticed_before_dataset_json(
    damage: Callable[[ObjectStore, str], None],
    state: str,
    url: str,
    tmp_path: Path,
    server: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish = Uploads.finish

    def finish_later(self: Uploads, *arguments: Any) -> Any:
        self.wait()
        damage(server, f"{url.rpartition('/')[2]}/{SHARD}")
        return finish(self, *arguments)

    monkeypatch.setattr(Uploads, "finish", finish_later)
    with pytest.raises(UserError, match=f"{SHARD} {state}.*, though it was uploaded; delete all objects"):
        write(tiny_source("npy"), tmp_path / "spool", uploads=Uploads(url))
    assert "dataset.json" not in objects(url)


@pytest.mark.campaign
@pytest.mark.parametrize(("encoding", "step"), [("npy", 13), ("jpeg", 11)])
def test_kill_between_any_two_file_operations_changes_no_byte(
    encoding: str, step: int, url: str, server: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    spool, uploaded = tmp_path / "spool", set[str]()
    for attempt in range(100):
        server.requests.clear()
        process = start(url, spool, 1, step + attempt, encoding)
        error = process.communicate()[1]
        again = uploaded & set(written(server))
        assert not again  # nothing that was confirmed
        uploaded |= {
            file.with_suffix(ending).name
            for mark in spool.rglob("*.uploaded")
            for file in [Path(f"tiny-{mark.parent.name}-{mark.stem.removeprefix('shard-')}.tar")]
            for ending in (".tar", ".idx")
        }
        if process.returncode != -9:
            break
    assert process.returncode == 0, error
    assert attempt >= 3
    assert uploaded
    assert objects(url) == files(request.getfixturevalue(f"{encoding}_data"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_conversion_killed_in_an_upload_is_resumed(
    number: int, url: str, server: ObjectStore, npy_data: Path, tmp_path: Path
) -> None:
    process: subprocess.Popen[str] | None = None

    def fault(method: str, path: str, answer: Answer) -> Answer | None:
        if method == "PUT" and path.endswith(SHARD) and process is not None:
            process.send_signal(number)
            process.wait()
        return None

    server.fault = fault
    process = start(url, tmp_path / "spool")
    process.communicate()
    assert process.returncode != 0
    server.fault = None
    assert "dataset.json" not in objects(url)
    kept = {mark.stem for mark in (tmp_path / "spool").rglob("*.uploaded")}
    server.requests.clear()
    again = start(url, tmp_path / "spool")
    assert again.communicate()[1] == "" or again.returncode == 0
    assert objects(url) == files(npy_data)
    assert written(server)[SHARD] == 1
    assert kept


def test_leaving_uploads_waits_for_no_answer(url: str, server: ObjectStore, tmp_path: Path) -> None:
    asked, answered = threading.Event(), threading.Event()

    def fault(method: str, path: str, answer: Answer) -> None:
        if method == "HEAD":
            asked.set()
            answered.wait(60)

    def leave() -> None:
        with suppress(KeyboardInterrupt), Uploads(url) as uploads:
            uploads.submit([tmp_path / "file"])
            assert asked.wait(60)
            raise KeyboardInterrupt

    server.fault = fault
    (tmp_path / "file").write_bytes(b"content")
    thread = threading.Thread(target=leave)
    thread.start()
    thread.join(30)
    is_waiting = thread.is_alive()
    answered.set()
    thread.join()
    assert not is_waiting


def test_too_little_disk_for_the_spool_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2_000_000
    size = rows * 32 * 32 * 3
    source = memory_source(train=Endless(rows))
    usage = shutil.disk_usage(tmp_path)
    # Enough for the spool, though not for the result beside it; then too little.
    for free, error, message in ((1.5 * size, Started, "read"), (0.9 * size, UserError, "choose another --spool")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free)))
        with pytest.raises(error, match=message):
            write(source, tmp_path / "spool", uploads=Uploads(url))


class Started(Exception):
    """Raised when a source is read after the checks."""


class Endless(MemoryRows):
    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        if stop - start > 1:
            raise Started("read")
        return super().read(start, stop)


def test_web_servers_cannot_be_written_to(tmp_path: Path) -> None:
    web = folder_server(tmp_path)
    with pytest.raises(UserError, match=r"cannot write to .*: web servers are only read; give an s3:// or gs:// URL"):
        Uploads(f"{web.url}/set")
    web.close()


def test_default_spool_is_in_the_cache_and_differs_between_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [spool_folder(url) for url in ("s3://a/set", "s3://b/set", "gs://a/set")]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "model-zhu" / "convert" for folder in folders)
