"""Compare models: parameters, FLOPs and training memory side by side, and layer by layer with --layers.

    zhu summary lenet alexnet resnet18 --out output/summary

This answers "how many parameters does AlexNet have, how does it compare to LeNet, and how much memory do they take up
in training with the same batch size?". The tool prints two tables and sentences that compare the models, and writes the
same numbers to summary.csv and a plot to summary.png in output/summary. A model is a built-in name, timm/NAME, a config
file or a run folder:

    zhu summary timm/vit_tiny_patch16_224 configs/cifar10_resnet18.yaml output/digits_lenet --batch-size 64

FLOPs count 2 per multiply-add of convolutions, matrix products and attention. On a GPU, memory is measured over two
uncompiled training steps. Without a GPU it is estimated: weights, gradients, optimizer state and the activations saved
for the backward pass are counted exactly; temporary buffers and the workspaces of libraries are left out. With
train.proxy, the proxy network is left out, and the model is counted as if it trained on the whole batch.
"""

from __future__ import annotations

import argparse

from configs.arguments import check_positive, new_parser, parse
from configs.utils.errors import run_main
from configs.utils.files import path_argument, path_text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    models = "a built-in name (zhu list models), timm/NAME, path/to/file.py:NAME, a config file or a run folder"
    add("models", type=path_text, nargs="+", metavar="MODEL", help=models)
    size = (
        "image height and width in pixels, for all models (default: that of the given config or of this project's "
        "configs with the model; timm: the model's native size)"
    )
    add("--size", type=int, help=size)
    add("--classes", type=int, help="number of classes (default: the config's, else 10)")
    add("--batch-size", type=int, help="images per batch (default: the config's, else 128)")
    add("--optimizer", choices=("adamw", "sgd", "muon"), help="optimizer (default: the config's, else adamw)")
    precision = "precision of training (default: that used on this machine)"
    add("--precision", choices=("float32", "bf16"), help=precision)
    add("--layers", action="store_true", help="also print a table of each model's layers")
    out = "write summary.csv, summary.png and, with --layers, layers-NAME.csv there (default: print only)"
    add("--out", type=path_argument, metavar="FOLDER", help=out)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_positive(arguments, "size", "classes", "batch_size")
    from tools.perf.summary_command import run

    run(arguments)


if __name__ == "__main__":
    run_main(main)
