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
from configs.utils import durable
from configs.utils.errors import UserError
from configs.utils.files import read_record
from train.checkpoint.run_dir import find_run, latest_of, run_folders
from train.distributed import process_group

NOTE = "launch.json"  # in a run folder: who uses it


def agents() -> list[str]:
    """Of all ranks, which must call this together; none without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return sorted(set(process_group.from_all_ranks(_agent(os.getppid()))))


def _agent(pid: int) -> str:
    """A process by what no other one has, on any machine and after any time."""
    started = ""
    with suppress(OSError, IndexError):  # /proc is Linux's; the name, in parentheses, may hold anything
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()} {boot} {pid} {started}"


def find_folder(config: Config, resume: str | None, launch: list[str]) -> tuple[Path | None, str | None]:
    """The folder that this launch uses already, None on its first start; and what to resume from.

    That is the folder itself where it has a checkpoint. Where it has none yet the run begins anew in it, from the
    checkpoint that --resume names, if it does.
    """
    if not launch:
        return None, resume
    folder = next((folder for folder in _candidates(config, resume) if _is_used_by(folder, launch)), None)
    if folder is None:
        return None, resume
    if any(path.exists() for path in latest_of(folder)):
        return folder, str(folder)
    return folder, resume if resume != "auto" else None


def _candidates(config: Config, resume: str | None) -> list[Path]:
    """Folders of this name, the latest first, and the one that --resume names, which may lie anywhere."""
    folder = find_run(config, resume)[0]
    return run_folders(config) if folder is None else [*run_folders(config), folder]


def _is_used_by(folder: Path, launch: list[str]) -> bool:
    try:
        return not set(launch).isdisjoint(json.loads(read_record(folder / NOTE))["agents"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def note(folder: Path, launch: list[str]) -> Path:
    """Write down that this launch uses the folder, which is returned."""
    if launch:
        text = json.dumps({"agents": launch}, indent=2) + "\n"
        try:
            durable.replace(folder / NOTE, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(
                f"cannot write {folder / NOTE} ({error.strerror or error}); give an --output that can be written, "
                "or free space"
            ) from None
    return folder
