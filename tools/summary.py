"""Compare models: parameters, FLOPs and training memory side by side, and layer by layer with --layers.

    python tools/summary.py lenet alexnet resnet18 --out output/summary

This answers "how many parameters does AlexNet have, how does it compare to LeNet, and how much memory do they take up
in training with the same batch size?". The tool prints two tables and sentences that compare the models, and writes the
same numbers to summary.csv and a plot to summary.png in output/summary. A model is a built-in name, timm/NAME, a config
file or a run folder:

    python tools/summary.py timm/vit_tiny_patch16_224 configs/cifar10_resnet18.yaml output/digits_lenet --batch-size 64

FLOPs count 2 per multiply-add of convolutions, matrix products and attention. On a GPU, memory is measured over two
uncompiled training steps. Without a GPU it is estimated: weights, gradients, optimizer state and the activations saved
for the backward pass are counted exactly; temporary buffers and the workspaces of libraries are left out. With
train.proxy, the proxy network is left out, and the model is counted as if it trained on the whole batch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from tqdm import tqdm

from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from models import build_from_config, list_models
from tools.common.cli import check_positive
from tools.common.model_costs import Costs, count_costs, free_device_memory, measure_memory
from tools.common.tables import Row, make_folder, write_csv
from tools.perf.cost_report import format_report, layer_rows, layers_table, plot_costs, summary_row
from tools.perf.model_cases import AMP_NAMES, BATCH_SIZE, CLASSES, ModelCase, build_case
from train.build import to_device
from train.distributed.process_group import Ranks, process_group
from train.engine.execution import amp_dtype
from train.optim.freeze import freeze
from train.reporting import figures


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models = f"{', '.join(list_models())}, timm/NAME, a config file or a run folder"
    add("models", type=path_text, nargs="+", metavar="MODEL", help=models)
    size = (
        "image height and width in pixels, for all models (default: that of the given config or of this project's "
        "configs with the model; timm: the model's native size)"
    )
    add("--size", type=int, help=size)
    add("--classes", type=int, help=f"number of classes (default: the config's, else {CLASSES})")
    add("--batch-size", type=int, help=f"images per batch (default: the config's, else {BATCH_SIZE})")
    add("--optimizer", choices=("adamw", "sgd", "muon"), help="optimizer (default: the config's, else adamw)")
    precision = "precision of training (default: that used on this machine)"
    add("--precision", choices=tuple(AMP_NAMES), help=precision)
    add("--layers", action="store_true", help="also print a table of each model's layers")
    out = "write summary.csv, summary.png and, with --layers, layers-NAME.csv there (default: print only)"
    add("--out", type=path_argument, metavar="FOLDER", help=out)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    check_positive(options, "size", "classes", "batch_size")
    ranks = Ranks.alone("tools/summary.py")
    cases: dict[str, ModelCase] = {}
    for name in dict.fromkeys(options.models):
        case = build_case(name, options)
        label = name if case.label in cases else case.label  # several runs may have the same name
        cases[label] = replace(case, label=label)
    if options.out is not None:
        make_folder(options.out)
    rows: list[Row] = []
    layers: dict[str, list[Row]] = {}
    with process_group(ranks) as device:
        for case in tqdm(cases.values(), desc="models", leave=False, disable=not sys.stderr.isatty()):
            amp = amp_dtype(case.train.amp, device)
            costs, measured = compute_costs(case, device, amp)
            rows.append(summary_row(case, costs, measured, amp))
            layers[case.label] = layer_rows(costs, case.batch_size)
    print(format_report(rows))
    for label, table in layers.items() if options.layers else ():
        print(f"\n{label}, layer by layer:\n\n{layers_table(table)}")
    if options.out is None:
        return
    write_csv(options.out / "summary.csv", rows)
    figures.save(plot_costs(rows), options.out / "summary.png")
    for label, table in layers.items() if options.layers else ():
        write_csv(options.out / f"layers-{label.replace('/', '-')}.csv", table)
    print(f"\ntables and plot are in {options.out}")


def compute_costs(case: ModelCase, device: torch.device, amp: torch.dtype | None) -> tuple[Costs, int | None]:
    """Return the counted costs and the measured training memory in bytes (None without a GPU).

    Raises:
        UserError: The model cannot be built or does not fit into the GPU's memory, or its costs cannot be counted.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        free_device_memory()
        before = torch.cuda.memory_allocated(device)
    network: nn.Module = build_from_config(
        case.settings, case.classes, image_size=case.image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    freeze(network, case.settings.freeze)
    try:
        network = to_device(network, device, case.train.channels_last)
        size = case.batch_size, case.image_size
        costs = count_costs(network, case.train, *size, device=device, amp=amp)
        return costs, measure_memory(network, case.train, *size, device=device) - before if on_gpu else None
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"{case.label} does not fit into the GPU's memory at batch size {case.batch_size}; give a smaller "
            "--batch-size, or hide the GPU for an estimate: CUDA_VISIBLE_DEVICES="
        ) from None
    except (UnsupportedFakeTensorException, DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"the costs of {case.label} cannot be counted, since its forward pass or its optimizer depends on tensor "
            f"values ({error}); leave it out"
        ) from None


if __name__ == "__main__":
    run_main(main)
