"""Where a run lies: OUTPUT/NAME, found again or newly made. Only the first rank looks; see `dist.from_first_rank`.

And which checkpoint a folder stands for, where its run does not go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config


def run_folders(config: Config) -> Iterator[Path]:
    """OUTPUT/NAME, OUTPUT/NAME-2, OUTPUT/NAME-3 …"""
    yield Path(config.output) / str(config.name)
    yield from (Path(config.output) / f"{config.name}-{number}" for number in itertools.count(2))


def find_run(config: Config, resume: str | None) -> tuple[Path | None, Path | None]:
    """The folder to go on in and the checkpoint to start from; None for those that are not there yet.

    With --resume auto those of the latest run of this name; with a path, the checkpoint and the folder it lies in.
    """
    if resume is None:
        return None, None
    if resume == "auto":
        taken = list(itertools.takewhile(Path.exists, run_folders(config)))
        folder = taken[-1] if taken else None
        return folder, folder / "last.pt" if folder and (folder / "last.pt").exists() else None
    path = Path(resume)
    if path.is_dir():
        return path, path / "last.pt"
    # A checkpoint that was copied elsewhere: the run goes on in a folder of its own, and nothing there is touched.
    return path.parent if _is_run(path.parent, config) else None, path


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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run folder stands for: best.pt, else last.pt; a file stands for itself."""
    if not path.is_dir():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no checkpoint (best.pt or last.pt); give the folder of a run or a .pt file")
