"""Hash cache: a shard is read once after each change, and entries are stored only in the user's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import DataConfig
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.memory_source import tiny_source, write
from pipelines import build_eval_loader, build_train_loader
from pipelines.storage import hash_cache
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from pipelines.storage.verify import verify

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.warn.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the names of hashed files."""
    names: list[str] = []
    hash_file = hash_cache.hash_file

    def noted(file: Path, *rest: object) -> hash_cache.HashedFile:
        names.append(file.name)
        return hash_file(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(hash_cache, "hash_file", noted)
    return names


def record_of(folder: Path) -> Path:
    (record,) = hash_cache.cache_folder().glob(f"{folder.name}-*.json")
    return record


def names_of(folder: Path, split: str = "train") -> list[str]:
    return [shard.file for shard in load_dataset(folder).splits[split].shards]


def test_shards_are_read_by_the_first_start_only(npy_copy: Path, read: list[str]) -> None:
    open_split(npy_copy, "train")
    assert sorted(read) == names_of(npy_copy)
    read.clear()
    open_split(npy_copy, "train")
    open_split(npy_copy / ".." / npy_copy.name, "train")
    assert read == []


def test_converted_shards_are_not_read_again(tmp_path: Path, read: list[str]) -> None:
    write(tiny_source("npy"), tmp_path / "out")
    for split in ("train", "val", "test"):
        open_split(tmp_path / "out", split)
    assert read == []


def test_shards_of_an_interrupted_conversion_are_read(tmp_path: Path, read: list[str]) -> None:
    """The cache has entries only for shards that this conversion wrote."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "memory_source.py"), str(tmp_path / "out"), "npy", "1"]
    for count in range(40, 400, 20):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        subprocess.run([*command, str(count)], capture_output=True, check=False, cwd=ROOT)
        if left := sorted(file.name for file in (tmp_path / "out").glob("tiny-train-*.tar")):
            break
    written = write(tiny_source("npy"), tmp_path / "out")
    assert len(left) < len(written.splits["train"].shards)
    open_split(tmp_path / "out", "train")
    assert sorted(read) == left[: len(read)]
    assert len(read) in (len(left), len(left) - 1)  # the last may lack its table, and was written again


def test_verify_reads_all_shards_and_caches_hashes(npy_copy: Path, read: list[str]) -> None:
    open_split(npy_copy, "train")
    read.clear()
    assert verify(npy_copy) == []
    assert sorted(read) == sorted(name for split in ("train", "val", "test") for name in names_of(npy_copy, split))
    read.clear()
    open_split(npy_copy, "val")
    assert read == []


@pytest.mark.parametrize("way", ["touched", "replaced by a copy", "renamed and back", "written over"])
def test_only_changed_shards_are_read_again(way: str, npy_copy: Path, read: list[str]) -> None:
    open_split(npy_copy, "train")
    read.clear()
    file = npy_copy / "tiny-train-000002.tar"
    if way == "touched":
        os.utime(file)
    elif way == "replaced by a copy":
        shutil.copy2(file, npy_copy / "other")
        (npy_copy / "other").rename(file)
    elif way == "renamed and back":
        file.rename(npy_copy / "other")
        (npy_copy / "other").rename(file)
    else:
        status = file.stat()
        content = bytearray(file.read_bytes())
        content[2000] ^= 1
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # like a tool that preserves times
        with pytest.raises(UserError, match=f"{file.name} does not have the sha256"):
            open_split(npy_copy, "train")
        assert read == [file.name]
        return
    open_split(npy_copy, "train")
    assert read == [file.name]


def test_change_within_a_clock_tick_is_detected(npy_copy: Path) -> None:
    """File times advance in steps of some milliseconds; a file can be hashed and changed within one step."""
    file = npy_copy / "tiny-val-000000.tar"
    for number in range(20):
        content = bytearray(file.read_bytes())
        file.write_bytes(content)
        open_split(npy_copy, "val")
        content[1000 + number] ^= 1
        with file.open("r+b") as opened:
            opened.write(content)
        with pytest.raises(UserError, match="does not have the sha256"):
            open_split(npy_copy, "val")
        content[1000 + number] ^= 1
        file.write_bytes(content)


def test_copies_on_other_machines_have_separate_entries(npy_copy: Path, read: list[str]) -> None:
    """Machines may share a home folder and have copies of the data under the same path."""
    other = npy_copy.parent / "elsewhere"
    shutil.copytree(npy_copy, other)
    open_split(npy_copy, "val")
    for folder in (npy_copy, other):
        folder.rename(folder.with_suffix(".away"))
    other.with_suffix(".away").rename(npy_copy)
    open_split(npy_copy, "val")
    npy_copy.rename(other)
    npy_copy.with_suffix(".away").rename(npy_copy)
    assert len(read) == 2
    open_split(npy_copy, "val")  # the folder was renamed, not its files
    assert len(read) == 2
    entries = json.loads(record_of(npy_copy).read_text())["files"]["tiny-val-000000.tar"]
    assert len(entries) == 2


def test_entries_do_not_grow_without_bound(npy_copy: Path) -> None:
    for _ in range(12):
        os.utime(npy_copy / "tiny-val-000000.tar")
        open_split(npy_copy, "val")
    entries = json.loads(record_of(npy_copy).read_text())["files"]["tiny-val-000000.tar"]
    assert len(entries) == hash_cache.MAX_ENTRIES
    assert list(record_of(npy_copy).parent.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"files": 3}', b'{"files": {"tiny-val-000000.tar": [[1]]}}', b"\xff", b"[" * 10**5],
)
def test_damaged_cache_counts_as_empty_and_is_rewritten(content: bytes, npy_copy: Path, read: list[str]) -> None:
    open_split(npy_copy, "val")
    sound = record_of(npy_copy).read_bytes()
    record_of(npy_copy).write_bytes(content)
    open_split(npy_copy, "val")
    assert len(read) == 2
    assert record_of(npy_copy).read_bytes() == sound


def test_nothing_is_written_into_the_data_set(npy_copy: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in npy_copy.iterdir()}
    open_split(npy_copy, "train")
    verify(npy_copy)
    assert {file.name: file.stat().st_mtime_ns for file in npy_copy.iterdir()} == before


@pytest.mark.parametrize("cache", ["a file", "no home"])
def test_every_start_reads_and_warns_without_a_cache(
    cache: str,
    npy_copy: Path,
    tmp_path: Path,
    read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if cache == "a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    for _ in range(2):
        open_split(npy_copy, "train")
    assert len(read) == 2 * len(names_of(npy_copy))
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1
    assert "every start reads all shards; set XDG_CACHE_HOME" in said[0]


def test_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert hash_cache.cache_folder() == Path.home() / ".cache" / "model-zhu" / "verified"


def test_verify_off_reads_nothing_and_still_compares_sizes(npy_copy: Path, read: list[str]) -> None:
    file = npy_copy / "tiny-train-000001.tar"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    for verifies in ("off", "changed"):
        data = DataConfig(path=str(npy_copy), batch_size=16, threads=1, verify=verifies)  # type: ignore[arg-type]
        if verifies == "off":
            build_train_loader(data, device="cpu")
            build_eval_loader(data, split="train", device="cpu")
            assert read == []
            continue
        for build in (build_train_loader, lambda data, device: build_eval_loader(data, split="train", device=device)):
            with pytest.raises(UserError, match=rf"{file.name} does not have the sha256"):
                build(data, device="cpu")
    os.truncate(file, 512)
    with pytest.raises(UserError, match=rf"{file.name} has 512 bytes"):
        open_split(npy_copy, "train", verify="off")


OPENS = """
import sys
from pathlib import Path

from pipelines.storage import hash_cache
from pipelines.storage.open import open_split
"""
COUNTS = f"""
{OPENS}
read, hash_file = [], hash_cache.hash_file
hash_cache.hash_file = lambda *a: (read.append(1), hash_file(*a))[1]
open_split(Path(sys.argv[1]), "train")
print(len(read))
"""


def test_only_one_of_concurrent_processes_reads(npy_copy: Path) -> None:
    command = [sys.executable, "-c", COUNTS, str(npy_copy)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    counts = [int(process.communicate()[0]) for process in processes]
    assert sum(counts) == len(names_of(npy_copy))


HOLDS = f"""
{OPENS}
from pipelines.storage.dataset import load_dataset
import time
folder = Path(sys.argv[1])
with hash_cache.HashCache(folder, load_dataset(folder)).exclusive():
    print("mine", flush=True)
    time.sleep(60)
"""


def test_stopped_process_is_not_awaited(npy_copy: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_cache, "LOCK_TIMEOUT_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLDS, npy_copy], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        open_split(npy_copy, "train")
        assert len(read) == len(names_of(npy_copy))
        holder.kill()


def test_interrupted_check_does_not_read_files_again(
    npy_copy: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "MAX_THREADS", 1)
    hash_file = hash_cache.hash_file

    def interrupted(file: Path, *rest: object) -> hash_cache.HashedFile:
        if len(read) == 2:
            raise KeyboardInterrupt
        return hash_file(file, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(hash_cache, "hash_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_split(npy_copy, "train")
    done = read.copy()
    read.clear()
    open_split(npy_copy, "train")
    assert sorted(done + read) == names_of(npy_copy)


def test_constantly_changing_file_is_refused(npy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = npy_copy / "tiny-val-000000.tar"

    def grow(size: int) -> None:
        with file.open("ab") as opened:
            opened.write(b"\0")

    with pytest.raises(OSError, match="is being changed by another program"):
        hash_cache.hash_file(file, grow)


def test_unreadable_file_is_named_in_the_error(npy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Path, *_: object) -> hash_cache.HashedFile:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hash_cache, "hash_file", broken)
    with pytest.raises(UserError, match=r"tiny-val-000000.tar cannot be read \(Input/output error\)"):
        open_split(npy_copy, "val")
    assert "tiny-val-000000.tar cannot be read (Input/output error)" in verify(npy_copy)


def test_short_checks_print_nothing_without_a_terminal(npy_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_split(npy_copy, "train")
    assert capsys.readouterr() == ("", "")


def test_long_checks_are_announced_in_a_log(
    npy_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_split(npy_copy, "train")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(hash_cache, "NOTE_BYTES", 1)
    open_split(npy_copy, "train")  # cached by now
    assert capsys.readouterr().err == ""
    open_split(npy_copy, "val")
    assert "checking 0 GiB of split 'val', once for each copy of a data set" in capsys.readouterr().err
