"""Convert a data set into shards that training reads at full speed, or verify a converted data set.

    zhu convert digits --out data/digits
    zhu convert cifar10 --download --out data/cifar10
    zhu convert hdf5 --source medium-imagenet-96.hdf5 --classes classes.txt --out data/medium-imagenet-96
    zhu convert imagefolder --source photos --size 224 --out data/photos
    zhu convert imagefolder --source flowers --val-fraction 0.1 --out data/flowers
    zhu convert imagefolder --source /nfs/photos --out /nfs/data/photos --engine ray
    zhu convert cifar10 --download --out s3://bucket/cifar10
    zhu convert verify data/cifar10

To resume an interrupted conversion, run the same command again. The result is byte-identical.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from configs.arguments import new_parser, parse, whole_number
from configs.utils.console import counted
from configs.utils.errors import UserError, printable, run_main
from configs.utils.files import is_url, path_argument
from configs.utils.process import handle_signals
from pipelines.convert.source import SUBSAMPLINGS, Encoding, Options, Source
from pipelines.storage.dataset import MAX_PIXELS, DatasetInfo, is_hdf5, safe_name
from tools.common.engine import add_engine, open_cluster

if TYPE_CHECKING:
    from pipelines.cluster.connection import Cluster
    from pipelines.remote.upload import Uploads

MIB = 2**20
MAX_SHOWN_DEFECTS = 3
MAX_SHOWN_PROBLEMS = 3


def main(argv: list[str] | None = None) -> int:
    args = parse(build_parser(), argv)
    verifies = args.command == "verify"
    try:
        with handle_signals([signal.SIGTERM], terminate):  # cleans up as after Ctrl-C
            if verifies:
                print(verify(args.folder, args.classes))
                return 0
            with open_cluster(args) as cluster:
                return convert(args, cluster)
    except Terminated:
        print("terminated" if verifies else "terminated; to resume, run the same command again", file=sys.stderr)
        return 128 + signal.SIGTERM


def convert(args: argparse.Namespace, cluster: Cluster | None) -> int:
    from pipelines.convert.writer import convert_source

    folder, uploads = _output(args)
    started = time.perf_counter()
    name = dataset_name(args)
    try:
        source = open_source(args)
    except OSError as error:
        raise UserError(
            f"cannot read the source: {error.strerror or error} ({error.filename}); fix this and start again"
        ) from None
    options = build_options(args, source)
    is_new = not (folder / "dataset.json").exists() if uploads is None else uploads.load() is None
    try:
        dataset = convert_source(source, folder, options, args.workers, name, cluster, uploads)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot convert into {args.out}: {reason} ({error.filename or 'while writing'}); fix this and "
            "run the same command again to resume"
        ) from None
    print(format_summary(dataset, args.out, time.perf_counter() - started if is_new else None))
    return 0


def _output(args: argparse.Namespace) -> tuple[Path, Uploads | None]:
    """Return the folder in which a conversion writes its files, and where it uploads them."""
    if not isinstance(args.out, str):
        if args.spool is not None:
            raise UserError("--spool is for an --out in an object store; omit it, since a folder has its own")
        return args.out, None
    from pipelines.remote.upload import Uploads, spool_folder

    uploads = Uploads(args.out)
    args.out = uploads.url
    return args.spool or spool_folder(uploads.url), uploads


class Terminated(BaseException):
    """Raised when the process receives SIGTERM."""


def terminate(*_: object) -> None:
    raise Terminated


def open_source(args: argparse.Namespace) -> Source:
    """Open the source given on the command line. With --download, download its archive first.

    The readers are imported in this function, so that worker processes, which import this module, do not import all of
    them.

    Raises:
        UserError: The download fails, or the source is missing or invalid.
        OSError: The source cannot be read.
    """
    if args.command == "digits":
        from tools.sources.digits import open_digits

        return open_digits()
    if args.command in ("cifar10", "cifar100"):
        from tools.sources.cifar import EDITIONS, find_folder, open_cifar

        source = args.source
        if args.download and find_folder(args.command, source) is None:
            from tools.sources.download import download

            source = download(EDITIONS[args.command].archive, EDITIONS[args.command].md5, source)
        return open_cifar(args.command, source)
    if args.command == "hdf5":
        from pipelines.hdf5.file import KeyTemplates
        from tools.sources.hdf5 import open_hdf5

        keys = KeyTemplates(args.images_key, args.labels_key)
        return open_hdf5(args.source, args.classes, args.max_pixels, keys)
    from tools.sources.imagefolder import FolderOptions, open_imagefolder

    options = FolderOptions(
        labels=args.labels,
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
        follow_links=args.follow_links,
    )
    return open_imagefolder(args.source, options)


def build_options(args: argparse.Namespace, source: Source) -> Options:
    name = args.encoding or source.default_encoding
    if name != "jpeg" and (args.quality is not None or args.subsampling is not None):
        raise UserError(f"--quality and --subsampling belong to --encoding jpeg, not {name}; omit them")
    encoding = Encoding(
        name=name,
        quality=args.quality or Encoding.quality,
        subsampling=args.subsampling or Encoding.subsampling,
        size=args.size,
        max_pixels=args.max_pixels,
        orientation=getattr(args, "orientation", Encoding.orientation),
    )
    return Options(encoding=encoding, shard_mib=args.shard_mib, seed=args.seed, strict=args.strict)


def dataset_name(args: argparse.Namespace) -> str:
    """Return the name of the data set and its shards: --name if given, otherwise a name derived from the source.

    The name does not depend on --out, so that the same input gives the same files in any folder. Raises UserError if
    the name is not suitable for files.
    """
    if args.name is not None:
        name: str = args.name
    elif args.command in ("hdf5", "imagefolder"):
        stem = args.source.stem if args.command == "hdf5" else args.source.resolve().name
        name = safe_name(stem)
    else:
        name = args.command
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(
            f"the data set cannot be named {name!r}, since shard files get this name; give a --name of up to 100 "
            "letters, digits, '.', '_' and '-' that starts with a letter or a digit"
        )
    return name


def format_summary(dataset: DatasetInfo, out: Path | str, seconds: float | None) -> str:
    """Return a summary of a conversion, with a line about the data set and a line about each split.

    The first few quarantined samples of a split are listed below its line. `seconds` is the time that the conversion
    took, or None if the data set existed already.
    """
    lines = []
    for name, split in dataset.splits.items():
        mib = sum(shard.bytes for shard in split.shards) / MIB
        defects, reencoded = split.quarantined, dataset.reencoded.get(name, {})
        line = (
            f"  {name}: {counted(split.samples, 'sample')} in {counted(len(split.shards), 'shard')}, {mib:,.1f} MiB, "
            f"{len(defects):,} quarantined"
        )
        if reencoded:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in reencoded.items())
            line += f", {sum(reencoded.values()):,} re-encoded ({reasons})"
        lines.append(printable(line))
        lines += [printable(f"    {defect.name}: {defect.reason}") for defect in defects[:MAX_SHOWN_DEFECTS]]
        if len(defects) > MAX_SHOWN_DEFECTS:
            lines.append(f"    … {len(defects) - MAX_SHOWN_DEFECTS:,} more in {out}/dataset.json")
    samples = sum(split.samples for split in dataset.splits.values())
    classes = counted(len(dataset.classes), "class", "classes")
    head = f"{out}: {counted(samples, 'sample')} of {classes} as {dataset.encoding}"
    rate = "" if seconds is None else f", {seconds:.1f} s, {samples / seconds:,.0f} images/s"
    return "\n".join([f"{printable(head)}{rate}", *lines])


def verify(folder: Path | str, classes: Path | None = None) -> str:
    """Verify a data set, and return a sentence stating that it is intact.

    Args:
        folder: Folder of the data set, its URL as text, or an HDF5 file.
        classes: data.classes, for an HDF5 file.

    Raises:
        UserError: The data set is damaged, `folder` is not a data set, or `classes` is given for another one than an
            HDF5 file. The message contains the first problems.
    """
    from pipelines.open import load_dataset, refuse_classes

    in_place = isinstance(folder, Path) and is_hdf5(folder)
    if isinstance(folder, str):
        refuse_classes(folder, classes)
        dataset, problems = _verify_url(folder)
    else:
        from pipelines.open import verify as find_problems

        problems = find_problems(folder, classes)
        dataset = load_dataset(folder, classes)
    if problems:
        repair = "fetch the file again" if in_place else "convert the source again"
        more = (
            f" (and {len(problems) - MAX_SHOWN_PROBLEMS:,} more problems)" if len(problems) > MAX_SHOWN_PROBLEMS else ""
        )
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:MAX_SHOWN_PROBLEMS])}{more}; {repair}")
    splits = dataset.splits.values()
    samples, count = sum(split.samples for split in splits), sum(len(split.shards) for split in splits)
    where = "read in place, and its sha256 is recorded" if in_place else f"in {counted(count, 'shard')}"
    return printable(f"{folder} is intact: {counted(samples, 'sample')} {where}")


def _verify_url(url: str) -> tuple[DatasetInfo, list[str]]:
    from pipelines.remote import verify as checks

    try:
        return checks.verify(url)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot fetch {url} to check it: {reason} ({error.filename}); free some space, or set XDG_CACHE_HOME to a "
            "folder on another disk"
        ) from None


def place_argument(text: str) -> Path | str:
    """Return a URL as it is, and any other text as a Path like `path_argument`."""
    return text if is_url(text) else path_argument(text)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"example:\n  zhu convert {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    digits = command("digits", "scikit-learn's 1,797 digits as 32x32 RGB images, no download", "--out data/digits")
    _add_options(digits)
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        title = f"CIFAR-{name.removeprefix('cifar')} from its official python folder or .tar.gz"
        cifar = command(name, title, f"--download --out data/{name}")
        cifar.add_argument(
            "--source",
            type=path_argument,
            default=Path("data/raw"),
            help=f"{folder}, its .tar.gz, or the folder that contains one of them (default: %(default)s)",
        )
        cifar.add_argument(
            "--download",
            action="store_true",
            help="first download the official archive into --source, if it contains neither the archive nor its files",
        )
        _add_options(cifar)
    hdf5 = command(
        "hdf5",
        "an HDF5 file with images and labels for train, val and test, as arrays or JPEG files",
        "--source medium-imagenet-96.hdf5 --classes classes.txt --out data/medium-imagenet-96",
    )
    hdf5.add_argument("--source", type=path_argument, required=True, help="HDF5 file")
    hdf5.add_argument("--classes", type=path_argument, help="text file with one class name per line (default: 0, 1, …)")
    for name in ("images", "labels"):
        hdf5.add_argument(
            f"--{name}-key",
            default=f"{name}-{{split}}",
            metavar="TEMPLATE",
            help=f"key of the {name}, such as '{{split}}/{name}' (default: %(default)s)",
        )
    _add_orientation(hdf5)
    _add_options(hdf5)
    imagefolder = command(
        "imagefolder",
        "image files in SPLIT/CLASS/ folders, at any depth; JPEG files are kept unchanged unless --size resizes them",
        "--source photos --size 256 --out data/photos",
    )
    imagefolder.add_argument(
        "--source", type=path_argument, required=True, help="folder that contains train, val and test, or class folders"
    )
    imagefolder.add_argument(
        "--labels",
        type=path_argument,
        metavar="FILE",
        help="table of the classes of images that are in no class folder: file name and class in each line, such as "
        "Kaggle's trainLabels.csv, or ImageNet's LOC_val_solution.csv or list of synsets",
    )
    for split in ("val", "test"):
        imagefolder.add_argument(
            f"--{split}-fraction",
            type=_fraction,
            metavar="F",
            help=f"take this fraction of each class of train for {split}, at random by --seed",
        )
    imagefolder.add_argument(
        "--follow-links",
        action="store_true",
        help="read symbolic links that lead out of --source, and links to folders of images",
    )
    _add_orientation(imagefolder)
    _add_options(imagefolder)
    check = command("verify", "check every byte of a converted data set, or of an HDF5 file", "data/cifar10")
    check.add_argument("folder", type=place_argument, help="folder of the data set, its URL, or an HDF5 file")
    check.add_argument("--classes", type=path_argument, help="data.classes, for an HDF5 file")
    return parser


def _add_orientation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--orientation",
        choices=["apply", "ignore"],
        default=Encoding.orientation,
        help="apply: rotate photos as their EXIF data say, and encode them again; ignore: use the pixels as stored, "
        "like torchvision (default: %(default)s). Models predict with the option of their data set",
    )


def _fraction(text: str) -> float:
    """Parse a number from 0 up to 1 (exclusive), for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 1
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up to 1, such as 0.1")
    return number


