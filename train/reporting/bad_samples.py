"""Report the bad samples that training has replaced on any rank."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives


def report_bad_samples(loader: TrainLoader) -> str | None:
    """Return a sentence about the bad samples that any rank has replaced, or None if there are none.

    Samples replaced before the run was resumed do not count.

    All ranks must call this function together.

    Raises:
        UserError: The number of bad samples, over all ranks, exceeds data.max_bad_samples.
    """
    samples = bad_samples_on_any_rank(loader.bad)
    if not len(samples):
        return None
    loader.bad.check_budget(samples)
    shown = ", ".join(map(str, samples[:20].tolist())) + (" …" if len(samples) > 20 else "")
    return (
        f"bad samples so far: {len(samples)} of at most {loader.bad.budget}, replaced by others "
        f"(split {loader.bad.split.name!r}: {shown})"
    )


def bad_samples_on_any_rank(bad: BadSamples) -> np.ndarray:
    """Return the indices of the samples that any rank has replaced, int64 [N], in ascending order.

    All ranks must call this function together. If no sample was replaced, the ranks exchange at most one number.
    """
    if not bad.can_replace:
        return np.empty(0, np.int64)
    found = [sample for sample, _ in bad.found]
    if int(collectives.sum_over_ranks(torch.tensor(len(found)))) == 0:
        return np.empty(0, np.int64)
    flags = torch.zeros(len(bad.split), dtype=torch.int32)
    flags[found] = 1
    return np.flatnonzero(collectives.sum_over_ranks(flags).numpy())
