"""What to type when somebody names a source where a converted data set is wanted, or a data set that is not there yet.

Knows files by their names only: what a source holds is for `tools/sources` to check.
"""

from __future__ import annotations

import shlex
from pathlib import Path

HDF5_SUFFIXES = (".hdf5", ".h5")
CIFAR = {"cifar10": "cifar-10", "cifar100": "cifar-100"}  # our command, and how its official files begin


def convert_hint(folder: str | Path) -> str:
    """The end of an error's sentence about `folder`, which is no converted data set."""
    path = Path(folder)
    command, source, out = _command(path)
    if not command:
        return "convert the source with tools/convert.py first"
    words = ["python", "tools/convert.py", command, *source, "--out", str(out)]
    use = "" if out == path else f", and give {out} as the data set"
    return f"convert it first: {shlex.join(words)}{use}"


def _command(path: Path) -> tuple[str, list[str], Path]:
    """Subcommand of tools/convert.py (empty: unknown), its options for the source, and its --out."""
    try:
        if not path.exists():
            return _for_missing(path)
        files = [path] if path.is_file() else sorted(path.iterdir())
    except OSError:  # not ours to read
        return "", [], path
    names = [file.name for file in files]
    for file in files:
        if file.suffix.lower() in HDF5_SUFFIXES:
            return "hdf5", ["--source", str(file)], Path("data") / file.stem
    for command, beginning in CIFAR.items():
        if path.name.startswith(f"{beginning}-") or any(name.startswith(f"{beginning}-") for name in names):
            return command, ["--source", str(path)], Path("data") / command
    # As tools.sources.imagefolder names it, which this package may not import.
    if path.is_dir() and not {name.lower() for name in names}.isdisjoint(("train", "training")):
        return "imagefolder", ["--source", str(path)], Path("data") / f"{path.resolve().name}-converted"
    return "", [], path


def _for_missing(path: Path) -> tuple[str, list[str], Path]:
    """By the folder's name alone, as configs of this project and of the homework call their data sets."""
    if path.name in CIFAR:
        return path.name, ["--download"], path
    if path.name == "digits":
        return "digits", [], path
    if path.name.startswith("medium-imagenet"):
        return "hdf5", ["--source", "FILE.hdf5"], path
    return "", [], path
