"""Report a step profile: the content of profile.json, with the model FLOPs utilization, as tables and sentences."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import torch

from configs.schema import Config
from tools.benchmarks.engine import gpu_specs, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import measure
from tools.benchmarks.engine.results import Environment
from tools.common.tables import Row
from tools.perf.step_trace import StepProfile


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilization of one device, and the peak rates that it is compared with. Unknown values are None."""

    training_gflop_per_image: float
    reached_tflop_per_s: float
    measured_peak_tflop_per_s: float | None = None  # of a matrix multiplication
    measured_peak_precision: str | None = None
    mfu: float | None = None
    data_sheet: str | None = None  # name of the device in the data sheet
    data_sheet_tflop_per_s: float | None = None
    mfu_of_data_sheet: float | None = None


@dataclass(frozen=True)
class StepReport:
    """Profile and speed of a training step. Times are in ms per micro-step (one forward and backward pass)."""

    config: Config
    ranks: int
    amp: torch.dtype | None  # dtype of autocast, or None for float32
    environment: Environment
    profile: StepProfile  # of rank 0
    rates: dict[str, float]  # images/s over all ranks, without the profiler, by mode: "uncaptured" or "captured"
    utilization: Utilization | None = None  # None if it was not computed

    @property
    def precision(self) -> str:
        return dtype_name(self.amp)

    @property
    def unprofiled_step_ms(self) -> dict[str, float]:
        images = self.config.data.batch_size * self.config.data.views * self.ranks
        return {mode: significant(1e3 * images / rate) for mode, rate in self.rates.items()}

    def content(self) -> dict[str, object]:
        """Return the content of profile.json."""
        use = asdict(self.utilization) if self.utilization is not None else None
        return {
            "command": " ".join(["python", *sys.argv]),
            "environment": self.environment,
            "name": self.config.name,
            "ranks": self.ranks,
            "batch_size": self.config.data.batch_size,
            "precision": self.precision,
            "compile": self.config.train.compile,
            **asdict(self.profile),
            "images_per_s": {mode: significant(rate) for mode, rate in self.rates.items()},
            "unprofiled_step_ms": self.unprofiled_step_ms,
            "arithmetic": use and {name: value for name, value in use.items() if value is not None},
        }

    def phase_rows(self) -> list[Row]:
        """Return a row per phase, and one for the whole step."""
        rows = [{"phase": each.phase, "ms": each.ms, "share": f"{each.share:.1%}"} for each in self.profile.phases]
        return [*rows, {"phase": "step", "ms": self.profile.step_ms, "share": "100.0%"}]

    def operator_rows(self) -> list[Row]:
        """Return a row per operator or kernel."""
        return [
            {
                "ms": operator.ms,
                "calls": operator.calls,
                "share": f"{operator.ms / self.profile.step_ms:.1%}",
                "operator or kernel, its own time per step": operator.name[:90],
            }
            for operator in self.profile.operators
        ]

    def summary_lines(self) -> list[str]:
        """Return sentences with the step times and the model FLOPs utilization."""
        config, profile, step_ms = self.config, self.profile, self.unprofiled_step_ms
        lines = [
            f"{config.name}: batch {config.data.batch_size}, {self.precision}, compile {config.train.compile}, "
            f"{self.ranks} x {self.environment['device']}; mean of {profile.steps} steps.",
            f"A step takes {profile.step_ms:.4g} ms in the profile and {step_ms['uncaptured']:.4g} ms without the "
            f"profiler ({self.rates['uncaptured']:,.0f} images/s).",
        ]
        if "captured" in step_ms:
            lines.append(
                f"Training replays it as a CUDA graph, whose phases cannot be profiled: {step_ms['captured']:.4g} ms "
                f"({self.rates['captured']:,.0f} images/s). Profiled with train.cuda_graph=off."
            )
        return [*lines, *_utilization_lines(self.utilization)]


def _utilization_lines(use: Utilization | None) -> list[str]:
    if use is None:
        return ["No model FLOPs utilisation: train.proxy trains on a part of each batch only."]
    lines = []
    if use.mfu is not None:
        lines.append(
            f"Model FLOPs utilisation {use.mfu:.1%}: {use.training_gflop_per_image:.4g} GFLOP per image, "
            f"{use.reached_tflop_per_s:.4g} TFLOP/s of {use.measured_peak_tflop_per_s:.4g} TFLOP/s that a matrix "
            f"multiplication reaches here in {use.measured_peak_precision}."
        )
    if use.mfu_of_data_sheet is not None:
        lines.append(
            f"Of the {use.data_sheet_tflop_per_s:.4g} TFLOP/s that the {use.data_sheet} states: "
            f"{use.mfu_of_data_sheet:.1%}."
        )
    return lines


def flops_utilization(
    config: Config, classes: int, image_size: int, device: str, amp: torch.dtype | None, images_per_s: float
) -> Utilization:
    """Measure the peak rate of a matrix multiplication, look up the data sheet's, and compare the training rate.

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
    peak = roofline.limits_from(measure([candidate], 0.5, 3, show_progress=False)).get(roofline.ARITHMETIC)
    specs = gpu_specs.peak_flops(torch.cuda.get_device_name(), amp or torch.float32) if device == "cuda" else None
    stated, source = specs or (None, None)
    return Utilization(
        training_gflop_per_image=significant(flops / 1e9),
        reached_tflop_per_s=significant(reached / 1e12),
        measured_peak_tflop_per_s=significant(peak / 1e12) if peak else None,
        measured_peak_precision=dtype_name(roofline.MATMUL[device][1]) if peak else None,
        mfu=significant(reached / peak) if peak else None,
        data_sheet=source,
        data_sheet_tflop_per_s=significant(stated / 1e12) if stated else None,
        mfu_of_data_sheet=significant(reached / stated) if stated else None,
    )


def significant(value: float) -> float:
    """Round to five significant digits."""
    return float(f"{value:.5g}")


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name of a dtype without "torch.". None is float32, as for autocast."""
    return str(dtype or torch.float32).removeprefix("torch.")
