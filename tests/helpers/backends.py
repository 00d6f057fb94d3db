"""Choose how a loader's samples are decoded."""

from __future__ import annotations

import pytest

from pipelines import build
from pipelines.assemble import Way


def use_dali(patch: pytest.MonkeyPatch) -> None:
    """Let DALI decode, as on a GPU."""
    patch.setattr(build, "choose_way", lambda *_: Way(resident=False, by_dali=True, untouched=False))
