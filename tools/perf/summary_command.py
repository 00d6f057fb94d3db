"""Compare the costs of models with `tools/summary.py`."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from models import build_from_config
from tools.common.model_costs import Costs, count_costs, free_device_memory, measure_memory
from tools.common.tables import Row, make_folder, write_csv
from tools.perf.cost_report import format_report, layer_rows, layers_table, plot_costs, summary_row
from tools.perf.model_cases import ModelCase, build_case
from train.build import to_device
from train.distributed.process_group import Ranks, process_group
from train.engine.execution import amp_dtype
from train.optim.freeze import freeze
from train.reporting import figures


def run(options: argparse.Namespace) -> None:
    """Compare models as the arguments of `tools/summary.py` say."""
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
        for case in progress_bar(cases.values(), desc="models", unit="model"):
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
