"""Check DALI on a GPU: copy speed from pinned memory, lifetime of outputs, and memory usage of loaders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from configs.schema import AugConfig, DataConfig
from pipelines import build_train_loader
from tools.benchmarks.engine import ours
from tools.benchmarks.engine.candidate import Candidate, Workload
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.interleaved import measure, run_in_subprocess
from tools.benchmarks.engine.results import Row, measurement_row, new_row, rounded, skipped_row
from tools.benchmarks.suites.datasets import image_dataset
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP
from tools.benchmarks.suites.settings import Settings, is_out_of_time

SIDE = 224
BATCHES = 4  # number of batches that are fed cyclically
HOLD_CYCLES = 2**32  # clock cycles for which a stream is kept busy, about 2 s
FOLLOWING_BATCHES = 8  # number of batches taken while the stream is busy
MEMORY_CASES: tuple[tuple[int, str, Literal["auto", "host", "device"]], ...] = (  # side, encoding and placement
    (224, "npy", "host"),
    (224, "jpeg", "auto"),
    (96, "npy", "host"),
    (96, "npy", "device"),
    (96, "jpeg", "auto"),
    (32, "npy", "device"),
)


@contextmanager
def transfers(batch_size: int) -> Iterator[dict[str, Workload]]:
    """Build workloads that copy batches to the GPU, with torch and as inputs of a DALI pipeline.

    The batches are in pinned or in pageable memory. Rates are in bytes/s. DALI is told not to copy inputs on the host
    (no_copy), so it should be as fast as torch if the memory is pinned.
    """
    shape = (batch_size, SIDE, SIDE, 3)
    pageable = [torch.zeros(shape, dtype=torch.uint8) for _ in range(BATCHES)]
    pinned = [batch.pin_memory() for batch in pageable]
    size = pageable[0].numel()
    workloads = {}
    for name, batches in (("pinned", pinned), ("pageable", pageable)):
        workloads[f"torch, {name}"] = Workload(_torch_copies(batches), size)
        workloads[f"DALI input, {name}"] = Workload(_dali_copies(batches), size)
    yield workloads


def _torch_copies(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    target = torch.empty_like(batches[0], device="cuda")
    for batch in itertools.cycle(batches):
        yield target.copy_(batch, non_blocking=True)


def _dali_copies(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Copy batches with a DALI pipeline, with one iteration scheduled ahead as in the loader."""
    pipeline = Pipeline(len(batches[0]), num_threads=1, device_id=0, exec_dynamic=True, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.external_source(name="images", layout="HWC", no_copy=True).gpu())  # type: ignore[union-attr]
    pipeline.build()

    def feed(batch: torch.Tensor) -> None:
        images = TensorListCPU(batch.numpy(), layout="HWC", is_pinned=batch.is_pinned())
        pipeline.feed_input("images", images)
        pipeline.schedule_run()

    feed(batches[-1])
    for batch in itertools.cycle(batches):
        feed(batch)
        (images,) = pipeline.outputs(cuda_stream=torch.cuda.current_stream())
        yield torch.from_dlpack(images.as_tensor())


def output_survives(data: DataConfig, aug: AugConfig) -> dict[str, object]:
    """Test whether DALI keeps a batch's memory until a CUDA stream has read it, even after Python has released it.

    The stream is kept busy before it reads the batch. In the meantime, more batches are taken on another stream.

    Returns:
        A dict with these entries:

        equal: Whether the busy stream read the original bytes.
        held: Whether this stream was still busy after the last batch. If not, the test is inconclusive.
        reused: Whether a later batch was at the address of the released batch.
        batches: Number of batches taken in the meantime.
    """
    expected = next(iter(build_train_loader(data, aug, device="cuda"))).images.clone()
    torch.cuda.synchronize()
    batches = iter(build_train_loader(data, aug, device="cuda"))
    holding, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(holding):
        batch = next(batches)
        torch.cuda._sleep(HOLD_CYCLES)
        read = batch.images.clone()
        done = torch.cuda.Event()
        done.record()
        address = batch.images.data_ptr()
        del batch
    with torch.cuda.stream(other):
        addresses = [batch.images.data_ptr() for batch in itertools.islice(batches, FOLLOWING_BATCHES)]
    held = not done.query()
    torch.cuda.synchronize()
    equal = torch.equal(read.cpu(), expected.cpu())
    return {"equal": equal, "held": held, "reused": address in addresses, "batches": len(addresses)}


def output_rows(settings: Settings) -> Iterator[Row]:
    """Run `output_survives` on raw pixels and on JPEG, and yield a row for each encoding."""
    for encoding in ("npy", "jpeg"):
        folder = image_dataset(settings, 96, encoding)
        data = DataConfig(path=str(folder), batch_size=limited_batch_size(folder, 256), image_size=96, placement="host")
        result = run_in_subprocess(output_survives, data, RESIZED_CROP, deadline=settings.deadline)
        yield new_row(f"96x96, {encoding}", **result)


def transfer_rows(settings: Settings) -> Iterator[Row]:
    """Measure `transfers` and yield a row per workload, in GB/s."""
    candidate = Candidate("", transfers, (256 if settings.samples is None else 16,))
    for measurement in measure([candidate], settings.seconds, settings.rounds, settings.deadline):
        rate = {"gb_per_s": rounded(measurement.rate / 1e9, 4)} if measurement.rates else {}
        yield measurement_row(measurement, ours=True, **rate)


def memory_rows(settings: Settings) -> Iterator[Row]:
    """Measure how much GPU memory several loaders use, one at a time, and yield a row for each."""
    for side, encoding, placement in MEMORY_CASES:
        name = f"{side}x{side} {encoding}, {placement}"
        if is_out_of_time(settings):
            yield skipped_row(name)
            continue
        folder = image_dataset(settings, side, encoding)
        batch_size = limited_batch_size(folder, 1024)
        data = DataConfig(path=str(folder), batch_size=batch_size, image_size=side, placement=placement)
        candidate = Candidate(name, ours.loading, (data, PAD_CROP if side == 32 else RESIZED_CROP, "cuda"))
        (measurement,) = measure([candidate], settings.seconds, 1, settings.deadline)
        batch_gib = round(batch_size * side * side * 3 / 2**30, 4)
        yield measurement_row(measurement, ours=True, batch_size=batch_size, batch_gib=batch_gib)
