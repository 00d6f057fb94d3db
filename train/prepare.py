"""Convert the data set of a config before a run, if it is missing (`train/ddp.py --prepare`)."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path

from configs.utils.errors import UserError
from configs.utils.process import acquire_lock, die_with_parent
from pipelines.storage.dataset import convert_hint, is_hdf5, known_conversion

CONVERT = Path(__file__).parents[1] / "tools" / "convert.py"
POLL_S = 0.1


def prepare_dataset(folder: Path, local_rank: int) -> None:
    """Convert the data set that the configs of this project expect in `folder`, unless it is there.

    The conversion runs as its own process, and continues an interrupted one. Rank 0 of each machine converts, the
    others wait; if it fails, the launcher stops them. Runs and machines that share a disk take turns.

    Args:
        folder: Folder of the data set. Its name determines the source.
        local_rank: Rank of this process on its machine.

    Raises:
        UserError: The source of the data set is unknown, or the conversion fails.
    """
    if is_hdf5(folder):  # read in place
        return
    file = folder / "dataset.json"
    while local_rank > 0 and not file.exists():
        time.sleep(POLL_S)
    if file.exists():
        return
    words = known_conversion(folder)
    if words is None:
        raise UserError(f"--prepare cannot get the data set {str(folder)!r}; {convert_hint(folder)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.prepare").open("ab") as lock:
        with suppress(OSError):  # a file system without locks
            acquire_lock(lock, timeout_s=inf, is_inherited=False)
        if not file.exists():
            _convert(words)


def _convert(words: list[str]) -> None:
    """Run tools/convert.py. Raises UserError if it fails; it has then printed why."""
    shown = shlex.join(["zhu", "convert", *words])
    print(f"preparing the data set: {shown}", flush=True)
    end_with_parent = partial(die_with_parent, signal.SIGTERM, os.getpid())
    status = subprocess.run([sys.executable, CONVERT, *words], check=False, preexec_fn=end_with_parent).returncode
    if status != 0:
        raise UserError(f"--prepare failed: `{shown}` exited with status {status}, see its message above")
