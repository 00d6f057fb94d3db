"""Loading from an object store gives what loading from a folder gives, and fetches each shard once."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.utils.errors import UserError
from helpers.imports import ROOT
from helpers.loaders import assert_same, copies, evaluation, train
from helpers.memory_source import MemoryRows, memory_source, tiny_source, write
from helpers.object_store import Answer, ObjectStore, failing, folder_server, put, s3_server, upload
from pipelines.interfaces import Position
from pipelines.open import load_dataset, open_split
from pipelines.remote import residency
from pipelines.remote import store as requests
from pipelines.remote.cache import _copy
from pipelines.remote.store import StoppedError, Store
from pipelines.storage.dataset import fingerprint

MIB = 1 / 1024  # GiB
WINDOW: dict[str, Any] = {"order": "sequential-window", "window_shards": 2, "batch_size": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards of train and two of val, 1 MiB each."""
    out = tmp_path_factory.mktemp("shards") / "set"
    write(memory_source(train=MemoryRows(1990), val=MemoryRows(400)), out)
    return out


@pytest.fixture
def url(server: ObjectStore, shards: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    server.fault = None
    monkeypatch.setattr(requests, "MAX_DELAY_S", 0.01)
    monkeypatch.setattr(residency, "POLL_S", 0.02)
    return upload(server, shards)


def cached(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if ".tar" in file.name]


@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
@pytest.mark.parametrize("options", [{}, {"placement": "host"}, {"order": "sequential-window", "window_shards": 2}])
def test_batches_are_those_of_a_folder_and_later_epochs_need_no_request(
    encoding: str, options: dict[str, Any], server: ObjectStore, tmp_path: Path
) -> None:
    write(tiny_source(encoding), tmp_path / "set", encoding)
    server.fault = None
    url = upload(server, tmp_path / "set", f"plain-{encoding}")
    options = {"image_size": 32, **options}
    local, remote = train(tmp_path / "set", **options), train(url, cache=str(tmp_path), **options)
    validation = evaluation(url, cache=str(tmp_path), **options)
    assert_same(copies(local), copies(remote))
    assert_same(copies(evaluation(tmp_path / "set", **options)), copies(validation))
    assert set(server.per_object()) == {1}
    server.requests.clear()
    for _ in range(2):
        assert_same(copies(local), copies(remote))
        assert_same(copies(evaluation(tmp_path / "set", **options)), copies(validation))
    assert server.requests.total() == 0
    again = train(url, cache=str(tmp_path), **options)
    again.position = Position(3)
    assert_same(copies(local), copies(again))
    assert list(server.requests) == [("GET", f"/bucket/plain-{encoding}/dataset.json")]


def test_a_data_set_has_the_same_fingerprint_and_rows_in_a_store(url: str, shards: Path, tmp_path: Path) -> None:
    assert fingerprint(load_dataset(url)) == fingerprint(load_dataset(shards))
    local = open_split(shards, "val").source_rows()
    for limit in (None, 4 * MIB):
        remote = open_split(url, "val", cache=str(tmp_path / str(limit)), cache_gib=limit)
        assert remote.source_rows().tolist() == local.tolist()
        assert remote.source_rows(slice(5, 390)).tolist() == local[5:390].tolist()


def test_a_part_of_a_data_set_fetches_only_its_shards(
    url: str, shards: Path, server: ObjectStore, tmp_path: Path
) -> None:
    options = {"limit": 3, "batch_size": 3, "placement": "host"}
    remote = train(url, cache=str(tmp_path), **options)
    assert_same(copies(train(shards, **options)), copies(remote))
    assert 0 < server.count() <= len(set(remote.split.shard.tolist())) < 10


@pytest.mark.slow
def test_a_small_cache_keeps_its_limit_and_gives_the_same_batches(url: str, shards: Path, tmp_path: Path) -> None:
    limit, peak, ended = 8, [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            sizes = []
            for file in cached(tmp_path):
                try:
                    sizes.append(file.stat().st_size)
                except OSError:
                    continue
            peak[0] = max(peak[0], sum(sizes))
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    local, remote = train(shards, **WINDOW), train(url, cache=str(tmp_path), cache_gib=limit * MIB, **WINDOW)
    validation = evaluation(url, cache=str(tmp_path), cache_gib=limit * MIB)
    for _ in range(3):
        assert_same(copies(local), copies(remote))
        assert_same(copies(evaluation(shards)), copies(validation))
    ended.set()
    watching.join()
    remote.drop_ahead()
    assert 4 * 2**20 < peak[0] <= limit * 2**20
    mapped = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if str(tmp_path) in line]
    assert [line for line in mapped if "deleted" in line] == []  # the disk space of removed shards is free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "host"}, r"data.order=random reads all shards .* 1\d.\d MiB, but data.cache_gib=0.00\d+ \(the"),
        (
            {**WINDOW, "window_shards": 8},
            r"data.cache_gib=0.00\d+ is less than the \d+.\d MiB of shards that are read at",
        ),
    ],
)
def test_a_cache_that_is_too_small_is_refused(options: dict[str, Any], message: str, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(url, cache=str(tmp_path), cache_gib=6 * MIB, **options)


READER = """
import sys
from helpers.loaders import NO_AUG, data_of
from helpers.memory_source import rows_of
from pipelines import build_train_loader
url, cache, rank, world, local, limit = *sys.argv[1:3], *map(int, sys.argv[3:6]), float(sys.argv[6])
options = {"cache": cache, "cache_gib": limit or None, "placement": "host"}
data = data_of(url, 20 // world, order="sequential-window", window_shards=2, **options)
loader = build_train_loader(
    data, NO_AUG, seed=3, device="cpu", rank=rank, world_size=world, local_world_size=local, machines=world // local
)
for _ in range(2):
    print(*[row for batch in loader for row in rows_of(batch.images)])
"""


def read_in_process(url: str, cache: Path, rank: int, local: int, limit: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, url, cache, rank, 2, local, limit]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment)


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 9 * MIB])
def test_ranks_of_a_machine_share_one_cache(limit: float, url: str, server: ObjectStore, tmp_path: Path) -> None:
    outputs = finish([read_in_process(url, tmp_path, rank, 2, limit) for rank in range(2)])
    rows = [[set(line.split()) for line in output.splitlines()] for output in outputs]
    assert [len(first | second) for first, second in zip(*rows, strict=True)] == [1980, 1980]
    assert set(server.per_object()) == {1} if not limit else server.count() < 2 * 2 * 12


