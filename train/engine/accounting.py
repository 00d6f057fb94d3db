"""Accounts of samples over all ranks: each once in an evaluation, and those that training had to do without.

All ranks must come here together. Loaders count for themselves; knows no network.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.batches import Batch
from pipelines.loader.coverage import MODULUS, SampleChecksum, split_checksum
from pipelines.loader.loader import Loader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives

HALF = 2**32  # a checksum travels in halves, whose sums over ranks fit into 64 bits with a sign


def check_full_coverage(loader: Iterable[Batch]) -> None:
    """Raise RuntimeError unless the last iteration over an evaluation's loader, finished on all ranks, has handed over
    each sample of the split once. Other batches, such as those that a model is warmed up with, have no samples."""
    if not isinstance(loader, Loader):
        return
    loader.check_unchanged()
    upper, lower = divmod(loader.seen.checksum, HALF)
    samples, upper, lower = collectives.sum_over_ranks(torch.tensor([loader.seen.samples, upper, lower])).tolist()
    found, expected = SampleChecksum(samples, (upper * HALF + lower) % MODULUS), split_checksum(len(loader.split))
    name = loader.split.name
    if found.samples != expected.samples:
        raise RuntimeError(
            f"evaluation counted {found.samples} samples of split {name!r}, which has {expected.samples}"
        )
    if found != expected:
        raise RuntimeError(
            f"evaluation counted the {expected.samples} samples of split {name!r}, but not each of them once: "
            "their checksum is not the split's"
        )


def report_bad_samples(loader: TrainLoader) -> str | None:
    """Which samples any rank has replaced since the start of this process, for the log; None where there are none.

    Raises:
        UserError: where all ranks together have found more than data.max_bad_samples, which each alone has not.
    """
    samples = bad_samples_on_any_rank(loader.bad)
    if not len(samples):
        return None
    loader.bad.check_budget(samples)
    shown = ", ".join(map(str, samples[:20].tolist())) + (" …" if len(samples) > 20 else "")
    return (
        f"bad samples so far: {len(samples)} of at most {loader.bad.budget}, which others stand in for "
        f"(split {loader.bad.split.name!r}: {shown})"
    )


def bad_samples_on_any_rank(bad: BadSamples) -> np.ndarray:
    """int64, ascending. Costs a small reduction as long as there are none."""
    if not bad.can_replace:
        return np.empty(0, np.int64)
    found = [sample for sample, _ in bad.found]
    if int(collectives.sum_over_ranks(torch.tensor(len(found)))) == 0:
        return np.empty(0, np.int64)
    flags = torch.zeros(len(bad.split), dtype=torch.int32)
    flags[found] = 1
    return np.flatnonzero(collectives.sum_over_ranks(flags).numpy())
