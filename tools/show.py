"""Look at a trained model's predictions, at augmented training samples, or at a data set: pictures and their figures.

    python tools/show.py --checkpoint output/cifar10_lenet              # what it gets right and wrong on val
    python tools/show.py --cfg configs/cifar10_lenet.yaml --epoch 0 1 2  # the same samples as three epochs augment them
    python tools/show.py --data-path data/cifar10                       # classes, samples per class, sizes

The first writes predictions.png (random samples), mistakes.png (the most confident ones), confusion.png and classes.png
(F1 of each class), and prints loss, top1 and top5 as `train/ddp.py --eval` does, each class's precision, recall and F1,
and the classes most often confused (all of them: confused.csv). The second writes samples.png: the first batch of the
first epoch given, as one process trains on it, below the unaugmented images. The third writes class-counts.png and
examples.png. Each picture has a CSV of the same name beside it. Samples are numbered from 0 in stored order.
"""

from __future__ import annotations

import argparse
import sys

from configs.load import load_config
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from tools.visualize.dataset import show_dataset
from tools.visualize.predictions import show_predictions
from tools.visualize.samples import show_samples
from train.distributed.process_group import Ranks

# What each kind of picture takes beside what it is named after, --count and --out.
ACCEPTED_OPTIONS = {
    "checkpoint": ("split", "data_path", "seed"),
    "cfg": ("epoch", "opts", "data_path"),
    "data_path": ("seed",),
}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=path_argument, metavar="RUN", help="a run folder (its best.pt) or a checkpoint"
    )
    parser.add_argument("--cfg", metavar="FILE", help="config file, configs/….yaml")
    parser.add_argument(
        "--data-path", type=path_text, help="a converted data set; with the two above, in place of theirs"
    )
    parser.add_argument("--split", help="with --checkpoint: the split to predict (default: the run's data.val_split)")
    parser.add_argument("--epoch", type=int, nargs="+", metavar="N",
                        help="with --cfg: epochs, counted from 0, a row of pictures for each (default 0)")  # fmt: skip
    parser.add_argument("--opts", nargs="+", action="extend", metavar="KEY=VALUE",
                        help="with --cfg: settings that override the file")  # fmt: skip
    parser.add_argument("--count", type=int, default=20, help="images in a picture, at most (default 20)")
    parser.add_argument("--seed", type=int, help="of the random choice of samples (default 0)")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER",
                        help="default: show-SPLIT beside the checkpoint, or output/show/NAME")  # fmt: skip
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> str:
    """What is to be shown, one of `ACCEPTED_OPTIONS`; raises UserError for what does not go together."""
    given = [name for name in ("checkpoint", "cfg", "data_path") if getattr(arguments, name) is not None]
    if not given:
        raise UserError(
            "nothing to show; give --checkpoint RUN for predictions, --cfg FILE for training samples, "
            "or --data-path FOLDER for a data set"
        )
    if given[:2] == ["checkpoint", "cfg"]:
        raise UserError(
            "--checkpoint and --cfg show different things; give --checkpoint for predictions or --cfg for samples"
        )
    kind = given[0]
    for name in ("split", "epoch", "opts", "seed"):
        if getattr(arguments, name) is not None and name not in ACCEPTED_OPTIONS[kind]:
            fitting = " or ".join(_flag(other) for other, takes in ACCEPTED_OPTIONS.items() if name in takes)
            instead = (
                "; the samples follow from the config's seed: --opts seed=1" if (name, kind) == ("seed", "cfg") else ""
            )
            raise UserError(f"{_flag(name)} goes with {fitting}, not with {_flag(kind)}{instead or '; leave it out'}")
    if arguments.count < 1:
        raise UserError(f"--count={arguments.count} is not a positive whole number; use 1 or more")
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed={arguments.seed} is negative; use 0 or more")
    if any(epoch < 0 for epoch in arguments.epoch or []):
        raise UserError(f"--epoch={min(arguments.epoch)} is negative; epochs count from 0")
    return kind


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    kind = check_arguments(arguments)
    ranks = Ranks.alone("tools/show.py")
    count, seed, out = arguments.count, arguments.seed or 0, arguments.out
    if kind == "checkpoint":
        show_predictions(arguments.checkpoint, ranks, arguments.split, arguments.data_path, count, seed, out)
    elif kind == "cfg":
        config = load_config(arguments.cfg, arguments.opts or [], **{"data.path": arguments.data_path})
        show_samples(config, ranks, arguments.epoch or [0], count, out)
    else:
        show_dataset(arguments.data_path, ranks, count, seed, out)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    run_main(main)
