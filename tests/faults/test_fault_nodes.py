"""Two machines: torchrun agents that meet through c10d on the loopback; one agent or its rank is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers.chance import seeded
from helpers.launches import NAME, Launch, arguments, assert_same_weights, run_unbroken, saved_steps, wait_until
from helpers.training import free_port
from tools import convert

EPOCHS = 3
# Without this, a later agent never receives the address of rank 0 (torch 2.15).
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

pytestmark = pytest.mark.campaign  # two agents and two ranks are started twice


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    assert convert.main(["digits", "--out", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_unbroken(digits, tmp_path_factory.mktemp("unbroken") / "output", 2, EPOCHS)


def agents_of(restarts: int) -> tuple[list[str], list[str]]:
    """Return torchrun's arguments on the machine that hosts the rendezvous, and on the other."""
    same = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=zhu",
        "--local-addr=127.0.0.1",
        f"--max-restarts={restarts}",
    ]
    return [*same, "--rdzv-conf=is_host=1"], [*same, "--rdzv-conf=is_host=0"]


@pytest.mark.parametrize("what", ["its rank", "the agent and its rank"])
def test_run_completes_after_a_machine_is_lost_and_returns(
    what: str, digits: Path, tmp_path: Path, unbroken: Path
) -> None:
    after = seeded().randrange(80)
    (host, other), command = agents_of(restarts=3), arguments(digits, tmp_path, 2, EPOCHS)
    with (
        Launch(tmp_path, host, command, **OWN_STORE) as first,
        Launch(tmp_path, other, command, **OWN_STORE) as second,
    ):
        wait_until(lambda: saved_steps(tmp_path / NAME) > after)
        if what == "its rank":
            (rank,) = second.workers()
            second.kill_rank(rank)
            assert [first.wait(200), second.wait(200)] == [0, 0], first.printed + second.printed
        else:
            second.kill_all()
            with Launch(tmp_path, other, command, **OWN_STORE) as third:
                assert [first.wait(200), third.wait(200)] == [0, 0], first.printed + third.printed
    assert (tmp_path / NAME).is_dir()
    assert not (tmp_path / f"{NAME}-2").exists()  # although the new agent's ranks do not know of the earlier start
    assert_same_weights(tmp_path / NAME, unbroken)


def test_lost_machine_ends_the_other_within_a_minute(digits: Path, tmp_path: Path) -> None:
    (host, other), command = agents_of(restarts=0), arguments(digits, tmp_path, 2, 1000)
    with Launch(tmp_path, host, command) as first, Launch(tmp_path, other, command) as second:
        wait_until(lambda: saved_steps(tmp_path / NAME) > 0)
        (lost,) = second.workers()
        second.kill_all()
        assert first.wait(60) == 1
        assert f"stopped because rank {lost} was lost without an error" in first.printed


def test_signal_to_every_agent_ends_the_run_completely(digits: Path, tmp_path: Path) -> None:
    """srun sends it to the agents, which forward it to their ranks."""
    (host, other), command = agents_of(restarts=3), arguments(digits, tmp_path, 2, 1000)
    with Launch(tmp_path, host, command) as first, Launch(tmp_path, other, command) as second:
        wait_until(lambda: saved_steps(tmp_path / NAME) > 0)
        workers = [*first.workers().values(), *second.workers().values()]
        for launch in (first, second):
            launch.process.send_signal(signal.SIGTERM)
        assert first.wait(60) != 0
        assert second.wait(60) != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
