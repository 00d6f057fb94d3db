"""Messages of a run that cannot continue; whole runs that stop and rewind are in tests/faults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.utils.errors import UserError
from helpers.training import alone
from train import trainer
from train.optim.nonfinite import NonFiniteError


def run_with(newest: Path | None, steps: int, written: list[str]) -> Any:
    """Return the fields of a Trainer that `_rewind` reads."""
    saving = SimpleNamespace(newest=newest, steps=steps, wait=lambda: written.append("saved"))
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(on_nonfinite="stop", lr=0.1)), progress={}, saving=saving
    )


@pytest.mark.parametrize(
    ("newest", "steps", "last_good", "advice"),
    [
        (None, 0, "no checkpoint had been written yet", "start again with train.on_nonfinite=rewind"),
        (Path("a/last.pt"), 30, "the last good checkpoint is a/last.pt of step 30",
         "continue from there with --resume auto and train.on_nonfinite=rewind"),
    ],
)  # fmt: skip
def test_rewind_error_names_existing_checkpoint_or_none(
    newest: Path | None, steps: int, last_good: str, advice: str
) -> None:
    written: list[str] = []
    with alone(), pytest.raises(UserError) as error:
        trainer._rewind(run_with(newest, steps, written), NonFiniteError("the loss is", 31, 40))
    assert written == ["saved"]
    assert str(error.value).startswith(f"the loss is not finite in steps 31 to 40; {last_good}; lower train.lr=0.1, ")
    assert str(error.value).endswith(f" or {advice}, which skips these steps")
