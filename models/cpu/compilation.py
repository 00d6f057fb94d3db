"""Decide whether to compile the training step on a CPU, and keep compiled code for later runs.

Compiling fuses element-wise operations and pooling with their backward passes. Convolutions stay oneDNN's. Of the
built-in models, only LeNet spends enough time outside of its convolutions to become faster.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from configs.schema import Config
from configs.utils.code import is_reference
from configs.utils.files import user_cache

# By model: training images for which the time that compiled steps save exceeds the time to compile them once.
MIN_IMAGES = {"lenet": 500_000}
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class Compilation(NamedTuple):
    """Whether train.compile=auto compiles the training step on a CPU."""

    is_on: bool
    reason: str  # for the log


def choose_compilation(config: Config, images: int, world_size: int, before: bool | None) -> Compilation:
    """Decide whether train.compile=auto compiles the training step on a CPU.

    A resumed run does as its checkpoint says, so that its weights are bitwise those of an uninterrupted run.

    Args:
        config: Config of the run.
        images: Images in training, over all ranks, see `training_images`.
        world_size: Number of ranks.
        before: Whether the run to resume compiled its step on a CPU, or None for a new run.
    """
    if not has_toolchain():
        return Compilation(False, "a C++ compiler and Python's headers are not both installed")
    if before is not None:
        return Compilation(before, "like when the run started")
    if (obstacle := find_obstacle(config, images, world_size)) is not None:
        return Compilation(False, obstacle)
    return Compilation(
        True, f"it saves time in a run of {images:,} images; train.compile=off avoids the different rounding"
    )


def find_obstacle(config: Config, images: int, world_size: int) -> str | None:
    """Return why a new run on a CPU is not compiled, or None. The arguments are those of `choose_compilation`."""
    model, train = config.model.name, config.train
    if model not in MIN_IMAGES:
        return f"on a CPU, compiling is known to save time for {', '.join(MIN_IMAGES)} only"
    unusual = {
        "there are several ranks": world_size > 1,
        f"train.amp={train.amp}": train.amp not in ("auto", "off"),
        "train.loss is your own": is_reference(train.loss),
        "train.proxy.model trains a second model": train.proxy.model is not None,
    }
    if reasons := [reason for reason, holds in unusual.items() if holds]:
        return " and ".join(reasons)
    needed = MIN_IMAGES[model] * (1 + len(config.data.stages))  # one compilation per image size
    return None if images >= needed else f"a run of {images:,} images, fewer than {needed:,}, is over sooner without"


def training_images(config: Config, samples: int) -> int:
    """Return the images in training over all ranks and epochs, or fewer if train.max_steps ends the run early.

    Args:
        config: Config of the run.
        samples: Samples of the training split.
    """
    train, limit = config.train, config.data.limit
    if limit is not None:
        samples = min(samples, limit) if isinstance(limit, int) else round(samples * limit)
    images = (train.epochs - train.first_epoch) * samples * config.data.views
    if train.max_steps is None:
        return images
    return min(images, train.max_steps * train.accumulation_steps * config.data.batch_size * config.data.views)


def has_toolchain() -> bool:
    """Return True if torch can compile for the CPU: it needs $CXX or g++, and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX") or "g++") is not None and headers.exists()


def keep_compiled_code() -> None:
    """Let torch keep compiled code in the user's cache, unless $TORCHINDUCTOR_CACHE_DIR names another folder.

    torch's own default is in the folder for temporary files. The cache is separate for each kind of CPU, since homes
    are shared between machines, and torch compiles for the machine's own instructions but does not record them.
    """
    with suppress(OSError, RuntimeError):  # no home, or not writable: torch's default
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        features = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
        folder = user_cache(f"torch-{hashlib.sha256(repr(features).encode()).hexdigest()[:12]}")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault(CACHE_VARIABLE, str(folder))
