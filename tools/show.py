"""Plot a trained model's predictions, augmented training samples, or a data set.

    zhu show --checkpoint output/cifar10_lenet              # correct and wrong predictions on val
    zhu show configs/cifar10_lenet.yaml --epoch 1 2 3        # the same samples, augmented in three epochs
    zhu show --data-path data/cifar10                       # classes, samples per class, image sizes

--checkpoint writes predictions.png (random samples), mistakes.png (the most confident mistakes), confusion.png and
classes.png (F1 of each class). It prints the same loss, top1 and top5 as `train/ddp.py --eval`, the precision, recall
and F1 of each class, and the most frequently confused classes (confused.csv lists all).
--cfg writes samples.png: the first samples of the first given epoch. Below the unaugmented images, one row per epoch
shows them as augmented in training with one process.
--data-path writes class-counts.png and examples.png.

For each plot, a CSV of the same name contains its data. Samples are numbered from 0 in stored order.
"""

from __future__ import annotations

import argparse

from configs.arguments import add_config, check_positive, flag_name, new_parser, parse_config
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text

# Options of each kind of plot, besides --count and --out.
ACCEPTED_OPTIONS = {
    "checkpoint": ("split", "data_path", "seed"),
    "cfg": ("epoch", "opts", "data_path"),
    "data_path": ("seed",),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_argument, metavar="RUN", help="run folder (its best.pt) or checkpoint")
    add_config(parser)
    add("--data-path", type=path_text, help="converted data set; with --checkpoint or --cfg: replaces theirs")
    add("--split", help="with --checkpoint: the split to predict (default: the run's data.val_split)")
    epochs = "with --cfg: epochs to show, one row each, counted from 1 (default: 1)"
    add("--epoch", type=int, nargs="+", metavar="N", help=epochs)
    add("--count", type=int, default=20, help="maximum images per plot (default: %(default)s)")
    add("--seed", type=int, help="seed for the random choice of samples (default: 0)")
    out = "output folder (default: show-SPLIT beside the checkpoint, or output/show/NAME)"
    add("--out", type=path_argument, metavar="FOLDER", help=out)
    parsed = parse_config(parser, argv, is_required=False)
    parsed.opts = parsed.opts or None
    return parsed


def check_arguments(arguments: argparse.Namespace) -> str:
    """Check the options, and return the kind of plot: a key of `ACCEPTED_OPTIONS`.

    Raises UserError if options are missing, incompatible or invalid.
    """
    given = [name for name in ACCEPTED_OPTIONS if getattr(arguments, name) is not None]
    if not given:
        raise UserError(
            "nothing to show; give --checkpoint RUN for predictions, a config FILE for training samples, "
            "or --data-path FOLDER for a data set"
        )
    if given[:2] == ["checkpoint", "cfg"]:
        raise UserError(
            "--checkpoint and a config cannot be combined; give --checkpoint for predictions or a config for samples"
        )
    kind = given[0]
    for name in ("split", "epoch", "opts", "seed"):
        if getattr(arguments, name) is not None and name not in ACCEPTED_OPTIONS[kind]:
            fitting = " or ".join(flag_name(other) for other, takes in ACCEPTED_OPTIONS.items() if name in takes)
            is_seed = (name, kind) == ("seed", "cfg")
            fix = "the config's seed selects the samples: --opts seed=1" if is_seed else "leave it out"
            raise UserError(f"{flag_name(name)} goes with {fitting}, not with {flag_name(kind)}; {fix}")
    check_positive(arguments, "count")
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed={arguments.seed} is negative; use 0 or more")
    if any(epoch < 1 for epoch in arguments.epoch or []):
        raise UserError(f"--epoch={min(arguments.epoch)} is not an epoch; they count from 1")
    return kind


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    kind = check_arguments(arguments)
    from configs.load import load_config
    from tools.visualize.dataset import show_dataset
    from tools.visualize.predictions import show_predictions
    from tools.visualize.samples import show_samples
    from train.distributed.process_group import Ranks

    ranks = Ranks.alone("tools/show.py")
    count, seed, out = arguments.count, arguments.seed or 0, arguments.out
    if kind == "checkpoint":
        show_predictions(arguments.checkpoint, ranks, arguments.split, arguments.data_path, count, seed, out)
    elif kind == "cfg":
        config = load_config(arguments.cfg, arguments.opts or [], **{"data.path": arguments.data_path})
        show_samples(config, ranks, [epoch - 1 for epoch in arguments.epoch or [1]], count, out)
    else:
        show_dataset(arguments.data_path, ranks, count, seed, out)


if __name__ == "__main__":
    run_main(main)
