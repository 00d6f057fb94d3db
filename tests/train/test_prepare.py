"""--prepare: a missing data set is converted once, by one process, before training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.utils.errors import UserError
from helpers.training import CLEAN, DIGITS, ROOT, command_line
from train import prepare
from train.prepare import prepare_dataset

# Takes the place of tools/convert.py: counts its calls in a file, and takes a while.
FAKE = """
import sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
with Path("calls").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(0.5)
out.mkdir()
(out / "dataset.json").touch()
"""
CALL = """
import sys
from pathlib import Path
from train import prepare
prepare.CONVERT = Path(sys.argv[1])
prepare.prepare_dataset(Path("data/cifar10"), int(sys.argv[2]))
print((Path("data/cifar10") / "dataset.json").exists())
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return script


def test_one_of_several_processes_converts_and_all_wait(fake: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [0, 1, 0, 2]  # of two machines with one disk
    processes = [
        subprocess.Popen([sys.executable, "-c", CALL, fake, rank], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in map(str, ranks)
    ]
    printed = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert printed == ["True"] * len(ranks)
    assert Path("calls").read_text() == "cifar10 --download --out data/cifar10\n"


def test_present_data_set_is_left_alone(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CONVERT", fake)
    folder = Path("data/mine")
    folder.mkdir(parents=True)
    (folder / "dataset.json").touch()
    for rank in (0, 1):
        prepare_dataset(folder, rank)
    assert [file.name for file in Path("data").iterdir()] == ["mine"]
    assert not Path("calls").exists()


def test_failed_conversion_is_an_error_that_names_the_command(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CONVERT", fake)
    fake.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match=r"`zhu convert digits --out data/digits` exited with status 2"):
        prepare_dataset(Path("data/digits"), 0)


@pytest.mark.parametrize("name", ["photos", "medium-imagenet-96"])
def test_data_set_of_unknown_source_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--prepare cannot get the data set .*; .*convert "):
        prepare_dataset(tmp_path / name, 0)
    assert list(tmp_path.iterdir()) == []


def test_converter_ends_with_its_parent(fake: Path) -> None:
    fake.write_text("import os, time; open('started', 'w').write(str(os.getpid())); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", CALL, fake, "0"], env=environment) as parent:
        while not (Path("started").exists() and Path("started").read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    child = Path("/proc") / Path("started").read_text()
    end = time.monotonic() + 30
    while child.exists() and "(zombie)" not in (child / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_training_prepares_the_digits_first(tmp_path: Path, processes: int) -> None:
    arguments = ["--cfg", DIGITS, "--output", tmp_path, "--data-path", tmp_path / "data/digits", "--prepare"]
    command = command_line(*arguments, "--opts", "train.epochs=1", processes=processes)
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=CLEAN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("preparing the data set: zhu convert digits --out") == 1
    assert (tmp_path / "digits_lenet/best.pt").is_file()


@pytest.mark.slow
def test_download_error_without_a_network_is_clear(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/cifar10_lenet.yaml", tmp_path)
    command = command_line("--cfg", "cifar10_lenet.yaml", "--prepare")
    environment = {**CLEAN, "https_proxy": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert result.returncode == 2
    first, last = result.stderr.splitlines()
    assert first.startswith("error: cannot download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz")
    assert "check the network, or fetch it by other means and pass it as --source data/raw/cifar-10-python" in first
    assert last.startswith("error: --prepare failed: `zhu convert cifar10 --download --out data/cifar10`")
