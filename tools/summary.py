"""Compare models: parameters, FLOPs and training memory side by side, and layer by layer with --layers.

    python tools/summary.py lenet alexnet resnet18 --out output/summary

answers "how many parameters does AlexNet have, how does it compare to LeNet, and how much memory do they take up in
training with the same batch size?": two tables, the ratios in words, and in output/summary the same figures as
summary.csv and a picture of them, summary.png. A model is a built-in name, timm/NAME, a config file or the folder of a
run:

    python tools/summary.py timm/vit_tiny_patch16_224 configs/cifar10_resnet18.yaml output/digits_lenet --batch-size 64

FLOPs are 2 per multiply-add, of convolutions, matrix products and attention. Memory is measured on a GPU, over two
real training steps, uncompiled; elsewhere it is estimated: weights, gradients, optimizer state and what the forward
pass keeps for the backward pass, counted exactly, without temporary buffers and libraries' workspaces. The small
network of train.proxy is left out, and the model takes the whole batch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from tqdm import tqdm

from configs.load import load_config, parse_config
from configs.schema import Config, ModelConfig, OptimizerConfig, TrainConfig
from configs.utils.errors import UserError, run_main
from configs.utils.files import path_argument, path_text
from models import build_from_config, list_models
from pipelines.storage.split import load_dataset
from tools.common.model_costs import Costs, count_costs, free_device_memory, measure_memory
from tools.common.tables import Row, make_folder, write_csv
from tools.perf.cost_report import ModelCase, format_report, layer_rows, layers_table, plot_costs, summary_row
from train.build import to_device
from train.checkpoint import store
from train.checkpoint.run_dir import find_checkpoints
from train.checkpoint.state import require_keys
from train.checkpoint.store import BEST, LAST, PREVIOUS
from train.distributed.process_group import Ranks, process_group
from train.engine.epoch import amp_dtype
from train.optim.freeze import freeze
from train.reporting import figures

CONFIGS = Path(__file__).parents[1] / "configs"
STORED_SIZE = 32  # of the data sets whose configs give no data.image_size: CIFAR-10 and the digits
CLASSES, BATCH_SIZE = 10, 128
CONFIG_SUFFIXES = (".yaml", ".yml")
AMP_NAMES = {"float32": "off", "bf16": "bf16"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=path_text, nargs="+", metavar="MODEL",
                        help=f"{', '.join(list_models())}, timm/NAME, a config file or a run's folder")  # fmt: skip
    parser.add_argument("--size", type=int, help="height and width in pixels, for all models (default: as "
                        "in this project's configs or the one given; timm: the size it was made for)")  # fmt: skip
    parser.add_argument("--classes", type=int, help=f"outputs (default: the config's, else {CLASSES})")
    parser.add_argument("--batch-size", type=int, help=f"default: the config's, else {BATCH_SIZE}")
    parser.add_argument("--optimizer", choices=("adamw", "sgd", "muon"), help="default: the config's, else adamw")
    parser.add_argument("--precision", choices=tuple(AMP_NAMES), help="default: as training would on this machine")
    parser.add_argument("--layers", action="store_true", help="a table of the layers for each model, in their order")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="write summary.csv, summary.png "
                        "and with --layers layers-NAME.csv there (default: print only)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    for name in ("size", "classes", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} is not a positive whole number; use 1 or more")
    ranks = Ranks.alone("tools/summary.py")
    subjects: dict[str, ModelCase] = {}
    for name in dict.fromkeys(options.models):
        subject = build_case(name, options)
        label = name if subject.label in subjects else subject.label  # two runs may have one name
        subjects[label] = replace(subject, label=label)
    if options.out is not None:
        make_folder(options.out)
    rows: list[Row] = []
    layers: dict[str, list[Row]] = {}
    with process_group(ranks) as device:
        for subject in tqdm(subjects.values(), desc="models", leave=False, disable=not sys.stderr.isatty()):
            amp = amp_dtype(subject.train.amp, device)
            costs, measured = compute_costs(subject, device, amp)
            rows.append(summary_row(subject, costs, measured, amp))
            layers[subject.label] = layer_rows(costs, subject.batch_size)
    print(format_report(rows))
    for label, table in layers.items() if options.layers else ():
        print(f"\n{label}, layer by layer:\n\n{layers_table(table)}")
    if options.out is None:
        return
    write_csv(options.out / "summary.csv", rows)
    figures.save(plot_costs(rows), options.out / "summary.png")
    for label, table in layers.items() if options.layers else ():
        write_csv(options.out / f"layers-{label.replace('/', '-')}.csv", table)
    print(f"\ntables and picture are in {options.out}")


def build_case(name: str, options: argparse.Namespace) -> ModelCase:
    """What the name stands for; options of the command line override what its config says."""
    path = Path(name)
    if name in list_models() or name.startswith("timm/"):
        label, model, train = name, ModelConfig(name=name), TrainConfig()
        size, classes, batch_size = options.size or default_size(name), CLASSES, BATCH_SIZE
    elif path.suffix in (*CONFIG_SUFFIXES, ".pt") or path.is_dir():
        config, classes, size = load_model_config(path, options)
        label, model, train = str(config.name), config.model, config.train
        batch_size = config.data.batch_size
    else:
        raise UserError(f"{name!r} is no model, config file or run folder; use one of {', '.join(list_models())}, "
                        "timm/NAME, or the path of a .yaml file or of a run")  # fmt: skip
    if options.optimizer is not None:
        train = train.model_copy(update={"optimizer": OptimizerConfig(name=options.optimizer)})
    if options.precision is not None:
        train = train.model_copy(update={"amp": AMP_NAMES[options.precision]})
    return ModelCase(
        label=label,
        settings=model,
        image_size=options.size or size,
        classes=options.classes or classes,
        batch_size=options.batch_size or batch_size,
        train=train,
    )


def load_model_config(path: Path, options: argparse.Namespace) -> tuple[Config, int, int]:
    """(config, classes, image size), with what the command line says in place of what the config does.

    A folder stands for its checkpoint, or before the first one for its config.yaml; a config may need its data set.
    """
    if path.is_dir() and not any((path / name).is_file() for name in (BEST, LAST, PREVIOUS)):
        path = path / "config.yaml"
    facts: dict[str, Any] = {}
    if path.suffix in CONFIG_SUFFIXES:
        config = load_config(path)
        if Path(config.data.path).is_dir():
            facts = load_dataset(config.data.path)
            shape = facts["image_shape"]
            facts = {"classes": facts["classes"], "image_size": shape[0] if shape else None}
    else:
        path, content = store.load_newest(find_checkpoints(path))
        require_keys(content, ("config",), path)
        config = parse_config(content["config"], f"the config in {path}")
        facts = content.get("dataset", {})
    classes = options.classes or config.model.num_classes or len(facts.get("classes", ()))
    image_size = options.size or config.data.image_size or facts.get("image_size")
    for what, value, option in (("number of classes", classes, "--classes"), ("image size", image_size, "--size")):
        if not value:
            raise UserError(
                f"{path} does not say its {what}, and neither does a data set in {config.data.path}; "
                f"give {option}, or convert the data set first"
            )
    return config, int(classes), int(image_size or 0)


def default_size(model: str) -> int:
    """Where this project's configs use the model, the smallest of their sizes; timm: what the model was made for."""
    if model.startswith("timm/"):
        import timm

        made_for = timm.get_pretrained_cfg(model.removeprefix("timm/")) if timm.is_model(model[5:]) else None
        return int(made_for.input_size[-1]) if made_for else 224
    configs = [load_config(file) for file in sorted(CONFIGS.glob("*.yaml"))]
    sizes = [config.data.image_size or STORED_SIZE for config in configs if config.model.name == model]
    return min(sizes, default=STORED_SIZE)


def compute_costs(subject: ModelCase, device: torch.device, amp: torch.dtype | None) -> tuple[Costs, int | None]:
    """What is counted, and the bytes that are measured: None without a GPU, or where it has too little memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        free_device_memory()
        before = torch.cuda.memory_allocated(device)
    network: nn.Module = build_from_config(subject.settings, subject.classes, image_size=subject.image_size,
                                          mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))  # fmt: skip
    freeze(network, subject.settings.freeze)
    shape: dict[str, Any] = {"batch_size": subject.batch_size, "image_size": subject.image_size, "device": device}
    try:
        network = to_device(network, device, subject.train.channels_last)
        costs = count_costs(network, subject.train, amp=amp, **shape)
        return costs, measure_memory(network, subject.train, **shape) - before if on_gpu else None
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"{subject.label} does not fit the GPU's memory at batch size {subject.batch_size}; "
            "give a smaller --batch-size, or hide the GPU for an estimate: CUDA_VISIBLE_DEVICES="
        ) from None
    except (UnsupportedFakeTensorException, DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{subject.label} cannot be counted, since its forward pass or its optimizer's step depends on values "
            f"({error}); leave it out"
        ) from None


if __name__ == "__main__":
    run_main(main)
