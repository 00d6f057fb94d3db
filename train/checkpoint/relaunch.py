"""Find the run folder that a launch used before torchrun restarted its ranks, so that the ranks resume in this folder.

A launch is identified by its launchers, the torchrun processes on its machines. It remains the same launch while one of
them is alive, even if ranks, machines and restart counts change. Other identifiers do not work, since the next launch
may reuse `--rdzv-id`, and TORCHELASTIC_RESTART_COUNT stays 0 if only the number of machines changes. The launcher is
the parent process of a rank, so a script that torchrun starts must `exec` Python. Without torchrun, no rank is
restarted.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from configs.schema import Config
from configs.utils import files
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from configs.utils.process import start_time_ticks
from train.checkpoint.resume import latest_checkpoints, resolve_resume, run_dirs
from train.distributed import collectives

LAUNCH_FILE = "launch.json"  # in a run folder: the launch that uses it


def launcher_ids() -> list[str]:
    """Return the sorted ids of the launchers of all ranks, or an empty list if torchrun is not used.

    All ranks must call this function together.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return sorted(set(collectives.from_all_ranks(_process_id(os.getppid()))))


def _process_id(pid: int) -> str:
    """Return an id for a process on this machine that is unique across machines and reboots."""
    start_time = ""
    with suppress(OSError):
        start_time = str(start_time_ticks(pid))
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()} {boot} {pid} {start_time}"


def find_active_run_dir(config: Config, resume: str | None, launchers: list[str]) -> tuple[Path | None, str | None]:
    """Find the run folder that this launch is already using.

    Args:
        config: Config of the run.
        resume: The value of --resume.
        launchers: Result of `launcher_ids`.

    Returns:
        A tuple (folder, resume). `folder` is the run folder, or None if this launch is not using one yet. `resume`
        replaces the value of --resume. It is the path of `folder` as a string if `folder` contains a checkpoint, and
        None if `folder` does not contain one and --resume is "auto". Otherwise, the value is unchanged.
    """
    if not launchers:
        return None, resume
    folder = next((folder for folder in _candidates(config, resume) if _is_used_by(folder, launchers)), None)
    if folder is None:
        return None, resume
    if any(path.exists() for path in latest_checkpoints(folder)):
        return folder, str(folder)
    return folder, resume if resume != "auto" else None


def _candidates(config: Config, resume: str | None) -> list[Path]:
    """Return the folders of `run_dirs`, followed by the folder that --resume refers to, if any."""
    folder = resolve_resume(config, resume)[0]
    return run_dirs(config) if folder is None else [*run_dirs(config), folder]


def _is_used_by(folder: Path, launchers: list[str]) -> bool:
    try:
        return not set(launchers).isdisjoint(json.loads(read_small_text(folder / LAUNCH_FILE))["agents"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def record_launch(folder: Path, launchers: list[str]) -> Path:
    """Record in launch.json that this launch uses the run folder, and return the folder.

    If `launchers` is empty, launch.json is not written.

    Raises:
        UserError: launch.json cannot be written.
    """
    if launchers:
        text = json.dumps({"agents": launchers}, indent=2) + "\n"
        try:
            files.atomic_write(folder / LAUNCH_FILE, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(
                f"cannot write {folder / LAUNCH_FILE} ({error.strerror or error}); give an --output that can be "
                "written, or free space"
            ) from None
    return folder
