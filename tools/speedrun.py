"""Train a config with several seeds in one process, and report accuracy and time as speedruns do.

    zhu speedrun configs/cifar10_speedrun_94.yaml --runs 10 --json result.json

The steps are compiled once, before the first run. The `time_s` of a run covers the same work as in airbench: whitening,
the epochs, and the evaluation after the last one. `first_result_s` is the time from the start of the command to the
first result: start-up, loading, compilation, training and evaluation.

To compare with https://github.com/KellerJordan/cifar10-airbench, run it right before or after on the same GPU:
`python airbench94_muon.py`, `python legacy/airbench95.py` and `python airbench96_faster.py` print the time of each run
in the last column and the mean accuracy at the end. Each file sets its number of runs near its end. To use the same
pixels, save this project's arrays as cifar10/train.pt and cifar10/test.pt: dictionaries of `images` (uint8
[N, 32, 32, 3]), `labels` (int64 [N]) and `classes`.
"""

from __future__ import annotations

import argparse

from configs.arguments import add_config, new_parser, parse_config
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_config(parser)
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--runs", type=int, default=10, help="number of seeds, starting at the config's (default 10)")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the result to this file")
    return parse_config(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.runs < 1:
        raise UserError(f"--runs={arguments.runs} must be at least 1")
    from tools.perf.speedrun_command import run

    run(arguments)


if __name__ == "__main__":
    run_main(main)
