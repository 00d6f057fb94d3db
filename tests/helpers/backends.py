"""Backends of loaders under test."""

from __future__ import annotations

import pytest

from pipelines import build
from pipelines.gpu.dali_backend import DaliBackend


def use_dali(patch: pytest.MonkeyPatch) -> None:
    """Use the DALI graph on the CPU too, as on a GPU."""
    patch.setattr(build, "choose_backend", DaliBackend)
