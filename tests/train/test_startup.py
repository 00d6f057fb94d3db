"""What a run imports before its first step, and how long this takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers.training import CLEAN, DIGITS, ROOT, Run

UNUSED = [
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torchvision", "timm", "nvidia.dali", "triton", "sympy"),
    *("wandb", "tensorboard", "matplotlib", "sklearn", "pandas", "h5py", "onnx", "onnxruntime", "onnxscript"),
]
PROGRAM = f"""
import gc, sys
from contextlib import contextmanager
from train import ddp

def detail(log, message):
    if message.startswith("first step after"):
        print("imported:", *[name for name in {UNUSED} if name in sys.modules])
        print("collector:", gc.isenabled(), gc.get_freeze_count() > 100_000)
        sys.exit()

@contextmanager
def importing_torch(real=ddp.importing_torch):
    with real():
        yield
    from train.reporting.run_log import RunLog
    RunLog.detail = detail

ddp.importing_torch = importing_torch
ddp.main()
"""


def test_first_step_needs_no_large_package_besides_torch_and_numba(digits_run: Run, tmp_path: Path) -> None:
    settings = [str(DIGITS), f"data.path={digits_run.data}", f"output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *settings],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**CLEAN, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.splitlines()[-2:] == ["imported:", "collector: True True"], done.stdout + done.stderr


def test_log_states_the_time_to_the_first_step_once(digits_run: Run) -> None:
    log = (digits_run.folder / "log.txt").read_text()
    (first,) = re.findall(r"first step after ([\d.]+) s\n", log)
    assert 0 < float(first) < float(re.findall(r"whole command ([\d.]+) s\n", log)[0])