def _add_options(parser: argparse.ArgumentParser) -> None:
    count, seed = whole_number(1), whole_number(0)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--out",
        type=place_argument,
        required=True,
        help="output folder of the data set, or its URL in an object store, such as s3://bucket/cifar10",
    )
    parser.add_argument(
        "--spool",
        type=path_argument,
        metavar="FOLDER",
        help="folder on a local disk for the unfinished conversion, if --out is a URL (default: in the user's cache)",
    )
    parser.add_argument("--name", help="name of the data set and its shards (default: from the source)")
    parser.add_argument(
        "--encoding",
        choices=["npy", "jpeg"],
        help="npy: raw pixels, all images of one size; jpeg: compressed, any sizes (default: jpeg for image files, npy "
        "for arrays)",
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), help=f"JPEG quality, 1 to 100 (default: {Encoding.quality})"
    )
    parser.add_argument(
        "--subsampling", choices=list(SUBSAMPLINGS), help=f"JPEG chroma subsampling (default: {Encoding.subsampling})"
    )
    parser.add_argument(
        "--size",
        type=count,
        help="resize the shorter side to this many pixels, and crop npy images to a square (default: keep the size)",
    )
    parser.add_argument(
        "--shard-mib", type=count, default=Options.shard_mib, help="size of a shard in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        help=f"worker processes (default: the available cores, {cores}; with --engine ray, the CPUs of the cluster)",
    )
    add_engine(parser)
    parser.add_argument(
        "--seed",
        type=seed,
        default=Options.seed,
        help="seed of the stored order of train, and of a random split (default: %(default)s)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first unusable image instead of leaving it out"
    )
    parser.add_argument(
        "--max-pixels",
        type=count,
        default=MAX_PIXELS,
        help="quarantine images with more pixels, which may be decompression bombs (default: %(default)s)",
    )


if __name__ == "__main__":
    run_main(main)
