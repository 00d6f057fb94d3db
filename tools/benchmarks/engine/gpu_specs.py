"""Peak dense matmul throughput from NVIDIA's data sheets and white papers.

If a data sheet gives only the sparse rate, half of it is listed and the source is marked "halved". For GeForce cards,
the rate is that of float32 accumulation, which torch uses.
"""

from __future__ import annotations

import torch

BF16, FP16, TF32 = torch.bfloat16, torch.float16, torch.float32  # training computes float32 products in TF32
# TFLOP/s in bf16, fp16 and tf32, and the source, by device name; the longest matching prefix is used
SHEETS: dict[str, tuple[float | None, float | None, float | None, str]] = {
    "NVIDIA B200": (2250, 2250, 1125, "HGX B200 data sheet, halved"),
    "NVIDIA H200": (989.5, 989.5, 494.5, "H200 data sheet, halved"),
    "NVIDIA H200 NVL": (835.5, 835.5, 417.5, "H200 data sheet, halved"),
    "NVIDIA H100": (989.5, 989.5, 494.5, "H100 data sheet, SXM, halved"),
    "NVIDIA H100 PCIe": (756.5, 756.5, 378, "H100 PCIe data sheet, halved"),
    "NVIDIA H100 NVL": (835.5, 835.5, 417.5, "H100 data sheet, NVL, halved"),
    "NVIDIA A100": (312, 312, 156, "A100 data sheet"),
    "NVIDIA A40": (149.7, 149.7, 74.8, "A40 data sheet"),
    "NVIDIA A30": (165, 165, 82, "A30 data sheet"),
    "NVIDIA A10": (125, 125, 62.5, "A10 data sheet"),
    "NVIDIA L40S": (362, 362, 183, "L40S data sheet"),
    "NVIDIA L4": (121, 121, 60, "L4 data sheet, halved"),
    "NVIDIA L40": (181, 181, 90.5, "L40 data sheet"),
    "Tesla T4": (None, 65, None, "T4 data sheet"),
    "Tesla V100-SXM2": (None, 125, None, "V100 data sheet"),
    "Tesla V100-PCIE": (None, 112, None, "V100 data sheet"),
    "NVIDIA GeForce RTX 3090": (71, 71, 35.6, "GA102 white paper"),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6, "Ada white paper"),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> tuple[float, str] | None:
    """Return the peak dense matmul throughput in FLOP/s and its source, or None if it is unknown."""
    matches = [name for name in SHEETS if f"{device_name} ".startswith((f"{name} ", f"{name}-"))]
    if not matches or "Laptop" in device_name:  # laptops have a smaller chip under the same name
        return None
    *rates, source = SHEETS[max(matches, key=len)]
    teraflops = dict(zip((BF16, FP16, TF32), rates, strict=True)).get(dtype)
    return None if teraflops is None else (float(teraflops) * 1e12, source)
