"""Ranks of a whole training that fail or are killed, with torchrun and without it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from helpers.chance import seeded
from helpers.launches import (
    NAME,
    Launch,
    arguments,
    assert_same_weights,
    end_of_commands,
    run_unbroken,
    saved_steps,
    wait_until,
)
from tools import convert

EPOCHS = 3
KILLED_EPOCHS = 8  # long enough for a kill after the first hundred steps


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    assert convert.main(["digits", "--out", str(out), "--workers", "1"]) == 0
    return out


def unbroken(ranks: int, digits: Path, tmp_path: Path) -> Path:
    return run_unbroken(digits, tmp_path / "unbroken", ranks, EPOCHS)


def test_data_set_missing_on_one_machine_ends_all_ranks(digits: Path, tmp_path: Path) -> None:
    commands = [arguments(data, tmp_path / "output", 2, EPOCHS) for data in (digits, tmp_path / "nowhere")]
    ended = end_of_commands(tmp_path, commands)
    assert ended.codes == [1, 2]
    assert ended.lines[0].startswith(f"error: data set folder '{tmp_path / 'nowhere'}' does not exist")
    assert ended.lines[0].endswith("(rank 1)")
    assert ended.lines[1].startswith("rank 0 stopped because rank 1 failed: ")
    assert not (tmp_path / "output").exists()


def test_error_on_all_ranks_is_printed_once(digits: Path, tmp_path: Path) -> None:
    ended = end_of_commands(tmp_path, [[*arguments(digits, tmp_path, 2, EPOCHS), "model.name=lenet5"]] * 2)
    assert ended.codes == [2, 2]
    assert len(ended.lines) == 1
    assert "'lenet5' is unknown" in ended.lines[0]


@pytest.mark.slow
def test_run_with_a_killed_rank_completes_under_torchrun(digits: Path, tmp_path: Path) -> None:
    killed_launches_complete(1, 2, digits, tmp_path, kills=1)


@pytest.mark.campaign
def test_runs_of_three_ranks_complete_despite_random_kills(digits: Path, tmp_path: Path) -> None:
    killed_launches_complete(12, 3, digits, tmp_path, kills=3)


def killed_launches_complete(count: int, ranks: int, digits: Path, tmp_path: Path, kills: int) -> None:
    """Start `torchrun --max-restarts` without --resume `count` times, each with up to `kills` SIGKILLs of any rank.

    The first kill comes after the first checkpoint, further ones at any time, also during startup.
    """
    instants = seeded()
    expected = run_unbroken(digits, tmp_path / "unbroken", ranks, KILLED_EPOCHS)
    for number in range(count):
        killed_launch_completes(ranks, digits, tmp_path / str(number), instants, kills)
        assert_same_weights(tmp_path / str(number) / NAME, expected)


def killed_launch_completes(ranks: int, digits: Path, output: Path, instants: random.Random, kills: int) -> None:
    output.mkdir()
    launcher = ["--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={kills}"]
    after = instants.randrange(100)
    with Launch(output.parent, launcher, arguments(digits, output, ranks, KILLED_EPOCHS)) as launch:
        wait_until(lambda: saved_steps(output / NAME) > after)
        assert launch.kill_rank(instants.randrange(ranks)), launch.printed
        for _ in range(instants.randrange(kills)):
            time.sleep(instants.uniform(0.0, 10.0))
            launch.kill_rank(instants.randrange(ranks))
        assert launch.wait(300) == 0, launch.printed
    assert [path.name for path in output.iterdir()] == [NAME]  # it resumed in its own folder
    assert "resumed from" in launch.printed


@pytest.mark.campaign
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_end_within_a_minute_of_a_kill(rank: int, digits: Path, tmp_path: Path) -> None:
    with Launch(tmp_path, ["--standalone", "--nproc_per_node=3"], arguments(digits, tmp_path, 3, 1000)) as launch:
        wait_until(lambda: saved_steps(tmp_path / NAME) > 0)
        workers = launch.workers()
        launch.kill_rank(rank)
        assert launch.wait(60) == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
        assert f"Signal 9 (SIGKILL) received by PID {workers[rank]}" in launch.printed


@pytest.mark.campaign
def test_restart_leaves_another_launch_of_the_name_alone(digits: Path, tmp_path: Path) -> None:
    """Both run at the same time. The later one uses NAME-2, and is killed once."""
    output, launcher = tmp_path / "output", ["--standalone", "--nproc_per_node=1", "--max-restarts=1"]
    expected = unbroken(1, digits, tmp_path)
    with Launch(tmp_path, launcher, arguments(digits, output, 1, EPOCHS)) as first:
        wait_until((output / NAME / "config.yaml").exists)
        with Launch(tmp_path, launcher, arguments(digits, output, 1, EPOCHS)) as second:
            wait_until(lambda: saved_steps(output / f"{NAME}-2") > 20)
            second.kill_rank(0)
            assert second.wait(120) == 0, second.printed
            assert first.wait(120) == 0, first.printed
    assert sorted(path.name for path in output.iterdir()) == [NAME, f"{NAME}-2"]
    assert f"resumed from {output / f'{NAME}-2'}" in second.printed
    assert "resumed" not in first.printed
    for name in (NAME, f"{NAME}-2"):
        assert_same_weights(output / name, expected)


@pytest.mark.campaign
def test_restart_with_fewer_ranks_explains_the_global_batch(digits: Path, tmp_path: Path) -> None:
    folder = run_unbroken(digits, tmp_path / "output", 2, 1)
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["stream"]["global batch"] == 32
    ended = end_of_commands(tmp_path, [arguments(digits, tmp_path / "output", 2, 1, "--resume", "auto")])
    assert ended.codes == [2]
    assert "global batch: 32 then, 16 now" in ended.printed
    assert "restore them, with data.batch_size=32 or train.accumulation_steps=2 for the global batch," in ended.printed
