"""Killed runs, damaged checkpoints, changed settings and full disks: nothing is lost or silently changed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.utils.warnings import warn
from helpers.chance import seeded
from helpers.recorded_runs import (
    differences,
    exit_code,
    kill_when,
    printed,
    run,
    samples_of,
    saved_position,
    start,
    start_ranks,
    wait_until,
)
from helpers.training import DIGITS
from pipelines.interfaces import Position
from tools import convert
from train.checkpoint import store

Call = Callable[..., tuple[int, str, str]]
STEPS_PER_EPOCH = 44  # 1,437 samples in global batches of 32
OPTIONS = [
    "train.epochs=2",
    "train.warmup_epochs=0",
    "train.lr=3e-3",
    "train.save_every_steps=6",
    "data.batch_size=32",
    "aug.crop=pad",
    "aug.padding=2",
    "aug.flip=0.5",
    "model.drop_rate=0.2",
    "log.every_steps=10",
]


def arguments(data: Path, output: Path, *options: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", "--opts", *OPTIONS, *options]


@pytest.fixture(scope="session")
def fault_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, converted. Do not modify."""
    out = tmp_path_factory.mktemp("faults") / "digits"
    assert convert.main(["digits", "--out", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def unbroken(fault_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, with its notes beside it."""
    output = tmp_path_factory.mktemp("unbroken")
    assert run(arguments(fault_digits, output), output / "notes") == 0, printed(output / "notes")
    assert len(samples_of(output / "notes")) == 2 * STEPS_PER_EPOCH * 32
    return output / "digits_lenet"


@pytest.fixture
def interrupted(fault_digits: Path, tmp_path: Path) -> Path:
    """The folder of a run that was killed in its first epoch, with its notes beside it."""
    process = start(arguments(fault_digits, tmp_path), tmp_path / "notes", step_s=0.03)
    assert kill_when(lambda: saved_position(tmp_path / "digits_lenet") > (0, 9), process)
    return tmp_path / "digits_lenet"


def assert_ends_like(ours: Path, unbroken: Path) -> None:
    assert differences(ours, unbroken) == []
    assert samples_of(ours.parent / "notes") == samples_of(unbroken.parent / "notes")


def steps_of(position: tuple[int, int]) -> int:
    return position[0] * STEPS_PER_EPOCH + position[1]


# Kills


def kill_repeatedly(kills: int, data: Path, unbroken: Path, tmp_path: Path) -> None:
    """Kill and resume runs `kills` times, and compare their ends with the uninterrupted run.

    Half of the kills come at any time, the others while a checkpoint is being written.
    """
    instants = seeded()
    done = in_saves = chains = 0
    while done < kills:
        chains += 1
        output = tmp_path / f"chain-{chains}"
        output.mkdir()
        every, flush_s = instants.choice([1, 2, 5]), instants.choice([0.0, 0.05])
        command = arguments(data, output, f"train.save_every_steps={every}")
        notes, folder, stood = output / "notes", output / "digits_lenet", (-1, 0)
        for number in range(min(10, kills - done)):
            delay_s, steps = instants.uniform(0.5, 2.5), steps_of(stood) + instants.randrange(1, 12)
            waits_for_a_save = number % 2 == 0
            instant = in_a_save(folder, steps) if waits_for_a_save else after(delay_s)
            if not kill_when(instant, start(command, notes, flush_s=flush_s)):
                break
            done += 1
            in_saves += waits_for_a_save and is_being_written(folder)  # otherwise the file may be from an earlier kill
            if has_checkpoint(folder):
                position = saved_position(folder)  # it could be loaded
                assert position >= stood
                assert last_step(notes) - steps_of(position) <= 2 * every  # including the save in progress
                stood = position
            else:
                assert stood == (-1, 0)
        assert run(command, notes) == 0, printed(notes)
        assert_ends_like(folder, unbroken)
    print(f"{done} kills in {chains} chains, {in_saves} of them surely while a checkpoint was written")
    assert in_saves >= kills // 4


def after(delay_s: float) -> Callable[[], bool]:
    begin = time.monotonic()
    return lambda: time.sleep(0.001) or time.monotonic() - begin > delay_s  # type: ignore[func-returns-value]


def in_a_save(folder: Path, steps: int) -> Callable[[], bool]:
    """Return a condition: the first checkpoint after `steps` steps is being written."""
    is_near = False

    def is_now() -> bool:
        nonlocal is_near
        is_near = is_near or steps_of(saved_position(folder)) >= steps
        return is_near and is_being_written(folder)

    return is_now


def is_being_written(folder: Path) -> bool:
    return (folder / "last.pt.tmp").exists()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("last.pt", "previous.pt"))


def last_step(notes: Path) -> int:
    """Return the last optimizer step that was started, counted from 0."""
    return max(epoch * STEPS_PER_EPOCH + position // 32 for epoch, position in samples_of(notes))


@pytest.mark.slow
def test_repeatedly_killed_run_ends_like_the_unbroken_one(fault_digits: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_repeatedly(2, fault_digits, unbroken, tmp_path)


@pytest.mark.campaign
def test_fifty_kills_at_any_time_lose_nothing(fault_digits: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_repeatedly(50, fault_digits, unbroken, tmp_path)


# Damage


def flip_bits(flips: int, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flip single bits of a last.pt, each time another one."""
    places = seeded()
    last, previous = (tmp_path / name for name in ("last.pt", "previous.pt"))
    whole, before = (run_folder / "last.pt").read_bytes(), {"epoch": 1, "step": 40}
    store.write(previous, store.load(run_folder / "last.pt") | {"position": before})
    for _ in range(flips):
        place, bit = places.randrange(len(whole)), places.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        last.write_bytes(damaged)
        warn.cache_clear()  # a warning is printed only once
        path, content = store.load_newest([last, previous])
        assert (path, content["position"]) == (previous, before), f"bit {bit} of byte {place}"
        message = capsys.readouterr().err
        assert message.startswith(f"warning: checkpoint {last} cannot be read ("), f"bit {bit} of byte {place}"
        assert message.endswith(f"; {previous} is used instead\n")


def test_flipped_bit_is_found_and_previous_checkpoint_used(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bits(40, unbroken, tmp_path, capsys)


@pytest.mark.campaign
def test_two_hundred_flipped_bits_are_found(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bits(200, unbroken, tmp_path, capsys)


@pytest.mark.slow
def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    interrupted: Path, fault_digits: Path, unbroken: Path
) -> None:
    command, notes = arguments(fault_digits, interrupted.parent), interrupted.parent / "notes"
    earlier = (interrupted / "last.pt").read_bytes()
    position = saved_position(interrupted)
    assert kill_when(lambda: saved_position(interrupted) > (1, 3), start(command, notes, step_s=0.03))
    store.recover_interrupted_save(interrupted)
    (interrupted / "previous.pt").write_bytes(earlier)
    with (interrupted / "last.pt").open("r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    assert run(command, notes) == 0, printed(notes)
    last, previous = interrupted / "last.pt", interrupted / "previous.pt"
    assert f"warning: checkpoint {last} cannot be read (its checksum is wrong" in printed(notes)
    assert f"; {previous} is used instead" in printed(notes)
    assert f"resumed from {previous} at {Position(*position)}\n" in printed(notes)
    assert_ends_like(interrupted, unbroken)


# Settings that changed


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """Copy a run folder and its notes to another output folder."""
    for notes in folder.parent.glob("notes.*"):
        shutil.copy(notes, tmp_path)
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def test_changed_settings_are_refused_by_name_and_change_nothing(
    unbroken: Path, fault_digits: Path, tmp_path: Path, call: Call
) -> None:
    folder, other = copy_of(unbroken, tmp_path), tmp_path / "digits"
    assert convert.main(["digits", "--out", str(other), "--workers", "1", "--shard-mib", "1"]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    for data, options, names in (
        (fault_digits, ["data.batch_size=16"], ["global batch: 32 then, 16 now"]),
        (fault_digits, ["seed=1"], ["seed: 0 then, 1 now"]),
        (other, [], ["data set: shards of split train: 1 then, ", "data set: shard list of split train: "]),
        (
            fault_digits,
            ["model.name=resnet18", "model.options={width: 8}"],
            ['model.options: {} then, {"width": 8} now'],
        ),
        (fault_digits, ["train.schedule=constant"], ['train.schedule: "cosine" then, "constant" now']),
        (fault_digits, ["train.epochs=5"], ["train.epochs: 2 then, 5 now"]),
    ):
        code, out, err = call(*arguments(data, tmp_path, *options))
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith(f"error: cannot resume from {folder / 'last.pt'}, since settings differ (")
        for name in names:
            assert name in err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before


def test_other_threads_prefetch_and_placement_give_the_same_run(
    interrupted: Path, fault_digits: Path, unbroken: Path
) -> None:
    options = ["data.threads=3", "data.prefetch=1", "data.placement=host", "train.save_every_steps=7"]
    notes = interrupted.parent / "notes"
    assert run(arguments(fault_digits, interrupted.parent, *options), notes) == 0, printed(notes)
    assert_ends_like(interrupted, unbroken)


def test_other_world_size_sees_the_same_stream(interrupted: Path, fault_digits: Path, unbroken: Path) -> None:
    cut = ["data.batch_size=8", "train.accumulation_steps=2"]
    notes = interrupted.parent / "notes"
    ranks = start_ranks(arguments(fault_digits, interrupted.parent, *cut), notes, world_size=2)
    assert [exit_code(rank) for rank in ranks] == [0, 0], printed(notes)
    assert "2 x cpu" in printed(notes)
    assert samples_of(notes) == samples_of(unbroken.parent / "notes")


# Disks


def assert_ended_by(reason: str, code: int | None, folder: Path, notes: Path) -> None:
    """Check that the run ended with one clear sentence, and that all checkpoints can be loaded."""
    assert code == 2, printed(notes)
    assert "Traceback" not in printed(notes)
    errors = [line for line in printed(notes).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: cannot write checkpoint {folder}/")
    assert f" ({reason}); the earlier last.pt " in errors[0]
    assert errors[0].endswith("then resume with --resume auto")
    for path in folder.glob("*.pt"):
        store.load(path)


def test_exceeded_quota_is_one_error_and_the_run_resumes(interrupted: Path, fault_digits: Path, unbroken: Path) -> None:
    command, notes = arguments(fault_digits, interrupted.parent), interrupted.parent / "notes"
    store.recover_interrupted_save(interrupted)  # as the next run would: the kill may have interrupted a save
    before = {path.name: path.read_bytes() for path in interrupted.glob("*.pt")}
    code = run(command, notes, largest=300_000)  # bytes, a third of a checkpoint
    assert_ended_by("File too large", code, interrupted, notes)
    assert list(interrupted.glob("*.pt.tmp")) == []
    assert {path.name: path.read_bytes() for path in interrupted.glob("*.pt")} == before
    assert run(command, notes) == 0, printed(notes)
    assert_ends_like(interrupted, unbroken)


def mount(*options: str | Path) -> None:
    """Mount, or skip the test if this user or system cannot."""
    done = subprocess.run(["mount", *map(str, options)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@contextmanager
def mounted(*options: str | Path) -> Iterator[None]:
    """Mount at the last of the options."""
    mount(*options)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(options[-1])], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=2500k", "none", folder):
        yield folder


@pytest.mark.campaign
@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_full_disk_is_one_error_and_the_run_resumes(
    disk: Path, fault_digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    command, notes, folder = arguments(fault_digits, disk), tmp_path / "notes", disk / "digits_lenet"
    code = run(command, notes)
    assert_ended_by("No space left on device", code, folder, notes)
    assert list(folder.glob("*.pt.tmp")) == []
    mount("-o", "remount,size=20m", disk)
    assert run(command, notes) == 0, printed(notes)
    assert differences(folder, unbroken) == []
    assert samples_of(notes) == samples_of(unbroken.parent / "notes")


@pytest.mark.campaign
@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_read_only_folder_is_one_error_and_the_run_resumes(
    interrupted: Path, fault_digits: Path, unbroken: Path
) -> None:
    command, notes = arguments(fault_digits, interrupted.parent), interrupted.parent / "notes"
    closed = interrupted.parent / "closed"
    closed.mkdir()
    with mounted("--bind", interrupted, closed):
        mount("-o", "remount,bind,ro", closed)
        process = start(command, notes)
        wait_until(lambda: saved_position(interrupted) > (0, 30), process)
        with mounted("--bind", closed, interrupted):
            code = exit_code(process)
    assert_ended_by("Read-only file system", code, interrupted, notes)
    assert run(command, notes) == 0, printed(notes)
    assert_ends_like(interrupted, unbroken)
