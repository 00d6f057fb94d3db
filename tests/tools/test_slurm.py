"""tools/slurm.sbatch without Slurm, whose commands are replaced by scripts that record their arguments."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.launcher import api as launcher

from helpers.launches import NAME, arguments, assert_same_weights, run_unbroken, saved_steps, wait_until
from helpers.training import CLEAN, ROOT, free_port
from tools import convert

SCRIPT = ROOT / "tools" / "slurm.sbatch"
STUBS = {
    "srun": 'echo "srun $*" >> calls; while [[ "$1" == --* ]]; do shift; done; echo $$ > step; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" = show ] && echo 127.0.0.1; true',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat step)"',
}
# A training that ends with the code in a file, or on SIGTERM like torchrun.
TRAINING = """
echo "training $*" >> calls; trap "exit 1" TERM; touch started
while [ ! -f code ]; do sleep 0.05; done; exit "$(cat code)"
"""


class Job:
    """A job that Slurm starts on two machines. The stubs write to its working folder."""

    def __init__(
        self, folder: Path, *command: str, python: str = "training", scontrol: str = "true", **variables: str
    ) -> None:
        """Write the stubs. scontrol: commands that scontrol runs before it answers."""
        self.folder = folder
        bin_folder = folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        stubs = {**STUBS, "training": TRAINING, "scontrol": f"{scontrol}; {STUBS['scontrol']}"}
        for name, text in stubs.items():
            (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (bin_folder / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "gpu[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
        }
        environment = {
            **CLEAN,
            **slurm,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "ZHU_PYTHON": python,
            **variables,
        }
        (folder / "train").exists() or (folder / "train").symlink_to(ROOT / "train")
        self.printed = folder / "printed"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *command],
            cwd=folder,
            env=environment,
            stdout=self.printed.open("a"),
            stderr=subprocess.STDOUT,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def end(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()


def test_job_starts_torchrun_on_every_machine_with_resume(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("0")
    job = Job(tmp_path, "--cfg", "my config.yaml", "--opts", "name=a", SLURM_RESTART_COUNT="3")
    assert job.end() == 0
    show, srun, training = job.calls
    assert show == "scontrol show hostnames gpu[1-2]"
    assert srun.startswith("srun --kill-on-bad-exit=1 training -m torch.distributed.run --nnodes=2 --nproc-per-node=8 ")
    assert "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:24242 --rdzv-id=4242-3 --max-restarts=3" in training
    assert training.endswith("train/ddp.py --resume auto --cfg my config.yaml --opts name=a")
    assert "the training is complete" in job.printed.read_text()


def test_torchrun_accepts_every_option_of_the_job(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    (tmp_path / "code").write_text("0")
    job = Job(tmp_path, "--cfg", "x.yaml")
    assert job.end() == 0
    words = job.calls[-1].split()
    parsed = get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 3)
    assert parsed.training_script_args == ["--resume", "auto", "--cfg", "x.yaml"]


def test_ranks_get_most_of_the_warning_time_to_stop() -> None:
    script = SCRIPT.read_text()
    lead_s, shutdown_s = (
        int(re.search(pattern, script, re.MULTILINE)[1])  # type: ignore[index]
        for pattern in (r"^#SBATCH --signal=B:USR1@(\d+)$", r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$")
    )
    assert lead_s / 2 < shutdown_s < lead_s
    if "shutdown_timeout" in inspect.signature(launcher.LaunchConfig).parameters:  # torch 2.11 has none
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in inspect.getsource(launcher)


@pytest.mark.parametrize(
    ("asked", "restarts", "code", "requeued"),
    [(signal.SIGUSR1, "0", 0, True), (signal.SIGUSR1, "100", 1, False), (signal.SIGTERM, "0", 1, False)],
    ids=["a warning", "a warning too many", "cancelled"],
)
def test_signal_becomes_sigterm_and_a_warning_requeues_the_job(
    asked: signal.Signals, restarts: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    job = Job(tmp_path, SLURM_RESTART_COUNT=restarts)
    wait_until((tmp_path / "started").exists)
    job.process.send_signal(asked)
    assert job.end() == code
    assert "scancel --signal=TERM 4242.0" in job.calls
    assert ("scontrol requeue 4242" in job.calls) == requeued


def test_early_signal_stops_the_step_once_it_exists(tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    job = Job(tmp_path, scontrol="touch asked; while [ -f wait ]; do sleep 0.05; done")
    wait_until((tmp_path / "asked").exists)
    job.process.send_signal(signal.SIGUSR1)
    (tmp_path / "wait").unlink()
    assert job.end() == 0
    assert "scancel --signal=TERM 4242.0" in job.calls
    assert "scontrol requeue 4242" in job.calls


def test_training_that_completes_after_the_warning_is_not_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path)
    wait_until((tmp_path / "started").exists)
    (tmp_path / "bin" / "scancel").write_text("#!/bin/bash\necho 0 > code\n")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 0
    assert "scontrol requeue 4242" not in job.calls


def test_failed_training_ends_the_job_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("7")
    job = Job(tmp_path)
    assert job.end() == 7
    assert "scontrol requeue 4242" not in job.calls


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_script_passes_shellcheck() -> None:
    subprocess.run(["shellcheck", "--shell=bash", SCRIPT], check=True)


@pytest.mark.campaign
def test_requeued_training_completes_with_the_same_weights(tmp_path: Path) -> None:
    data, epochs = tmp_path / "digits", 4
    assert convert.main(["digits", "--out", str(data), "--workers", "1"]) == 0
    expected = run_unbroken(data, tmp_path / "unbroken", 1, epochs)
    output = tmp_path / "output"
    variables = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": str(free_port())}
    for restarts in range(2):
        job = Job(
            tmp_path,
            *arguments(data, output, 1, epochs),
            python=sys.executable,
            SLURM_RESTART_COUNT=str(restarts),
            **variables,
        )
        if restarts == 0:
            wait_until(lambda: saved_steps(output / NAME) > 20)
            job.process.send_signal(signal.SIGUSR1)
        assert job.end() == 0, job.printed.read_text()
    assert job.calls.count(f"scontrol requeue {variables['SLURM_JOB_ID']}") == 1
    printed = job.printed.read_text()
    assert printed.index("requeueing the job") < printed.index("resumed from") < printed.index("training is complete")
    assert [path.name for path in output.iterdir()] == [NAME]
    assert_same_weights(output / NAME, expected)
