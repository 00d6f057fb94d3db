"""Predict the classes of a split or of your own pictures, with one checkpoint or the average of several.

    zhu predict --checkpoint output/medium_imagenet_96_resnet18 --split test
    zhu predict --checkpoint output/run output/run-2 --split val --tta flip
    zhu predict one.jpg --checkpoint output/run
    zhu predict photos/holiday more/*.jpg --checkpoint output/run --top-k 3
    zhu predict --checkpoint output/run --split test --sample-submission sample.csv --out result

For one checkpoint, a split's loss, top1 and top5 equal those of `train/ddp.py --eval`. Pictures (image files, and
folders that contain them at any depth) are first converted like the checkpoint's data set; the best classes of up to 5
pictures are printed, or the best class of the first 20. A folder may also be given as --split; if a split has the same
name, NAME selects the split and ./NAME selects the folder.

These files are written to --out, with images in stored order. `row` is the row of an image in the source, counted from
0. For pictures, it is the position in the list of files, which is sorted by path in each folder.

    predictions.npz  logits float32 [N, C], labels int64 [N] (-1: unknown), rows int64 [N], classes, top_classes int64
                     [N, K] and top_probabilities float32 [N, K]; for several checkpoints, logits are the logarithm of
                     the mean probabilities
    predictions.csv  per image: row, file, label, class number, then the best classes and their probabilities
    metrics.json     loss, top1, top5 (null without labels), samples, checkpoints, images without a prediction
    submission.csv   Id and class number of every row of the source; by default only for split test, see --submission

Images that cannot be read are reported and listed in metrics.json. A submission is then refused unless --fill gives
their class, since leaving them out would shift all later ids.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from configs.arguments import check_positive, new_parser, parse
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    pictures = "image files and folders of them, before the options; otherwise give --split"
    add("pictures", nargs="*", type=path_argument, metavar="PICTURE", help=pictures)
    runs = "run folders (best.pt, else last.pt) or .pt files; several are averaged"
    add("--checkpoint", nargs="+", required=True, type=path_argument, metavar="RUN", help=runs)
    split = "split, or folder of pictures"
    add("--split", type=path_text, metavar="test|val|train|FOLDER", help=split)
    add("--data-path", type=path_text, metavar="DIR", help="converted data set (default: the checkpoint's)")
    tta = "test-time augmentation (default: the checkpoint's eval.tta)"
    add("--tta", choices=["none", "flip", "flip-translate"], help=tta)
    batch_size = "images per batch (default: the checkpoint's for evaluation)"
    add("--batch-size", type=int, metavar="N", help=batch_size)
    add("--top-k", type=int, default=5, metavar="K", help="number of best classes to list (default: %(default)s)")
    links = "read symbolic links that lead out of a folder of pictures, and links to folders"
    add("--follow-links", action="store_true", help=links)
    out = "output folder (default: RUN/predictions-SPLIT, RUN/pictures-NAME or RUN/pictures)"
    add("--out", type=path_argument, metavar="FOLDER", help=out)
    add = parser.add_argument_group("submission").add_argument
    file = "file to write (default: OUT/submission.csv for split test, none otherwise)"
    add("--submission", type=path_text, metavar="FILE|none", help=file)
    add("--sample-submission", type=path_argument, metavar="FILE", help="CSV file to take columns and ids from")
    add("--id-start", type=int, choices=[0, 1], help="first id (default: 1)")
    add("--id-column", metavar="NAME", help="name of the id column (default: Id)")
    category = "name of the class column (default: Category)"
    add("--category-column", metavar="NAME", help=category)
    add("--fill", type=int, metavar="CLASS", help="class number for images that cannot be read")
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_positive(arguments, "top_k", "batch_size")
    check_images(arguments)
    from tools.inference.predict_command import run

    run(arguments)


def check_images(arguments: argparse.Namespace) -> None:
    """Raise UserError unless either pictures or a split are given."""
    if arguments.pictures and arguments.split is not None:
        raise UserError(f"both pictures ({arguments.pictures[0]}) and --split {arguments.split} are given; omit one")
    if not arguments.pictures and arguments.split is None:
        swallowed = [path for path in arguments.checkpoint if _is_picture(path)]
        if not swallowed:
            raise UserError("nothing to predict: give pictures (before the options), or --split")
        names = shlex.join(map(str, swallowed))
        runs = shlex.join(str(path) for path in arguments.checkpoint if path not in swallowed) or "RUN"
        raise UserError(
            f"{names} follows --checkpoint, which takes all names up to the next option; write pictures first: "
            f"zhu predict {names} --checkpoint {runs}"
        )


def _is_picture(path: Path) -> bool:
    """Return True for a file without the suffix of a checkpoint, and for a folder with images and no checkpoint."""
    if not path.is_dir():
        return path.suffix not in ("", ".pt", ".pth")
    from tools.sources.folder_scan import EXTENSIONS

    is_run = any(path.glob("*.pt"))
    return not is_run and any(file.suffix.lower() in EXTENSIONS for file in path.rglob("*"))


if __name__ == "__main__":
    run_main(main)
