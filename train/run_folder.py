"""Where a run lies: OUTPUT/NAME, found again or newly made. Only the first rank looks; see `dist.from_first_rank`.

And which checkpoints a folder stands for: several, the one that is wanted first, since it may be damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from train.checkpoint import BEST, LAST, PREVIOUS


def run_folders(config: Config) -> Iterator[Path]:
    """OUTPUT/NAME, OUTPUT/NAME-2, OUTPUT/NAME-3 …"""
    yield Path(config.output) / str(config.name)
    yield from (Path(config.output) / f"{config.name}-{number}" for number in itertools.count(2))


def find_run(config: Config, resume: str | None) -> tuple[Path | None, tuple[Path, ...]]:
    """The folder to go on in, None where it is not there yet, and the checkpoints to start from, of which the first
    intact one counts; none for a new run.

    With --resume auto those of the latest run of this name; with a path, that checkpoint and the folder it lies in.
    """
    if resume is None:
        return None, ()
    if resume == "auto":
        taken = list(itertools.takewhile(Path.exists, run_folders(config)))
        folder = taken[-1] if taken else None
        return folder, latest_of(folder) if folder and any(path.exists() for path in latest_of(folder)) else ()
    path = Path(resume)
    if path.is_dir():
        return path, latest_of(path)
    if not _is_run(path.parent, config):  # a checkpoint that was copied elsewhere: the run goes on in a folder of its
        return None, (path,)  # own, and nothing there is touched
    return path.parent, latest_of(path.parent) if path.name == LAST else (path,)


def latest_of(folder: Path) -> tuple[Path, ...]:
    """Where a run goes on from: last.pt, else the one before it."""
    return folder / LAST, *(path for path in [folder / PREVIOUS] if path.exists())


def _is_run(folder: Path, config: Config) -> bool:
    try:
        return load_config(folder / "config.yaml").name == config.name and (folder / "log.txt").exists()
    except UserError:
        return False


def make_folder(config: Config) -> Path:
    """The first run folder that is not taken, so that no run writes over another."""
    for folder in run_folders(config):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give another --output") from None
    raise AssertionError("the names are endless")


def find_checkpoints(path: Path) -> tuple[Path, ...]:
    """The checkpoints that a run folder stands for, of which the first intact one counts: best.pt, else the last.

    A file stands for itself.
    """
    if not path.is_dir():
        return (path,)
    if found := tuple(path / name for name in (BEST, LAST, PREVIOUS) if (path / name).is_file()):
        return found
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST}); give the folder of a run or a .pt file")
