"""Where the time of a training step goes, and how much of the device's arithmetic it uses.

    python tools/benchmark.py profile --cfg configs/cifar10_lenet.yaml --steps 20
    torchrun --nproc_per_node=2 tools/benchmark.py profile --cfg configs/cifar10_resnet18.yaml

Phases: data (waiting for a batch), host (everything else while the device rests, or, on the CPU, between the others),
forward, backward, reduce (the all-reduce of several ranks, as far as it is not hidden behind backward), optimizer (with
clipping and clearing of gradients). They add up to the step's wall time; on a GPU they are the device's time, on the
CPU the host's. Under torchrun the first rank is the one that is looked at.

A captured step (CUDA graph) cannot be seen into: it is profiled uncaptured, and its own time stands beside.
Model FLOPs utilisation: the arithmetic of forward and backward, 2 operations per multiply-add, over what a large matrix
multiplication reaches here. trace.json.gz opens in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from configs.load import load_config
from configs.schema import Config
from configs.stages import config_at
from configs.utils.errors import UserError
from configs.utils.files import path_argument, path_text
from pipelines import build_train_loader
from pipelines.augment.mixup import mixing_enabled
from pipelines.loader.loader import Loader
from pipelines.storage.dataset import load_dataset
from tools.benchmarks.engine import gpu_specs, results, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import measure
from tools.common.tables import Row, make_folder, markdown, write_csv, write_text
from tools.perf import plots
from tools.perf.step_trace import StepProfile, profile_steps, run_alongside
from train.build import build_all, check_classes
from train.checkpoint.finetune import without_pretrained
from train.distributed import collectives
from train.distributed.process_group import Ranks, process_group
from train.engine.hard_samples import check_proxy
from train.engine.precision import amp_dtype, uses_cuda_graph
from train.engine.state import TrainState
from train.reporting.figures import save
from train.throughput import measure_images_per_s

WARM_STEPS = 3
TRACE = "trace.json.gz"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cfg", type=path_text, required=True, metavar="FILE", help="config file, configs/….yaml")
    command.add_argument("--data-path", type=path_text, help="data.path, the converted data set")
    command.add_argument("--batch-size", type=int, help="data.batch_size, per rank")
    command.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.add_argument("--steps", type=int, default=20, help="that are profiled (default %(default)s)")
    command.add_argument("--seconds", type=float, default=3.0, help="of unprofiled training (default %(default)s)")
    command.add_argument("--out", type=path_argument, help="folder (default output/NAME-profile)")


def main(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1 or not 0 < arguments.seconds < math.inf:
        raise UserError(f"--steps {arguments.steps} and --seconds {arguments.seconds} must be positive and finite")
    replacements = {"data.path": arguments.data_path, "data.batch_size": arguments.batch_size}
    config = config_at(load_config(arguments.cfg, arguments.opts, **replacements), epoch=0)
    dataset = load_dataset(config.data.path)
    classes = check_classes(config, dataset)
    ranks = Ranks.from_environment()
    check_proxy(config.train, ranks.world_size, mixing_enabled(config.aug.mix))

    with process_group(ranks) as device:
        out = collectives.from_first_rank(
            lambda: make_folder(arguments.out or Path("output") / f"{config.name}-profile")
        )
        kind, captures = device.type, uses_cuda_graph(config.train, device, amp_dtype(config.train.amp, device))
        training, loader = build_training(without_graph(config), dataset, classes, ranks, device)
        amp, image_size = training.amp, loader.image_size
        rates = {"uncaptured": measure_rate(training, loader, ranks, arguments.seconds)}
        found = None
        if ranks.is_first:
            hidden = out / f".{TRACE}"  # its ending is what the profiler goes by
            found = profile_steps(training, loader, arguments.steps, hidden)
            hidden.rename(out / TRACE)
        else:
            run_alongside(training, loader, arguments.steps)
        del training, loader
        if captures:
            rates["captured"] = measure_rate(
                *build_training(config, dataset, classes, ranks, device), ranks, arguments.seconds
            )
    if found is not None:
        per_device = rates.get("captured", rates["uncaptured"]) / ranks.world_size
        use = (
            None if config.train.proxy.model else flops_utilization(config, classes, image_size, kind, amp, per_device)
        )
        write_results(profile_content(config, ranks, amp, found, rates, use), out)
    return 0


def without_graph(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": "off"})})


def build_training(
    config: Config, dataset: dict[str, Any], classes: int, ranks: Ranks, device: torch.device
) -> tuple[TrainState, Loader]:
    loader = build_train_loader(
        config.data,
        config.aug,
        seed=config.seed,
        device=device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        accumulation_steps=config.train.accumulation_steps,
    ).at(0)
    return build_all(without_pretrained(config), dataset, classes, loader.image_size, device), loader


def measure_rate(training: TrainState, loader: Loader, ranks: Ranks, seconds: float) -> float:
    """Images/s of all ranks, without the profiler."""
    return measure_images_per_s(training, loader, ranks.world_size, warmup_steps=WARM_STEPS, seconds=seconds)


def flops_utilization(
    config: Config, classes: int, image_size: int, kind: str, amp: torch.dtype | None, images_per_s: float
) -> dict[str, Any]:
    """Model FLOPs utilisation of one device: operations, and the peaks that they are a share of."""
    flops = roofline.training_flops(config.model, classes, image_size)
    reached = flops * images_per_s
    peak = roofline.limits_from(
        measure([Candidate("arithmetic", roofline.arithmetic, (kind,))], 0.5, 3, show_progress=False)
    )
    use: dict[str, Any] = {"training_gflop_per_image": flops / 1e9, "reached_tflop_per_s": reached / 1e12}
    if roofline.ARITHMETIC in peak:
        use |= {
            "measured_peak_tflop_per_s": peak[roofline.ARITHMETIC] / 1e12,
            "measured_peak_precision": dtype_name(roofline.MATMUL[kind][1]),
            "mfu": reached / peak[roofline.ARITHMETIC],
        }
    sheet = gpu_specs.peak_flops(torch.cuda.get_device_name(), amp or torch.float32) if kind == "cuda" else None
    if sheet is not None:
        use |= {
            "data_sheet": sheet[1],
            "data_sheet_tflop_per_s": sheet[0] / 1e12,
            "mfu_of_data_sheet": reached / sheet[0],
        }
    return {name: value if isinstance(value, str) else float(f"{value:.5g}") for name, value in use.items()}


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def profile_content(
    config: Config,
    ranks: Ranks,
    amp: torch.dtype | None,
    found: StepProfile,
    rates: dict[str, float],
    use: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of profile.json; times in ms per forward and backward pass."""
    images = config.data.batch_size * ranks.world_size
    return {
        "command": " ".join(["python", *sys.argv]),
        "environment": results.environment(),
        "name": config.name,
        "ranks": ranks.world_size,
        "batch_size": config.data.batch_size,
        "precision": dtype_name(amp),
        "compile": config.train.compile,
        "steps": found.steps,
        "step_ms": found.step_ms,
        "phases": [{"phase": phase, "ms": ms, "share": ms / found.step_ms} for phase, ms in found.phases.items()],
        "images_per_s": {name: float(f"{value:.5g}") for name, value in rates.items()},
        "unprofiled_step_ms": {name: float(f"{1e3 * images / value:.5g}") for name, value in rates.items()},
        "operators": found.operators,
        "arithmetic": use,
    }


