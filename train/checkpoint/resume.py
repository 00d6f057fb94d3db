"""Find run folders (OUTPUT/NAME), and the checkpoints to resume from.

Lists of checkpoints are in order of preference, since the first one may be damaged.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from configs import yaml
from configs.load import parse_config
from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from train.checkpoint.store import BEST, LAST, PREVIOUS, epoch_files

LOCK_FILE = "lock"  # in a run folder; names the process that trains there


def run_dirs(config: Config) -> list[Path]:
    """Return the existing paths named like folders of this run, highest number first, e.g. OUTPUT/NAME-2, OUTPUT/NAME.

    There may be gaps in the numbers. Some paths may belong to other runs, e.g. OUTPUT/NAME-64 to a run called NAME-64.
    """
    return [run_path(config, number) for number in sorted(_used_numbers(config), reverse=True)]


def latest_number(config: Config) -> int:
    """Return the number of the latest run of this name, or 0 if there is none."""
    used = _used_numbers(config)
    contiguous = next(number for number in range(1, len(used) + 2) if number not in used) - 1
    for number in sorted(used, reverse=True):
        folder = run_path(config, number)
        name = _run_name(folder)
        if name is None:
            if folder.is_dir() and (number <= contiguous or (folder / LOCK_FILE).exists()):  # killed early
                return number
        elif name == config.name or not _is_dir_name_of(folder.name, name):  # the latter: renamed or copied
            return number
    return 0


def _is_dir_name_of(folder: str, name: str) -> bool:
    """Return True if a run called `name` could have created a folder called `folder`."""
    return re.fullmatch(re.escape(name) + "(-[1-9][0-9]*)?", folder) is not None


def _run_name(folder: Path) -> str | None:
    """Return the run name in a folder's config.yaml, even of an older version, or None if it cannot be read."""
    file = folder / "config.yaml"
    try:
        values = yaml.parse(read_small_text(file), str(file)).value
    except (OSError, ValueError, UserError):
        return None
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def read_config(folder: Path) -> Config:
    """Read the config of the run in a folder. Raises UserError if it cannot be read or is invalid."""
    try:
        text = read_small_text(folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/config.yaml cannot be read ({getattr(error, 'strerror', error)}); give the folder of a run"
        ) from None
    return parse_config(text, f"{folder}/config.yaml")


def run_path(config: Config, number: int) -> Path:
    """Return the folder of a run by its number: OUTPUT/NAME for 1, OUTPUT/NAME-2 for 2, and so on."""
    return Path(config.output) / (str(config.name) if number == 1 else f"{config.name}-{number}")


def _used_numbers(config: Config) -> set[int]:
    """Return the numbers of all existing files and folders that are named like a folder of this run."""
    pattern = re.compile(re.escape(str(config.name)) + "(?:-([1-9][0-9]{0,8}))?")
    try:
        found = [pattern.fullmatch(name) for name in os.listdir(config.output)]
    except OSError:  # it does not exist yet; writing to it reports any other error
        return set()
    return {int(match[1] or 1) for match in found if match and match[1] != "1"}


def resolve_resume(config: Config, resume: str | None) -> tuple[Path | None, tuple[Path, ...]]:
    """Find the run folder and the checkpoints for a value of --resume.

    Args:
        config: Config of the run.
        resume: None for a new run, "auto" for the latest run of this name, otherwise a checkpoint or run folder.

    Returns:
        A tuple (folder, checkpoints). `folder` is the run folder to continue in, or None if a new one is needed.
        `checkpoints` are the candidates to start from, in order of preference. There are none if training starts from
        scratch. If `resume` is a path, the candidates may not exist.
    """
    if resume is None:
        return None, ()
    if resume == "auto":
        if (number := latest_number(config)) == 0:
            return None, ()
        folder = run_path(config, number)
        return folder, latest_checkpoints(folder) if any(path.exists() for path in latest_checkpoints(folder)) else ()
    path = Path(resume)
    if path.is_dir():
        return path, latest_checkpoints(path)
    if _run_name(path.parent) != config.name or not (path.parent / "log.txt").exists():
        return None, (path,)  # a copied checkpoint: the run gets a new folder and leaves this one unchanged
    latest = latest_checkpoints(path.parent)
    return path.parent, latest if path == latest[0] else (path,)


def is_explicit_checkpoint(resume: str | None) -> bool:
    """Return True if --resume names a single checkpoint.

    The path of a last.pt does not count, since it means the latest checkpoint of a run.
    """
    return resume not in (None, "auto") and not Path(resume).is_dir() and Path(resume).name != LAST


def latest_checkpoints(folder: Path) -> tuple[Path, ...]:
    """Return the checkpoints of a run folder to resume from, in order of preference.

    These are last.pt, even if it does not exist, and previous.pt if it exists. If neither exists, these are the kept
    checkpoints of epochs, the latest first, and best.pt.
    """
    last, previous, best = (folder / name for name in (LAST, PREVIOUS, BEST))
    if not last.exists() and not previous.exists():
        return (*epoch_files(folder), *(path for path in [best] if path.exists())) or (last,)
    return last, *(path for path in [previous] if path.exists())


def find_checkpoints(path: Path) -> tuple[Path, ...]:
    """Return the existing checkpoints of a run folder in the order best.pt, last.pt, previous.pt, kept epochs.

    If `path` is not a folder, it is the only element of the result.

    Raises:
        UserError: The folder does not contain a checkpoint.
    """
    if not path.is_dir():
        return (path,)
    named = (path / name for name in (BEST, LAST, PREVIOUS))
    if found := (*(file for file in named if file.is_file()), *epoch_files(path)):
        return found
    if (path / "config.yaml").is_file():
        raise UserError(f"{path} holds no checkpoint: the run ended before its first one, or has not saved it yet")
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST}); give a run folder or a .pt file")
