"""Choose the backend of a loader, the placement of its samples and its number of threads."""

from __future__ import annotations

import os

import torch

from configs.schema import DataConfig
from configs.utils.errors import UserError
from pipelines.loader.backend import Backend, CpuBackend, LoaderSpec, build_graph
from pipelines.loader.buffers import load_resident, resident_fits
from pipelines.storage.split import Split


def choose_backend(spec: LoaderSpec) -> Backend:
    """Choose the CPU kernels on a CPU. On a GPU, choose DALI unless a single copy or kernel launch suffices."""
    if spec.device.type != "cuda":
        return CpuBackend(spec)
    # DALI and Triton are imported only where they are used: importing DALI takes a second, and Triton comes with GPU
    # builds of torch only.
    if spec.split.encoding == "npy" and build_graph(spec) is None:
        from pipelines.gpu.copy_backend import CopyBackend

        return CopyBackend(spec)
    if spec.only_crops_flips_and_erases:
        from pipelines.gpu.triton_ops import TritonBackend

        return TritonBackend(spec)
    from pipelines.gpu.dali_backend import DaliBackend

    return DaliBackend(spec)


def default_threads(ranks: int) -> int:
    """Return the number of CPU threads per rank when `ranks` ranks share the cores available to this process."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def load_placed(data: DataConfig, split: Split, device: torch.device) -> torch.Tensor | None:
    """Return the pixels of a split that data.placement puts in device memory, or None; see `load_resident`.

    data.placement=auto depends on the size of the split; see `resident_fits`.

    Raises:
        UserError: data.placement=device, but the split stores encoded images; or a shard has changed.
    """
    if data.placement == "device" and split.encoding != "npy":
        raise UserError(
            f"data.placement=device keeps raw pixels, but {data.path} stores {split.encoding}; "
            "use data.placement=host or convert with --encoding npy"
        )
    is_resident = resident_fits(split, device) if data.placement == "auto" else data.placement == "device"
    return load_resident(split, device) if is_resident else None
