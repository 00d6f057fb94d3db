"""Verification in an object store: the same sentences as for a folder, with few shards on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from configs.utils.errors import UserError
from helpers.object_store import Answer, ObjectStore, failing, folder_server, s3_server, upload
from pipelines.remote import store as store_module
from pipelines.remote import verify as module
from pipelines.remote.store import Store
from pipelines.remote.verify import verify
from pipelines.storage.verify import verify as verify_folder
from tools import convert

SHARD = "tiny-train-000001.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def cache(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the cache, which must be empty in the end."""
    server.fault = None
    monkeypatch.setattr(store_module, "MAX_DELAY_S", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "model-zhu" / "verify"


@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_intact_data_set_is_read_once(
    encoding: str, server: ObjectStore, cache: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{encoding}_data")
    url = upload(server, folder, f"intact-{encoding}")
    assert convert.verify(url) == convert.verify(folder).replace(str(folder), url)
    assert set(server.per_object()) == {1}
    assert set(server.per_object(".idx")) == {1}
    assert list(cache.iterdir()) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10_000])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(512))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def clear(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def swap(file: Path) -> None:
    file.write_bytes(file.with_name("tiny-train-000000.tar").read_bytes())


def problems_of(check: Callable[[Any], list[str]], place: Path | str) -> list[str]:
    try:
        return check(place)
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("damage", [Path.unlink, cut, lengthen, flip, clear, swap])
@pytest.mark.parametrize("name", [SHARD, "train.index.npz", "tiny-train-000001.idx", "_info.json", "dataset.json"])
def test_damage_has_the_sentence_of_a_folder(
    name: str, damage: Callable[[Path], None], server: ObjectStore, cache: Path, npy_copy: Path
) -> None:
    damage(npy_copy / name)
    url = upload(server, npy_copy, f"{damage.__name__}-{name}")
    here, there = problems_of(verify_folder, npy_copy), problems_of(lambda url: verify(url)[1], url)
    assert here
    if name == "dataset.json" and damage is Path.unlink:
        assert there[0].startswith(f"{url}/dataset.json does not exist; check the URL")
    else:
        assert there == [problem.replace(str(npy_copy), url) for problem in here]
    assert list(cache.iterdir()) == []


def test_few_shards_take_space_at_a_time(
    server: ObjectStore, cache: Path, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARDS", 1)
    most, fetch = 0, Store.fetch

    def watched(*arguments: object, **options: object) -> None:
        nonlocal most
        fetch(*arguments, **options)  # type: ignore[arg-type]
        most = max(most, sum(file.stat().st_blocks * 512 for file in cache.rglob("*.tar")))

    monkeypatch.setattr(Store, "fetch", watched)
    assert verify(upload(server, npy_data, "few"))[1] == []
    sizes = [file.stat().st_size for file in npy_data.glob("*.tar")]
    assert max(sizes) <= most < 2 * max(sizes) < sum(sizes)


@pytest.mark.parametrize("removes", [False, True], ids=["", "as gcsfs"])
def test_failing_requests_are_repeated(
    removes: bool, server: ObjectStore, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = s3fs.S3FileSystem._get_file

    async def removing(files: Any, remote: str, local: str, **options: Any) -> None:
        try:
            await get_file(files, remote, local, **options)
        except BaseException:
            Path(local).unlink(missing_ok=True)
            raise

    if removes:
        monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", removing)
    url = upload(server, npy_data, f"failing-{removes}")
    server.fault = failing(0.3)
    assert [verify(url)[1] for _ in range(2)] == [[], []]


def test_denied_access_ends_the_check(server: ObjectStore, cache: Path, npy_data: Path) -> None:
    url = upload(server, npy_data, "denied")
    server.fault = lambda method, path, answer: Answer(403, [], b"") if path.endswith(SHARD) else None
    with pytest.raises(UserError, match=r"access to .* is denied"):
        verify(url)
    assert list(cache.iterdir()) == []


def test_web_server_is_verified_like_a_store(npy_copy: Path) -> None:
    web = folder_server(npy_copy.parent)
    url = f"{web.url}/{npy_copy.name}"
    assert verify(url)[1] == []
    flip(npy_copy / SHARD)
    problems = verify(url)[1]
    assert problems == verify_folder(npy_copy)
    with pytest.raises(UserError, match=re.escape(f"{url} is damaged: {SHARD} does not have the sha256")):
        convert.verify(url)
    web.close()
