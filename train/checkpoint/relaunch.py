"""A launch whose ranks torchrun starts again goes on by itself: in the folder that it uses already, and in no other.

A launch is known by its agents, the torchrun processes of its machines. As long as one of them lives it is the same
launch, whichever ranks, machines and numbers of starts come and go: `--rdzv-id` may be used again by the next launch,
and TORCHELASTIC_RESTART_COUNT stays 0 where only the number of machines has changed. An agent is what started this
process, so that a script between the two must `exec`. Without torchrun nothing is started again, and nothing is noted.
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
from train.checkpoint.run_dir import latest_checkpoints, resolve_resume, run_dirs
from train.distributed import collectives

LAUNCH_FILE = "launch.json"  # in a run folder: who uses it


def launcher_ids() -> list[str]:
    """Of all ranks, which must call this together; none without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return sorted(set(collectives.from_all_ranks(_launcher_id(os.getppid()))))


def _launcher_id(pid: int) -> str:
    """A process by what no other one has, on any machine and after any time."""
    started = ""
    with suppress(OSError, IndexError):  # /proc is Linux's; the name, in parentheses, may hold anything
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()} {boot} {pid} {started}"


def find_active_run_dir(config: Config, resume: str | None, launcher_ids: list[str]) -> tuple[Path | None, str | None]:
    """The folder that this launch uses already, None on its first start; and what to resume from.

    That is the folder itself where it has a checkpoint. Where it has none yet the run begins anew in it, from the
    checkpoint that --resume names, if it does.
    """
    if not launcher_ids:
        return None, resume
    folder = next((folder for folder in _candidates(config, resume) if _is_used_by(folder, launcher_ids)), None)
    if folder is None:
        return None, resume
    if any(path.exists() for path in latest_checkpoints(folder)):
        return folder, str(folder)
    return folder, resume if resume != "auto" else None


def _candidates(config: Config, resume: str | None) -> list[Path]:
    """Folders of this name, the latest first, and the one that --resume names, which may lie anywhere."""
    folder = resolve_resume(config, resume)[0]
    return run_dirs(config) if folder is None else [*run_dirs(config), folder]


def _is_used_by(folder: Path, launcher_ids: list[str]) -> bool:
    try:
        return not set(launcher_ids).isdisjoint(json.loads(read_small_text(folder / LAUNCH_FILE))["agents"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def record_launch(folder: Path, launcher_ids: list[str]) -> Path:
    """Write down that this launch uses the folder, which is returned."""
    if launcher_ids:
        text = json.dumps({"agents": launcher_ids}, indent=2) + "\n"
        try:
            files.atomic_write(folder / LAUNCH_FILE, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(
                f"cannot write {folder / LAUNCH_FILE} ({error.strerror or error}); give an --output that can be "
                "written, or free space"
            ) from None
    return folder
