"""Shared fixtures: two tiny data sets, converted once per session, and real images where available."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from configs.utils.errors import run_main
from helpers import own_cache  # noqa: F401 (before anything that copies the environment)
from helpers.driver import FAULT_LOG, IS_STAND_IN, faults, skip_checks_of_values
from helpers.memory_source import tiny_source, write
from helpers.ray_cluster import RayCluster
from helpers.training import DIGITS, Run, run_script
from tools import convert
from train import ddp

try:
    from hypothesis import settings
except ImportError:  # on a GPU machine without a package index, where the tests marked gpu still run
    pass
else:
    settings.register_profile("project", deadline=None, derandomize=True)  # a slow machine is not an error
    settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu on a machine without a GPU.

    Tests of a capture that must fail run last, since a process may be unable to capture after a failed capture.
    """
    items.sort(key=lambda item: "failed_capture" in getattr(item, "fixturenames", ()))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


_expected_faults: list[str] = []


@pytest.fixture
def failed_capture() -> None:
    """Mark tests of a capture that must fail, which the stand-in driver may report."""


@pytest.fixture(autouse=True)
def _no_driver_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under the stand-in driver, fail a test during which it reported a fault."""
    if not IS_STAND_IN:
        yield
        return
    before = len(faults())
    # Not the fixture monkeypatch, which would then be undone after the patches of every other fixture.
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("gpu"):
            skip_checks_of_values(patch)
        yield
    found = faults()[before:]
    if "failed_capture" in request.fixturenames:
        _expected_faults.extend(found)
    else:
        assert not found, "\n".join(found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under the stand-in driver, fail a run with any other fault, e.g. in a shared fixture."""
    if IS_STAND_IN and len(faults()) > len(_expected_faults):
        print(f"faults of the driver in {FAULT_LOG}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: OpenMP's barriers would cost more than the work


@pytest.fixture(scope="session")
def npy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 / 107 / 41 marked images of 32x32 (see memory_source); read only."""
    out = tmp_path_factory.mktemp("npy") / "tiny"
    write(tiny_source("npy"), out, "npy")
    return out


@pytest.fixture(scope="session")
def jpeg_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """520 / 53 / 9 JPEG files of different sizes; read only."""
    out = tmp_path_factory.mktemp("jpeg") / "tiny"
    write(tiny_source("jpeg"), out, "jpeg")
    return out


@pytest.fixture
def npy_copy(npy_data: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(npy_data, tmp_path / "npy"))


@pytest.fixture
def jpeg_copy(jpeg_data: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(jpeg_data, tmp_path / "jpeg"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images of {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LeNet, trained for two epochs on the digits; read only."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "digits"
    convert.main(["digits", "--out", str(data)])
    result = run_script("--cfg", DIGITS, "--data-path", data, "--output", folder, "--opts", "train.epochs=2")
    assert result.returncode == 0, result.stderr
    return Run(folder / "digits_lenet", data)


@pytest.fixture(scope="module")
def _started_cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(_started_cluster: RayCluster) -> RayCluster:
    """A Ray cluster of three nodes with one CPU each. Killed nodes are replaced before the next test."""
    _started_cluster.restore()
    return _started_cluster


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run train/ddp.py like its script, but in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*command: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train/ddp.py", *map(str, command)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(ddp.main)
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