def write_results(facts: dict[str, Any], out: Path) -> None:
    """Write profile.json, .csv and .png, and print what is in them."""
    write_csv(out / "profile.csv", facts["phases"])
    write_text(out / "profile.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    save(plots.plot_profile(facts), out / "profile.png")
    print(markdown(phase_rows(facts)))
    print()
    operators = [
        {
            "ms": each["ms"],
            "calls": each["calls"],
            "share": f"{each['ms'] / facts['step_ms']:.1%}",
            "operator or kernel, its own time per step": each["name"][:90],
        }
        for each in facts["operators"]
    ]
    print(markdown(operators))
    print("\n" + "\n".join(summary_lines(facts)))
    print(f"wrote {', '.join(str(out / name) for name in ('profile.json', 'profile.csv', 'profile.png', TRACE))}")


def phase_rows(facts: dict[str, Any]) -> list[Row]:
    rows = [{"phase": each["phase"], "ms": each["ms"], "share": f"{each['share']:.1%}"} for each in facts["phases"]]
    return [*rows, {"phase": "step", "ms": facts["step_ms"], "share": "100.0%"}]


def summary_lines(facts: dict[str, Any]) -> list[str]:
    step, rates, use = facts["unprofiled_step_ms"], facts["images_per_s"], facts["arithmetic"]
    device = facts["environment"]["device"]
    lines = [
        f"{facts['name']}: batch {facts['batch_size']}, {facts['precision']}, compile {facts['compile']}, "
        f"{facts['ranks']} x {device}; mean of {facts['steps']} steps.",
        f"A step takes {facts['step_ms']:.4g} ms in the profile and {step['uncaptured']:.4g} ms without the profiler "
        f"({rates['uncaptured']:,.0f} images/s).",
    ]
    if "captured" in step:
        lines.append(
            f"TrainState replays it as a CUDA graph, which cannot be seen into: {step['captured']:.4g} ms "
            f"({rates['captured']:,.0f} images/s). Profiled with train.cuda_graph=off."
        )
    if use is None:
        lines.append("No model FLOPs utilisation: train.proxy trains on a part of each batch only.")
        return lines
    reached = f"{use['training_gflop_per_image']:.4g} GFLOP per image, {use['reached_tflop_per_s']:.4g} TFLOP/s"
    if "mfu" in use:
        lines.append(
            f"Model FLOPs utilisation {use['mfu']:.1%}: {reached} of {use['measured_peak_tflop_per_s']:.4g} TFLOP/s "
            f"that a matrix multiplication reaches here in {use['measured_peak_precision']}."
        )
    if "mfu_of_data_sheet" in use:
        lines.append(
            f"Of the {use['data_sheet_tflop_per_s']:.4g} TFLOP/s that the {use['data_sheet']} promises: "
            f"{use['mfu_of_data_sheet']:.1%}."
        )
    return lines
