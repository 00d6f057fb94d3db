"""Find a learning rate: train with a growing rate, plot the loss and suggest a rate.

    zhu find-lr configs/cifar10_lenet.yaml --data-path data/cifar10
    zhu train configs/cifar10_lenet.yaml train.lr=…                 # as printed

This is the range test of Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, with a rate
that grows exponentially. The config's optimizer trains the config's initial weights on real batches for --steps steps,
or until the smoothed loss exceeds four times its minimum. The trained weights are discarded. The suggestion is the rate
at which the smoothed loss falls most steeply per decade. A tenth of the rate at the minimum is printed as a second
opinion. Use the suggested rate as the peak of the schedule. It applies to the global batch size of the test (with
data.stages, that of the first epoch). If train.lr_batch_size is set, the printed train.lr is converted to that batch
size. The tool writes find_lr.png, find_lr.csv (one row per step) and find_lr.json to --out.
"""

from __future__ import annotations

import argparse
import math

from configs.arguments import add_config, new_parser, parse_config
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument

MIN_CURVE_STEPS = 20


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_config(parser)
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--from", type=float, default=1e-6, dest="first", metavar="LR", help="(default 1e-6)")
    parser.add_argument("--to", type=float, default=10.0, dest="last", metavar="LR", help="(default 10)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: one epoch, but 100 to 300)")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="default: OUTPUT/NAME-find-lr")
    return parse_config(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if not 0 < arguments.first < arguments.last < math.inf:
        raise UserError(f"--from={arguments.first:g} --to={arguments.last:g} must be positive and in ascending order")
    if arguments.steps is not None and arguments.steps < MIN_CURVE_STEPS:
        raise UserError(f"--steps={arguments.steps} is too few for a curve; use at least {MIN_CURVE_STEPS}")
    from tools.runs.find_lr_command import run

    run(arguments)


if __name__ == "__main__":
    run_main(main)
