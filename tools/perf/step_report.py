"""Report a step profile: compute the model FLOPs utilization, and write profile.json, profile.csv and profile.png."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from tools.benchmarks.engine import gpu_specs, results, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import measure
from tools.common.tables import Row, markdown, write_csv, write_json
from tools.perf import plots
from tools.perf.step_trace import StepProfile
from train.distributed.process_group import Ranks
from train.reporting.figures import save

TRACE = "trace.json.gz"


def flops_utilization(
    config: Config, classes: int, image_size: int, device: str, amp: torch.dtype | None, images_per_s: float
) -> dict[str, Any]:
    """Return the model FLOPs utilization of one device, the FLOPs per image, and the peak rates for comparison.

    The peak rate of a matrix multiplication is measured, and the data sheet's peak rate is looked up. Unknown rates are
    left out.

    Args:
        config: Training config.
        classes: Number of classes.
        image_size: Image size (height and width) in pixels.
        device: "cpu" or "cuda".
        amp: Autocast dtype, or None for float32.
        images_per_s: Training rate of one device.
    """
    flops = roofline.training_flops(config.model, classes, image_size)
    reached = flops * images_per_s
    candidate = Candidate("arithmetic", roofline.arithmetic, (device,))
    limits = roofline.limits_from(measure([candidate], 0.5, 3, show_progress=False))
    values: dict[str, Any] = {"training_gflop_per_image": flops / 1e9, "reached_tflop_per_s": reached / 1e12}
    if roofline.ARITHMETIC in limits:
        peak = limits[roofline.ARITHMETIC]
        values |= {
            "measured_peak_tflop_per_s": peak / 1e12,
            "measured_peak_precision": dtype_name(roofline.MATMUL[device][1]),
            "mfu": reached / peak,
        }
    specs = gpu_specs.peak_flops(torch.cuda.get_device_name(), amp or torch.float32) if device == "cuda" else None
    if specs is not None:
        peak, source = specs
        values |= {
            "data_sheet": source,
            "data_sheet_tflop_per_s": peak / 1e12,
            "mfu_of_data_sheet": reached / peak,
        }
    return {name: value if isinstance(value, str) else float(f"{value:.5g}") for name, value in values.items()}


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def profile_content(
    config: Config,
    ranks: Ranks,
    amp: torch.dtype | None,
    profile: StepProfile,
    rates: dict[str, float],
    utilization: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of profile.json. Times are in ms per micro-step (one forward and backward pass).

    Args:
        config: Training config.
        ranks: Rank and world size of this process.
        amp: Autocast dtype, or None for float32.
        profile: Profile of rank 0.
        rates: Training rates over all ranks, measured without the profiler, in images/s, by mode ("uncaptured" or
            "captured").
        utilization: Result of `flops_utilization`, or None if it was not computed.
    """
    images = config.data.batch_size * ranks.world_size
    return {
        "command": " ".join(["python", *sys.argv]),
        "environment": results.environment(),
        "name": config.name,
        "ranks": ranks.world_size,
        "batch_size": config.data.batch_size,
        "precision": dtype_name(amp),
        "compile": config.train.compile,
        "steps": profile.steps,
        "step_ms": profile.step_ms,
        "phases": [{"phase": phase, "ms": ms, "share": ms / profile.step_ms} for phase, ms in profile.phases.items()],
        "images_per_s": {mode: float(f"{rate:.5g}") for mode, rate in rates.items()},
        "unprofiled_step_ms": {mode: float(f"{1e3 * images / rate:.5g}") for mode, rate in rates.items()},
        "operators": profile.operators,
        "arithmetic": utilization,
    }


def write_results(content: dict[str, Any], out: Path) -> None:
    """Write profile.json, profile.csv and profile.png, and print the tables and the summary."""
    write_csv(out / "profile.csv", content["phases"])
    write_json(out / "profile.json", content, indent=1, ensure_ascii=False)
    save(plots.plot_profile(content), out / "profile.png")
    print(markdown(_phase_rows(content)))
    print()
    print(markdown(_operator_rows(content)))
    print("\n" + "\n".join(_summary_lines(content)))
    print(f"wrote {', '.join(str(out / name) for name in ('profile.json', 'profile.csv', 'profile.png', TRACE))}")


def _phase_rows(content: dict[str, Any]) -> list[Row]:
    rows = [
        {"phase": phase["phase"], "ms": phase["ms"], "share": f"{phase['share']:.1%}"} for phase in content["phases"]
    ]
    return [*rows, {"phase": "step", "ms": content["step_ms"], "share": "100.0%"}]


def _operator_rows(content: dict[str, Any]) -> list[Row]:
    return [
        {
            "ms": operator["ms"],
            "calls": operator["calls"],
            "share": f"{operator['ms'] / content['step_ms']:.1%}",
            "operator or kernel, its own time per step": operator["name"][:90],
        }
        for operator in content["operators"]
    ]


def _summary_lines(content: dict[str, Any]) -> list[str]:
    step_ms, rates = content["unprofiled_step_ms"], content["images_per_s"]
    lines = [
        f"{content['name']}: batch {content['batch_size']}, {content['precision']}, compile {content['compile']}, "
        f"{content['ranks']} x {content['environment']['device']}; mean of {content['steps']} steps.",
        f"A step takes {content['step_ms']:.4g} ms in the profile and {step_ms['uncaptured']:.4g} ms without the "
        f"profiler ({rates['uncaptured']:,.0f} images/s).",
    ]
    if "captured" in step_ms:
        lines.append(
            f"Training replays it as a CUDA graph, whose phases cannot be profiled: {step_ms['captured']:.4g} ms "
            f"({rates['captured']:,.0f} images/s). Profiled with train.cuda_graph=off."
        )
    return [*lines, *_utilization_lines(content["arithmetic"])]


def _utilization_lines(utilization: dict[str, Any] | None) -> list[str]:
    if utilization is None:
        return ["No model FLOPs utilisation: train.proxy trains on a part of each batch only."]
    gflop, reached = utilization["training_gflop_per_image"], utilization["reached_tflop_per_s"]
    lines = []
    if "mfu" in utilization:
        lines.append(
            f"Model FLOPs utilisation {utilization['mfu']:.1%}: {gflop:.4g} GFLOP per image, {reached:.4g} TFLOP/s of "
            f"{utilization['measured_peak_tflop_per_s']:.4g} TFLOP/s that a matrix multiplication reaches here in "
            f"{utilization['measured_peak_precision']}."
        )
    if "mfu_of_data_sheet" in utilization:
        lines.append(
            f"Of the {utilization['data_sheet_tflop_per_s']:.4g} TFLOP/s that the {utilization['data_sheet']} states: "
            f"{utilization['mfu_of_data_sheet']:.1%}."
        )
    return lines
