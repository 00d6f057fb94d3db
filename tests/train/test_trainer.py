"""Messages of a run that cannot continue; whole runs that stop and rewind are in tests/faults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.utils.errors import UserError
from helpers.training import alone
from train.checkpoint.progress import Progress
from train.optim.nonfinite import NonFiniteError
from train.trainer import Trainer


def trainer_with(newest: Path | None, steps: int, written: list[str]) -> Any:
    """Return the parts of a Trainer that `_rewind` reads."""
    trainer = SimpleNamespace(
        checkpoints=SimpleNamespace(newest=newest, steps=steps, wait=lambda: written.append("saved")),
        config=SimpleNamespace(train=SimpleNamespace(on_nonfinite="stop", lr=0.1)),
        run=SimpleNamespace(progress=Progress()),
    )
    trainer._last_checkpoint = lambda: Trainer._last_checkpoint(trainer)  # type: ignore[arg-type]
    return trainer


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
        Trainer._rewind(trainer_with(newest, steps, written), NonFiniteError("the loss is", 31, 40))
    assert written == ["saved"]
    assert str(error.value).startswith(f"the loss is not finite in steps 31 to 40; {last_good}; lower train.lr=0.1, ")
    assert str(error.value).endswith(f" or {advice}, which skips these steps")
