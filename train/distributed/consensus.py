"""What all ranks do after an optimizer update, decided by all of them together: end the run, or save it.

Nothing here waits for the device, and ranks wait for each other about once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from train.distributed import process_group

EVERY_S = 1.0


class Agreement:
    """asked: of this rank, the number of the signal that asks it to end, else 0; is_due: whether to save, by the first
    rank's clock."""

    def __init__(self, asked: Callable[[], int], is_due: Callable[[], bool]) -> None:
        self._asked, self._is_due = asked, is_due
        self._is_alone = process_group.world_size() == 1
        self.begin(0)

    def begin(self, done: int) -> None:
        """After `done` updates of the run: the ranks agree after the next one. To be called on all ranks alike."""
        self._last, self._next, self._interval = done, done + 1, 1
        self._time_s = time.monotonic()

    def after(self, done: int) -> tuple[int, bool]:
        """(the signal to end by, or 0; whether to save now), the same on all ranks after `done` updates of the run."""
        if self._is_alone:
            return self._asked(), self._is_due()
        if done < self._next:
            return 0, False
        mine = (int(self._is_due()), self._wanted_interval(done)) if process_group.is_first_rank() else (0, 0)
        signal, due, self._interval = process_group.max_over_ranks([self._asked(), *mine])
        self._last, self._next, self._time_s = done, done + self._interval, time.monotonic()
        return signal, bool(due)

    def now(self) -> int:
        """The signal to end by, or 0: all ranks ask here and now."""
        return process_group.max_over_ranks([self._asked()])[0]

    def _wanted_interval(self, done: int) -> int:
        """Updates until ranks ask again: as many as take about EVERY_S, and at most twice as many as the last time."""
        update_s = (time.monotonic() - self._time_s) / max(done - self._last, 1)
        return max(1, min(2 * self._interval, int(EVERY_S / max(update_s, 1e-6))))
