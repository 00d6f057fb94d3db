"""Precisions that a CPU emulates, and the warning about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from configs.utils.warnings import warn
from helpers.training import CPU, alone, make_state
from models.cpu.precision import bf16_is_native, slow_precision_reason
from train.engine.execution import amp_dtype

X86 = {"architecture": "x86_64"}
BF16 = {**X86, "avx512_bf16": True}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate a CPU with these features, and oneDNN with or without support of bf16 and fp16."""

    def make(features: dict[str, Any], *, bf16: bool = True, fp16: bool = False, limit: str = "") -> None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)

    return make


@pytest.mark.parametrize(
    ("features", "options", "is_native"),
    [
        (BF16, {}, True),
        (BF16, {"limit": "AVX512_CORE_BF16"}, True),
        (BF16, {"limit": "AVX512_CORE_AMX"}, True),
        (BF16, {"limit": "AVX512_CORE"}, False),
        (BF16, {"limit": "avx512_core_vnni"}, False),
        (BF16, {"limit": "AVX2", "bf16": False}, False),  # oneDNN takes its limit into account
        ({**X86, "avx512_f": True, "avx512_bf16": False}, {}, False),
        ({**X86, "avx2": True, "avx_ne_convert": True}, {"bf16": False}, False),
        ({"architecture": "aarch64"}, {"bf16": True}, True),
        ({"architecture": "aarch64"}, {"bf16": False}, False),
    ],
)
def test_bf16_needs_cpu_instructions_and_onednn_permission(
    features: dict[str, Any], options: dict[str, Any], is_native: bool, cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(features, **options)
    assert bf16_is_native() == is_native
    assert (slow_precision_reason(torch.bfloat16) is None) == is_native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not bf16_is_native()


def test_torch_reports_capabilities_of_this_cpu() -> None:
    assert isinstance(bf16_is_native(), bool)
    assert torch.cpu.get_capabilities()["architecture"]


def test_fp16_is_slow_in_cpu_training(cpu: Any) -> None:
    cpu(BF16, fp16=True)
    assert "for training" in (slow_precision_reason(torch.float16) or "")
    assert slow_precision_reason(torch.float16, trains=False) is None
    cpu(BF16, fp16=False)
    assert "for training" not in (slow_precision_reason(torch.float16, trains=False) or "for training")


@pytest.mark.parametrize(
    ("amp", "features", "warning"),
    [
        (
            "bf16",
            X86,
            "train.amp=bf16 takes 2 to 1,000 times as long as float32 here, since this CPU has no bf16 instr",
        ),
        (
            "fp16",
            BF16,
            "train.amp=fp16 takes 2 to 1,000 times as long as float32 here, since oneDNN has no fast fp16 ke",
        ),
        ("bf16", BF16, ""),
        ("auto", X86, ""),
        ("off", X86, ""),
    ],
)
def test_emulated_precision_warns_and_is_never_auto(
    amp: str, features: dict[str, Any], warning: str, cpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(features)
    warn.cache_clear()
    with alone():
        make_state(nn.Linear(2, 2), amp=amp)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {warning}") if warning else said == ""
    for auto in (X86, BF16):
        cpu(auto)
        assert amp_dtype("auto", CPU) is None
