"""Turn a converted data set into batches on the device.

A custom training loop needs only `from pipelines import build_train_loader, build_eval_loader`, and a data set from
Python only `from pipelines import write_dataset`. These functions are imported on first use, since converting a data
set needs neither torch nor DALI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.build import build_eval_loader as build_eval_loader
    from pipelines.build import build_train_loader as build_train_loader
    from pipelines.python_source import write_dataset as write_dataset
    from pipelines.rng import view_seed as view_seed

MODULES = {
    "build_eval_loader": "build",
    "build_train_loader": "build",
    "view_seed": "rng",
    "write_dataset": "python_source",
}
__all__ = ["build_eval_loader", "build_train_loader", "view_seed", "write_dataset"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(import_module(f"pipelines.{MODULES[name]}"), name)
