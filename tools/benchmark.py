"""Measure the images/s of data loaders and training, and compare them to other libraries and the machine's limits.

    zhu benchmark loader --data-path data/cifar10
    zhu benchmark train  --cfg configs/cifar10_resnet18.yaml --json result.json
    zhu benchmark peers  --cfg configs/cifar10_lenet.yaml
    zhu benchmark peers  --data-path data/imagenet --opts data.image_size=224 aug.crop=random-resized
    zhu benchmark augment --data-path data/cifar10
    zhu benchmark stages --cfg configs/medium_imagenet_96_resnet18_progressive.yaml
    zhu benchmark ramp   --cfg configs/cifar10_lenet.yaml
    zhu benchmark profile --cfg configs/cifar10_lenet.yaml
    zhu benchmark scale
    zhu benchmark all --report docs/benchmarks                        (make bench, make gpu-bench)
    zhu benchmark all --report docs/benchmarks --part training        (make gpu-bench PART=training)

The benchmark drives the real loader and the real training step. Each candidate (this project or a peer in one setting)
runs in a separate process. The candidates take turns in short rounds, so that a noisy machine slows all of them alike.
Each figure is the median of the rounds. If a candidate fails, only its rows are lost, and the exit code is 1. Rows that
are skipped because time ran out or an optional peer is missing are not failures.

On a GPU, `all` measures in parts, each with a time limit. The JSON files of --report and --json are replaced after each
round or row, so a killed run keeps the rows measured so far. With --report, the parts are added to those of earlier
runs in DIR/DEVICE.json. With --json alone, the file contains only the parts of this run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.arguments import add_config, new_parser, parse, take_words
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text

STAGES = {
    "loader": "loading without and with the config's augmentation, for every placement of the data",
    "model": "the training step on one resident batch",
    "train": "end-to-end training, and its ratio to the resident batch",
    "peers": "the loader and, with --cfg, training, compared to other libraries on the same images, with crop and flip",
    "augment": "the loader with each kind of augmentation, compared to torchvision's transforms",
    "stages": "the cost of changing the image size in progressive resizing; needs a config with data.stages",
    "ramp": "training at batch 1, 2, 4 … until memory is full: images/s, memory, the largest batch",
    "profile": "time of a training step by phase, and its share of the peak arithmetic rate",
    "limits": "limits of the machine: copies, arithmetic, disk",
    "scale": "cost per sample and memory at 10 thousand, 100 thousand and 1.5 million samples",
    "all": "all measurements for this machine, including the GPU's if there is one; --report writes the documents",
}
PARTS = (  # those of tools/benchmarks/suites/gpu.py
    "training, speedrun, loaders, decoding, resnet50, accuracy, dali, peers, larger-training, augmentations, "
    "further-speedruns"
)
PART_STAGES = ["accuracy", "augment", "dali", "decoding", "loading", "profile", "ramp", "reading", "scale", "speedrun"]
PART_STAGES += ["stages", "training"]
RAMP = """\
Measure images/s and peak memory at batch size 1, 2, 4 … until memory is full, and find the largest batch size.

    zhu benchmark ramp --cfg configs/cifar10_lenet.yaml configs/cifar10_alexnet.yaml --memory-limit 4
    zhu benchmark ramp --model resnet18 timm/convnext_tiny --size 96 --classes 200 --exact

Each size runs the real training step on one resident batch, in a separate process. The batch consists of images of
the data set (--cfg), repeated if there are too few, or of noise (--model). After the first size that does not fit,
bisection finds the largest that does. The largest and the fastest size are measured again. The rate of a size is the
median of its rounds. On a GPU, each size is compiled as configured, which takes most of the time. With
--opts train.compile=off train.cuda_graph=off the search is faster, but the rates differ.

On the CPU, memory is the peak of the whole process, including libraries. On a GPU, it is the peak of torch's tensors,
and the memory in use by all processes is shown beside it. Without --memory-limit, the limit is all of the GPU's memory
or, on the CPU, 80 % of the memory available at the start, so that the machine does not swap. The exit code is 1 if a
model failed with an error other than out of memory, and 130 after an interruption.
"""
PROFILE = """\
Measure the time of a training step by phase, and the share of the device's peak arithmetic rate that it reaches.

    zhu benchmark profile configs/cifar10_lenet.yaml --steps 20
    torchrun --nproc_per_node=2 tools/benchmark.py profile --cfg configs/cifar10_resnet18.yaml

Phases: data (waiting for a batch), proxy (sample selection by train.proxy, if set), forward, backward, reduce (the part
of the all-reduce that does not overlap with backward), optimizer (with clipping, clearing gradients and averages), host
(everything else while the device is idle or, on the CPU, between the phases). They add up to the wall time of the step.
They are device times on a GPU and host times on the CPU. Under torchrun, rank 0 is profiled.

