"""What only a GPU answers about NVIDIA DALI: does it copy pinned inputs, and when does it free an output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.tensors import TensorListCPU

from configs.schema import AugConfig, DataConfig
from pipelines import build_train_loader
from tools.benchmarks.engine import ours, results
from tools.benchmarks.engine.candidate import Candidate, Workload
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.interleaved import measure, run_in_subprocess
from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites.datasets import image_dataset
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP
from tools.benchmarks.suites.settings import Settings, is_out_of_time

SIDE = 224
BATCHES = 4  # fed in turn
HOLD_CYCLES = 2**32  # of a stream: about 2 s
AFTER = 8  # batches taken while the stream is held


@contextmanager
def transfers(batch_size: int) -> Iterator[dict[str, Workload]]:
    """Copies of batches to the GPU by torch and as an input of DALI, from pinned and from pageable memory; in bytes.

    The input is not copied on the host (no_copy), so from pinned memory it should reach the rate of torch's copy.
    """
    shape = (batch_size, SIDE, SIDE, 3)
    pageable = [torch.zeros(shape, dtype=torch.uint8) for _ in range(BATCHES)]
    pinned = [one.pin_memory() for one in pageable]
    size = pageable[0].numel()
    workloads = {}
    for name, batches in (("pinned", pinned), ("pageable", pageable)):
        workloads[f"torch, {name}"] = Workload(_torch_copies(batches), size)
        workloads[f"DALI input, {name}"] = Workload(_dali_copies(batches), size)
    yield workloads


def _torch_copies(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    target = torch.empty_like(batches[0], device="cuda")
    while True:
        for batch in batches:
            yield target.copy_(batch, non_blocking=True)


def _dali_copies(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """One iteration at a time ahead, as the loader has it."""
    pipeline = _input_to_gpu(len(batches[0]))

    def feed(batch: torch.Tensor) -> None:
        fed = TensorListCPU(batch.numpy(), layout="HWC", is_pinned=batch.is_pinned())
        pipeline.feed_input("images", fed)
        pipeline.schedule_run()

    feed(batches[-1])
    while True:
        for batch in batches:
            feed(batch)
            (images,) = pipeline.outputs(cuda_stream=torch.cuda.current_stream())
            yield torch.from_dlpack(images.as_tensor())


def _input_to_gpu(batch_size: int) -> Pipeline:
    """A pipeline that does nothing else."""
    options: dict[str, Any] = {"batch_size": batch_size, "num_threads": 1, "device_id": 0, "exec_dynamic": True}

    def define() -> Any:
        return fn.external_source(name="images", layout="HWC", no_copy=True).gpu()  # type: ignore[union-attr]

    pipeline = pipeline_def(prefetch_queue_depth=1, **options)(define)()
    pipeline.build()
    return pipeline


def output_survives(data: DataConfig, aug: AugConfig) -> dict[str, Any]:
    """Drop a batch that a held stream has still to read, take further batches on another stream, compare the bytes.

    equal: whether the held stream read the batch as it was. held: whether it was still held after the last batch was
    taken; if not, the answer means nothing. reused: whether a later batch lay at the address of the dropped one.
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
        addresses = [batch.images.data_ptr() for batch in itertools.islice(batches, AFTER)]
    held = not done.query()
    torch.cuda.synchronize()
    equal = torch.equal(read.cpu(), expected.cpu())
    return {"equal": equal, "held": held, "reused": address in addresses, "batches": len(addresses)}


def output_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    del found
    for encoding in ("npy", "jpeg"):
        folder = image_dataset(settings, 96, encoding)
        data = DataConfig(path=str(folder), batch_size=limited_batch_size(folder, 256), image_size=96, placement="host")
        answer = run_in_subprocess(output_survives, data, RESIZED_CROP, deadline=settings.deadline)
        yield {"name": f"96x96, {encoding}", "ours": True, "error": None, **answer}


def transfer_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    del found
    batch = 256 if settings.samples is None else 16
    measurements = measure([Candidate("", transfers, (batch,))], settings.seconds, settings.rounds, settings.deadline)
    for measurement in measurements:
        row = results.measurement_row(measurement, ours=True)
        yield row | ({"gb_per_s": float(f"{measurement.rate / 1e9:.4g}")} if measurement.rates else {})


def memory_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    """Measure the GPU memory of one loader at a time."""
    del found
    cases = [
        (224, "npy", "host"),
        (224, "jpeg", "auto"),
        (96, "npy", "host"),
        (96, "npy", "device"),
        (96, "jpeg", "auto"),
        (32, "npy", "device"),
    ]
    for side, encoding, placement in cases:
        name = f"{side}x{side} {encoding}, {placement}"
        if is_out_of_time(settings):
            yield results.skipped_row(name)
            continue
        folder = image_dataset(settings, side, encoding)
        batch = limited_batch_size(folder, 1024)
        data = DataConfig(path=str(folder), batch_size=batch, image_size=side, placement=placement)  # type: ignore[arg-type]
        candidate = Candidate(name, ours.loading, (data, PAD_CROP if side == 32 else RESIZED_CROP, "cuda"))
        (measurement,) = measure([candidate], settings.seconds, 1, settings.deadline)
        yield results.measurement_row(
            measurement, ours=True, batch_size=batch, batch_gib=round(batch * side * side * 3 / 2**30, 4)
        )
