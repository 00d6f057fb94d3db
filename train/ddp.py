"""Train an image classifier, or evaluate one.

    zhu train configs/cifar10_lenet.yaml
    zhu train configs/cifar10_lenet.yaml train.epochs=30 data.batch_size=256 --resume auto
    zhu train configs/cifar10_lenet.yaml --resume output/cifar10_lenet/best.pt --eval
    zhu train configs/cifar10_resnet18.yaml --nproc 8

A run writes its config, log, metrics, curves and checkpoints to OUTPUT/NAME. `zhu train` and `python train/ddp.py` take
the same arguments. With --nproc, or under torchrun (torchrun --nproc_per_node=8 train/ddp.py …), one process per GPU
trains; --batch-size is that of each.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from configs.arguments import add_config, new_parser, parse_config, whole_number
from configs.utils.errors import UserError, run_main
from configs.utils.files import is_url, path_text
from configs.utils.process import importing_torch


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_config(parser)
    parser.add_argument("--batch-size", type=int, help="data.batch_size, per rank")
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--output", help="folder of all runs; this one goes to OUTPUT/NAME")
    parser.add_argument(
        "--resume", type=path_text, metavar="auto|PATH", help="the latest run of this name, a checkpoint or its folder"
    )
    parser.add_argument(
        "--extend", action="store_true", help="resume a run with more train.epochs than it was started with"
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the checkpoint to resume from, also the homework's ckpt_best.pth; do not train",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="first download and convert the config's data set, if it is missing"
    )
    parser.add_argument(
        "--fast-dev-run",
        action="store_true",
        help="try the config out: train two steps, evaluate, save and resume, in a temporary folder",
    )
    parser.add_argument("--throughput", action="store_true", help="print training images/s of this config and stop")
    parser.add_argument(
        "--nproc", type=whole_number(1), metavar="N", help="start torchrun with N processes, one per GPU"
    )
    return parse_config(parser, argv)


def main() -> int:
    """Train, evaluate or measure throughput, depending on the arguments and the config, and return the exit status."""
    arguments = parse_arguments()
    if arguments.nproc is not None and "WORLD_SIZE" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.nproc}"]
        os.execv(sys.executable, [sys.executable, *torchrun, "--", __file__, *sys.argv[1:]])  # -- ends its own options
    from configs.load import load_config

    overrides = {
        "data.batch_size": arguments.batch_size,
        "data.path": arguments.data_path,
        "output": arguments.output,
    }
    config = load_config(arguments.cfg, arguments.opts, **overrides)
    resume = config.resume if arguments.resume is None else arguments.resume
    evaluates_only = arguments.eval or config.eval.only
    if evaluates_only and resume is None:
        flag_name = "--eval" if arguments.eval else "eval.only"
        raise UserError(f"{flag_name} needs a checkpoint; give --resume PATH or --resume auto")
    if arguments.extend and resume is None:
        raise UserError("--extend needs a run to train longer; give --resume auto or --resume PATH")
    if arguments.fast_dev_run and (evaluates_only or arguments.throughput or arguments.resume is not None):
        raise UserError("--fast-dev-run starts a run of its own; leave out --resume, --eval and --throughput")
    if arguments.prepare and not is_url(config.data.path):
        from train.prepare import prepare_dataset

        prepare_dataset(Path(config.data.path), int(os.environ.get("LOCAL_RANK", "0")))
    with importing_torch():
        from train.run import run

    return run(
        config,
        resume,
        extend=arguments.extend,
        evaluates_only=evaluates_only,
        throughput=arguments.throughput,
        tries_out=arguments.fast_dev_run,
    )


def launch() -> None:
    """Run `main` as a program, as one of torchrun's ranks or alone, and exit with its exit status."""
    if "WORLD_SIZE" in os.environ:
        from train.distributed.launcher import run_distributed

        run_distributed(main)
    else:  # --help and wrong arguments are answered without importing torch
        run_main(main, is_result_printed=False)


if __name__ == "__main__":
    launch()