A captured step (CUDA graph) has no phases. It is profiled without capture, and the time of the captured step is
reported separately. Model FLOPs utilization is the arithmetic rate of forward and backward, with 2 FLOPs per
multiply-add, divided by the rate that a large matrix multiplication reaches on this machine. trace.json.gz can be
opened in https://ui.perfetto.dev or chrome://tracing.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="|".join(STAGES))
    for stage, text in STAGES.items():
        if stage in COMMANDS:
            description, add_arguments = COMMANDS[stage]
            formatter = argparse.RawDescriptionHelpFormatter
            add_arguments(commands.add_parser(stage, help=text, description=description, formatter_class=formatter))
            continue
        command = commands.add_parser(stage, help=text, description=text)
        if stage == "all":
            _add_run_arguments(command)
        elif stage not in ("limits", "scale"):
            _add_config_arguments(command)
        if stage in ("peers", "augment", "all"):
            workers = (
                "worker processes or threads of each peer; of several numbers, the fastest (default: 0 or 1, half "
            )
            workers += "of the cores, all, twice as many; for augment, all)"
            command.add_argument("--workers", type=int, nargs="+", default=[], metavar="N", help=workers)
        command.add_argument("--scratch", type=path_argument, help="folder for temporary files")
        command.add_argument("--seconds", type=float, default=0.5, help="length of each round (default %(default)s)")
        command.add_argument("--rounds", type=int, default=5, help="rounds per figure (default %(default)s)")
        command.add_argument("--json", type=path_argument, metavar="FILE", help="also write the run to this file")
    parsed = parse(parser, argv)
    return take_words(parser, parsed, is_required=parsed.stage == "profile") if "words" in parsed else parsed


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add_config(command)
    add("--data-path", type=path_text, help="converted data set; without a config, only loaders are measured")
    add("--batch-size", type=int, help="samples per batch (default: the config's, 512 without one)")


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--small", type=path_argument, help="converted 32x32 data set (default: data/cifar10, else digits)")
    add("--medium", type=path_argument, help="converted 96x96 data set (default: data/medium-imagenet-96)")
    add("--source", type=path_argument, help="raw CIFAR-10, if it is not converted")
    add("--samples", type=int, help="samples of the generated data sets; fewer for a quick try")
    kept = "on a GPU: folder that keeps the generated data sets for later parts (default %(default)s)"
    add("--data", type=path_argument, default=Path("output/benchmark-data"), metavar="DIR", help=kept)
    add("--minutes", type=float, help="time limit of the whole run; measurements not started by then are left out")
    add("--part", nargs="+", default=[], metavar="NAME", help=f"on a GPU: {PARTS}")
    add("--part-seconds", type=float, help="time limit of each part (default: 170 on a GPU)")
    add("--seeds", type=int, default=10, help="runs of each speedrun (default %(default)s)")
    add("--epochs", type=int, help="epochs of the runs to an accuracy; fewer for a quick try")
    add("--reference", type=path_argument, metavar="DIR", help="checkout of cifar10-airbench, run beside the speedrun")
    documents = "write DIR/DEVICE.json, .md, .png and the tables of its README.md"
    add("--report", type=path_argument, metavar="DIR", help=documents)
    add("--only", nargs="+", default=[], choices=PART_STAGES)


def _add_ramp_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--cfg", type=path_text, nargs="+", default=[], metavar="FILE", help="config files, configs/….yaml")
    add("--model", nargs="+", default=[], metavar="NAME", help="models without a config, trained on noise")
    add("--size", type=int, default=32, help="side of --model's images in pixels (default %(default)s)")
    add("--classes", type=int, default=10, help="number of classes of --model (default %(default)s)")
    add("--data-path", type=path_text, help="data.path of all configs, a converted data set")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides for all models")
    add("--memory-limit", type=float, metavar="GIB", help="memory that a process, or torch on a GPU, may use")
    add("--min-batch", type=int, default=1, metavar="N", help="the first size (default %(default)s)")
    add("--max-batch", type=int, metavar="N", help="the last size to try")
    add("--minutes", type=float, help="time limit for all models; no size is started after it")
    add("--exact", action="store_true", help="find the largest batch size exactly instead of within 3 %%")
    add("--seconds", type=float, default=0.5, help="length of each round (default %(default)s)")
    rounds = "rounds per size; one in bisection, twice as many for the largest and the fastest (default %(default)s)"
    add("--rounds", type=int, default=3, help=rounds)
    add("--out", type=path_argument, help="folder (default output/NAME-ramp, or output/ramp for several models)")


def _add_profile_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add_config(command)
    add("--data-path", type=path_text, help="data.path, the converted data set")
    add("--batch-size", type=int, help="data.batch_size, per rank")
    add("--steps", type=int, default=20, help="number of profiled steps (default %(default)s)")
    add("--seconds", type=float, default=3.0, help="length of unprofiled training (default %(default)s)")
    add("--out", type=path_argument, help="folder (default output/NAME-profile)")


COMMANDS = {"ramp": (RAMP, _add_ramp_arguments), "profile": (PROFILE, _add_profile_arguments)}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.stage not in COMMANDS and (arguments.seconds <= 0 or arguments.rounds < 1):
        raise UserError(f"--seconds {arguments.seconds} and --rounds {arguments.rounds} must be positive")
    from tools.benchmarks.benchmark_command import run

    return run(arguments)


if __name__ == "__main__":
    run_main(main)
