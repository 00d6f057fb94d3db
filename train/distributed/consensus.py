"""What all ranks do after an optimizer update, decided by all of them together: end the run, or save it.

Nothing here waits for the device, and ranks wait for each other about once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from train.distributed import collectives
from train.distributed.process_group import get_world_size, is_first_rank

POLL_INTERVAL_S = 1.0


class StopConsensus:
    """asked: of this rank, the number of the signal that asks it to end, else 0; is_due: whether to save, by the first
    rank's clock."""

    def __init__(self, pending_signal: Callable[[], int], is_due: Callable[[], bool]) -> None:
        self._pending_signal, self._is_due = pending_signal, is_due
        self._is_alone = get_world_size() == 1
        self.reset(0)

    def reset(self, steps_done: int) -> None:
        """After `done` updates of the run: the ranks agree after the next one. To be called on all ranks alike."""
        self._last, self._next, self._interval = steps_done, steps_done + 1, 1
        self._time_s = time.monotonic()

    def poll(self, steps_done: int) -> tuple[int, bool]:
        """(the signal to end by, or 0; whether to save now), the same on all ranks after `done` updates of the run."""
        if self._is_alone:
            return self._pending_signal(), self._is_due()
        if steps_done < self._next:
            return 0, False
        mine = (int(self._is_due()), self._wanted_interval(steps_done)) if is_first_rank() else (0, 0)
        signal, due, self._interval = collectives.max_over_ranks([self._pending_signal(), *mine])
        self._last, self._next, self._time_s = steps_done, steps_done + self._interval, time.monotonic()
        return signal, bool(due)

    def poll_now(self) -> int:
        """The signal to end by, or 0: all ranks ask here and now."""
        return collectives.max_over_ranks([self._pending_signal()])[0]

    def _wanted_interval(self, steps_done: int) -> int:
        """Return the steps that take about POLL_INTERVAL_S, at most twice the previous interval."""
        update_s = (time.monotonic() - self._time_s) / max(steps_done - self._last, 1)
        return max(1, min(2 * self._interval, int(POLL_INTERVAL_S / max(update_s, 1e-6))))