@pytest.mark.slow
def test_machines_fetch_their_share(url: str, server: ObjectStore, tmp_path: Path) -> None:
    names = {}
    for rank in range(2):
        server.requests.clear()
        process = read_in_process(url, tmp_path / str(rank), rank, 1)
        assert process.communicate(timeout=120)[0]
        assert set(server.per_object()) == {1}
        names[rank] = server.count()
    assert all(number <= 10 for number in names.values())


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_others_use(
    url: str, shards: Path, server: ObjectStore, tmp_path: Path
) -> None:
    server.fault = lambda method, path, answer: answer._replace(pause_s=1.5) if "000004.tar" in path else None
    process = read_in_process(url, tmp_path, 0, 2)
    while not any(file.name.endswith("000004.tar.part") and file.stat().st_size for file in cached(tmp_path)):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    server.fault = None
    assert any(file.name.endswith(".part") for file in cached(tmp_path))
    (next(tmp_path.glob("*")) / "tiny-train-000004.tar.copy").write_bytes(bytes(1000))
    assert_same(copies(train(shards, **WINDOW)), copies(train(url, cache=str(tmp_path), **WINDOW)))
    assert [file.name for file in cached(tmp_path) if file.name.endswith((".part", ".copy"))] == []


def test_a_small_cache_frees_the_space_of_temporary_files(url: str, shards: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": str(tmp_path), "cache_gib": 8 * MIB}
    open_split(url, "val", **options)
    for name in ("tiny-train-000004.tar.part", "tiny-val-000001.tar.copy"):
        (next(tmp_path.glob("*")) / name).write_bytes(bytes(1000))
    assert_same(copies(train(shards, **WINDOW)), copies(train(url, **options, **WINDOW)))
    assert [file.name for file in cached(tmp_path) if file.name.endswith((".part", ".copy"))] == []


@pytest.mark.parametrize("size", [0, 1, 2 << 20, (5 << 20) + 1])
def test_shards_are_copied_in_huge_pages(size: int, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(size)
    (tmp_path / "fetched").write_bytes(content)
    before = written_pieces()
    assert _copy(tmp_path / "fetched", tmp_path / "copy") == hashlib.sha256(content).hexdigest()
    assert written_pieces() - before == -(-size // (2 << 20))
    assert (tmp_path / "copy").read_bytes() == content


def written_pieces() -> int:
    """Return the number of write system calls of this thread."""
    return int(re.findall(r"syscw: (\d+)", Path("/proc/thread-self/io").read_text())[0])


def test_failing_requests_change_no_batch(url: str, shards: Path, server: ObjectStore, tmp_path: Path) -> None:
    server.fault = failing(0.3)
    remote = train(url, cache=str(tmp_path), **WINDOW)
    assert_same(copies(train(shards, **WINDOW)), copies(remote))
    assert server.count() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1000], r"000003.tar has [\d,]+ bytes instead of the [\d,]+ that dataset.json gives"),
        (lambda content: content[:-1000] + bytes(1000)[:-1] + b"1", r"000003.tar has another sha256 than dataset.json"),
        (lambda content: content + bytes(2**20), r"000003.tar has more than the [\d,]+ bytes that dataset.json gives"),
    ],
)
def test_an_object_of_another_version_ends_the_run(
    change: Any, message: str, url: str, shards: Path, server: ObjectStore, tmp_path: Path
) -> None:
    put(server, "set/tiny-train-000003.tar", change((shards / "tiny-train-000003.tar").read_bytes()))
    remote = train(url, cache=str(tmp_path), placement="host")
    with pytest.raises(UserError, match=message + ".*: it is truncated, or was replaced by another version; upload"):
        copies(remote)
    assert not any("000003" in file.name for file in cached(tmp_path))
    put(server, "set/tiny-train-000003.tar", (shards / "tiny-train-000003.tar").read_bytes())
    assert_same(copies(train(shards)), copies(train(url, cache=str(tmp_path))))


