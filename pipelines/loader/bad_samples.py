"""Samples that cannot be decoded: which others take their places in training, and when there are too many of them.

A substitute is a function of the sample and of the data alone: the next sample in stored order that can be decoded. So
nobody needs to be told of it, and whoever meets the sample, at whatever batch, rank or restart, puts the same into its
place. Knows no pixels: a source says which samples it cannot decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np

from configs.schema import DataConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage.split import Split

MAX_NAMED = 3  # samples that an error names
REPAIR = "run `tools/convert.py verify` on the data set and convert the source again"
FindDefect = Callable[[int], str | None]  # what is wrong with a sample; None: it can be decoded


class Undecodable(Exception):
    """Raised by a source for samples of a batch, {sample: what is wrong}; never leaves the loader."""

    def __init__(self, defects: dict[int, str]) -> None:
        super().__init__(f"samples {[*defects]} cannot be decoded")
        self.defects = defects


class BadSamples:
    """Those of one split that this process has met, shared by all threads and stages that read it."""

    def __init__(self, split: Split, budget: int, otherwise: str) -> None:
        """budget: how many may be replaced; otherwise: what an error says beside how to mend the data, where none."""
        self.split = split
        self.budget = budget
        self._otherwise = otherwise
        self._found: dict[int, str] = {}  # what is wrong with each, in the order in which they were found
        # int64 [samples]: who stands in for each sample, itself for most; None while nobody does, which is what a
        # batch looks at
        self._in_place: np.ndarray | None = None
        self._lock = Lock()

    @property
    def can_replace(self) -> bool:
        """Whether it does so at all."""
        return self.budget > 0

    @property
    def found(self) -> list[tuple[int, int]]:
        """(sample, who took its place), in the order in which they were found."""
        with self._lock:
            return [] if self._in_place is None else [(bad, int(self._in_place[bad])) for bad in self._found]

    def substitute(self, samples: np.ndarray) -> np.ndarray:
        """The samples, int64 [N], with substitutes for those that are known to be bad."""
        return samples if self._in_place is None else self._in_place[samples]

    def add(self, defects: dict[int, str], defect: FindDefect) -> None:
        """Take note of bad samples and find their substitutes.

        Raises:
            UserError: that names them, where none may be replaced or they are more than the budget.
        """
        with self._lock:
            for sample, wrong in defects.items():
                if sample not in self._found:  # else another thread was first
                    self._add(sample, wrong, defect)

    def _add(self, sample: int, wrong: str, defect: FindDefect) -> None:
        if not self.can_replace:
            raise UserError(
                f"{self.split.describe(sample)} {wrong}: the data set is damaged; {REPAIR}{self._otherwise}"
            )
        bad: dict[int, str] = {sample: wrong}
        self.check_budget([*self._found, *bad])
        substitute = self._next(sample)
        while substitute != sample and (also_wrong := defect(substitute)) is not None:
            bad[substitute] = also_wrong
            self.check_budget([*self._found, *bad])
            substitute = self._next(substitute)
        if substitute == sample:
            raise UserError(f"no sample of split {self.split.name!r} can be decoded; {REPAIR}")
        in_place = np.arange(len(self.split)) if self._in_place is None else self._in_place.copy()
        for one, its_wrong in bad.items():
            in_place[in_place == one] = substitute  # also where it has stood in for others until now
            self._found[one] = its_wrong
            warn(
                f"{self.split.describe(one)} {its_wrong}; sample {substitute} takes its place "
                f"({len(self._found)} of at most {self.budget} bad samples, data.max_bad_samples)",
                on_any_rank=True,
            )
        self._in_place = in_place

    def _next(self, sample: int) -> int:
        """The sample behind this one in stored order, the first behind the last; not one that is known to be bad."""
        after = (sample + 1) % len(self.split)
        while after in self._found and after != sample:
            after = (after + 1) % len(self.split)
        return after

    def check_budget(self, found: Sequence[int] | np.ndarray) -> None:
        """Raise UserError where so many samples, in the order in which they were found, are too many."""
        if len(found) > self.budget:
            last = ", ".join(self.split.describe(int(sample)) for sample in found[-MAX_NAMED:])
            raise UserError(
                f"{len(found)} samples of split {self.split.name!r} cannot be decoded, more than "
                f"data.max_bad_samples={self.budget}, the last of them {last}; {REPAIR}, or allow more"
            )


def for_training(split: Split, data: DataConfig) -> BadSamples:
    """As data.on_bad_sample says."""
    otherwise = f", or let up to data.max_bad_samples={data.max_bad_samples} be replaced with data.on_bad_sample=skip"
    return BadSamples(split, data.max_bad_samples if data.on_bad_sample == "skip" else 0, otherwise)


def for_evaluation(split: Split, data: DataConfig) -> BadSamples:
    """None is replaced, since every sample counts exactly once."""
    skips = data.on_bad_sample == "skip"
    otherwise = "; data.on_bad_sample=skip is for training, an evaluation can do without none" if skips else ""
    return BadSamples(split, 0, otherwise)
