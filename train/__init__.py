"""Train image classifiers.

From Python: `from train import fit`, and `Run` for a run that exists already. These names are imported on first use,
since the command line answers --help and wrong arguments without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.python_api import Run as Run
    from train.python_api import fit as fit

__all__ = ["Run", "fit"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train import python_api

    return getattr(python_api, name)
