"""Support for the stand-in CUDA driver of `make gpu-dry-run`, whose kernels compute nothing."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

IS_STAND_IN = os.environ.get("FAKECUDA") == "1"  # set by its launcher; make exports the driver's folder under this name
FAULT_LOG = Path(os.environ.get("FAKECUDA_LOG", os.devnull))
# Log entries: calls that a real driver rejects, impossible launches, pinned memory written too early.
FAULTS = ("] CAPTURE FAULT:", "] FAULT:", "] RACE:")


def faults() -> list[str]:
    """Return all faults that the stand-in driver has logged so far in any process; none without a log."""
    lines = FAULT_LOG.read_text(errors="replace").splitlines() if FAULT_LOG.is_file() else []
    return [line for line in lines if any(word in line for word in FAULTS)]


def skip_checks_of_values(patch: pytest.MonkeyPatch) -> None:
    """Skip the two checks of a run that fail if kernels compute nothing.

    They check that an evaluation counts all samples, and that losses and weights are finite.
    """
    from train.distributed import collectives
    from train.distributed.process_group import get_world_size
    from train.engine import evaluate
    from train.optim.nonfinite import FiniteCheck

    real = collectives.sum_over_ranks

    def sum_over_ranks(values: Tensor) -> Tensor:
        sums, caller = real(values), sys._getframe(1)
        if caller.f_code is evaluate.evaluate.__code__:
            return torch.tensor([0.0, 0.0, 0.0, caller.f_locals["samples"], 0.0])
        if caller.f_code is FiniteCheck.sums.__code__:
            return torch.tensor([1.0, 0.0, 1.0, float(get_world_size())])
        return sums

    patch.setattr(collectives, "sum_over_ranks", sum_over_ranks)


if __name__ == "__main__":  # python tests/helpers/driver.py SCRIPT ARGUMENT …: run the script without those checks
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(__file__).parents[2])
    if IS_STAND_IN:
        skip_checks_of_values(pytest.MonkeyPatch())
    runpy.run_path(sys.argv[0], run_name="__main__")