def test_another_version_of_a_data_set_has_its_own_cache(url: str, server: ObjectStore, tmp_path: Path) -> None:
    copies(train(url, cache=str(tmp_path / "cache")))
    write(memory_source(train=MemoryRows(900), val=MemoryRows(100)), tmp_path / "next")
    upload(server, tmp_path / "next")
    remote = train(url, cache=str(tmp_path / "cache"))
    assert_same(copies(train(tmp_path / "next")), copies(remote))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_copy_is_fetched_again(url: str, shards: Path, server: ObjectStore, tmp_path: Path) -> None:
    copies(train(url, cache=str(tmp_path)))
    first, second, *_ = sorted(cached(tmp_path))
    with first.open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 5000)
    os.truncate(second, 5000)
    server.requests.clear()
    assert_same(copies(train(shards)), copies(train(url, cache=str(tmp_path))))
    assert server.count() == 2


def test_a_full_disk_is_one_sentence_and_leaves_no_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, name: str, file: Path, *_: Any, **__: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    remote = train(url, cache=str(tmp_path), placement="host")
    monkeypatch.setattr(Store, "fetch", full)
    with pytest.raises(
        UserError, match=r"the cache .* \(the disk is full\); free space, set data.cache to .*cache_gib"
    ):
        copies(remote)
    assert cached(tmp_path) == []


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_an_iterator_that_is_dropped_ends_the_transfers(url: str, server: ObjectStore, tmp_path: Path) -> None:
    server.fault = lambda method, path, answer: answer._replace(pause_s=20.0) if ".tar" in path else None
    remote = train(url, cache=str(tmp_path), placement="host")
    earlier = fetching()  # of loaders of other tests, which end when they have been idle for a while

    def end() -> None:
        while not cached(tmp_path):  # until the iterator waits for shards
            time.sleep(0.01)
        remote.end_iteration()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(StoppedError):
        next(iter(remote))
    ending.join()
    assert set(fetching()) <= set(earlier)
    assert cached(tmp_path) == []


def test_a_plain_web_server_is_enough(shards: Path, tmp_path: Path) -> None:
    web = folder_server(shards.parent)
    remote = train(f"{web.url}/set", cache=str(tmp_path))
    assert_same(copies(train(shards)), copies(remote))
    web.close()


@pytest.mark.parametrize(
    ("status", "message"), [(403, "access to .*dataset.json is denied"), (404, "dataset.json does not exist; check")]
)
def test_a_data_set_that_cannot_be_read_is_one_sentence(
    status: int, message: str, url: str, server: ObjectStore, tmp_path: Path
) -> None:
    server.fault = lambda method, path, answer: Answer(status, [], b"")
    with pytest.raises(UserError, match=message):
        train(url, cache=str(tmp_path))


def test_opening_a_folder_imports_nothing_of_stores(shards: Path) -> None:
    script = (
        "import sys; from pipelines.open import open_split; open_split(sys.argv[1], 'val');"
        "print([name for name in ('fsspec', 'aiohttp', 'asyncio', 'pipelines.remote') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(shards)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"
