"""Replace samples that cannot be decoded, up to a limit.

The substitute of a bad sample is the next decodable sample in stored order. The choice depends only on the sample and
the data, so every rank makes the same choice without communication, at any batch size and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np

from configs.schema import DataConfig, OnBadSample
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage.split import Split

MAX_NAMED = 3  # samples named in an error message
REPAIR = "run `zhu convert verify` on the data set and convert the source again"
FindDefect = Callable[[int], str | None]  # returns the reason why a sample cannot be decoded, or None if it can


class Undecodable(Exception):
    """Raised by a source for samples that it cannot decode. The loader handles this exception.

    Args:
        defects: Maps the index of each undecodable sample to the reason.
    """

    def __init__(self, defects: dict[int, str]) -> None:
        super().__init__(f"samples {[*defects]} cannot be decoded")
        self.defects = defects


class BadSamples:
    """Bad samples that this process has found in one split. All threads and stages share one instance.

    Args:
        split: Split that contains the samples.
        budget: Maximum number of bad samples to replace.
        advice: Text that ends the error message if the budget is 0.
    """

    def __init__(self, split: Split, budget: int, advice: str) -> None:
        self.split = split
        self.budget = budget
        self._advice = advice
        self._found: dict[int, str] = {}  # reason by sample, in the order of discovery
        # int64 [samples]: substitute of each sample, usually the sample itself; None (fast path) if none is bad
        self._substitutes: np.ndarray | None = None
        self._lock = Lock()

    @property
    def can_replace(self) -> bool:
        """True if the budget allows replacing bad samples."""
        return self.budget > 0

    @property
    def found(self) -> list[tuple[int, int]]:
        """Pairs (bad sample, substitute) in the order of discovery."""
        with self._lock:
            return [] if self._substitutes is None else [(bad, int(self._substitutes[bad])) for bad in self._found]

    def substitute(self, samples: np.ndarray) -> np.ndarray:
        """Return `samples`, int64 [N], with known bad samples replaced."""
        return samples if self._substitutes is None else self._substitutes[samples]

    def add(self, defects: dict[int, str], defect: FindDefect) -> None:
        """Record bad samples and find their substitutes.

        Args:
            defects: Maps the index of each bad sample to the reason.
            defect: Function that tests candidate substitutes.

        Raises:
            UserError: The number of bad samples exceeds the budget, or no sample of the split can be decoded.
        """
        with self._lock:
            for sample, reason in defects.items():
                if sample not in self._found:  # another thread may have added it
                    self._add(sample, reason, defect)

    def _add(self, sample: int, reason: str, defect: FindDefect) -> None:
        if not self.can_replace:
            raise UserError(f"{self.split.describe(sample)} {reason}: the data set is damaged; {REPAIR}{self._advice}")
        bad: dict[int, str] = {sample: reason}
        self.check_budget([*self._found, *bad])
        substitute = self._next(sample)
        while substitute != sample and (also_bad := defect(substitute)) is not None:
            bad[substitute] = also_bad
            self.check_budget([*self._found, *bad])
            substitute = self._next(substitute)
        if substitute == sample:
            raise UserError(f"no sample of split {self.split.name!r} can be decoded; {REPAIR}")
        substitutes = np.arange(len(self.split)) if self._substitutes is None else self._substitutes.copy()
        for one, reason in bad.items():
            substitutes[substitutes == one] = substitute  # also replace it as a substitute
            self._found[one] = reason
            warn(
                f"{self.split.describe(one)} {reason}; sample {substitute} takes its place "
                f"({len(self._found)} of at most {self.budget} bad samples, data.max_bad_samples)",
                on_any_rank=True,
            )
        self._substitutes = substitutes

    def _next(self, sample: int) -> int:
        """Return the next sample in stored order that is not known to be bad.

        After the last sample, the search continues at the first one. Return `sample` if all other samples are bad.
        """
        after = (sample + 1) % len(self.split)
        while after in self._found and after != sample:
            after = (after + 1) % len(self.split)
        return after

    def check_budget(self, found: Sequence[int] | np.ndarray) -> None:
        """Raise UserError if `found` has more samples than the budget allows.

        Args:
            found: Indices of bad samples, in the order of discovery. The error names the last ones.
        """
        if len(found) > self.budget:
            last = ", ".join(self.split.describe(int(sample)) for sample in found[-MAX_NAMED:])
            raise UserError(
                f"{len(found)} samples of split {self.split.name!r} cannot be decoded, more than "
                f"data.max_bad_samples={self.budget}, the last of them {last}; {REPAIR}, or allow more"
            )


def for_training(split: Split, data: DataConfig) -> BadSamples:
    """Return a `BadSamples` that replaces samples as data.on_bad_sample and data.max_bad_samples allow."""
    advice = f", or let up to data.max_bad_samples={data.max_bad_samples} be replaced with data.on_bad_sample=skip"
    return BadSamples(split, data.max_bad_samples if data.on_bad_sample == OnBadSample.SKIP else 0, advice)


def for_evaluation(split: Split, data: DataConfig) -> BadSamples:
    """Return a `BadSamples` that never replaces samples, since an evaluation counts every sample exactly once."""
    skips = data.on_bad_sample == OnBadSample.SKIP
    advice = "; data.on_bad_sample=skip is for training, an evaluation needs every sample" if skips else ""
    return BadSamples(split, 0, advice)
