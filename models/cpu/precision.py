"""Check whether oneDNN computes an autocast dtype with native instructions on this CPU or emulates it slowly."""

from __future__ import annotations

import torch

from models.cpu.onednn import isa_limit


def slow_precision_reason(amp: torch.dtype | None, trains: bool = True) -> str | None:
    """Return the reason why autocast to `amp` is slower than float32 on this CPU, or None if it is not slower.

    `trains` says whether backward passes are run. Backward passes are slow in fp16 on every CPU, and in bf16 on CPUs
    without native instructions. Compared to float32, they took 2.6 times (AVX-512) or 8 times (AVX2) as long in bf16,
    and 13 to 240 times as long in fp16. This was measured with two convolutions of 32 and 64 channels on one thread of
    a Xeon with AMX, limited by ONEDNN_MAX_CPU_ISA. The slowdown is larger for wider layers.
    """
    if amp == torch.float16 and (trains or not _fp16_is_native()):
        return f"oneDNN has no fast fp16 kernels for {'training on a CPU' if trains else 'this CPU'}"
    if amp == torch.bfloat16 and not bf16_is_native():
        limit = isa_limit()
        allowed = f" that ONEDNN_MAX_CPU_ISA={limit} allows" if limit else ""
        return f"this CPU has no bf16 instructions (AVX512_BF16, AMX, Arm's BF16){allowed}"
    return None


def bf16_is_native() -> bool:
    """Return True if oneDNN computes bf16 with native instructions instead of emulating it."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False  # on Arm, this check is exact
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return True
    # On x86 the check above only tests for AVX-512. AVX_NE_CONVERT does not count: it is as slow as AVX2 (measured).
    return bool(has.get("avx512_bf16")) and isa_limit() not in ("avx512_core", "avx512_core_vnni")


def _fp16_is_native() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
