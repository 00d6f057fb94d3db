"""Let all ranks agree on whether to stop or save after an optimizer step.

The ranks communicate about once a second, without synchronizing the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from train.distributed import collectives
from train.distributed.process_group import get_world_size, is_first_rank

POLL_INTERVAL_S = 1.0


class StopConsensus:
    """Makes all ranks stop or save after the same optimizer step.

    Args:
        pending_signal: Returns the number of the signal that this rank received, or 0.
        is_due: Returns True if a checkpoint is due. Only the answer of rank 0 counts.
        poll_interval_s: Approximate time in seconds between two communications.
    """

    def __init__(
        self, pending_signal: Callable[[], int], is_due: Callable[[], bool], poll_interval_s: float = POLL_INTERVAL_S
    ) -> None:
        self._pending_signal, self._is_due, self._poll_interval_s = pending_signal, is_due, poll_interval_s
        self._is_alone = get_world_size() == 1
        self.reset(0)

    def reset(self, steps_done: int) -> None:
        """Make the ranks communicate after the next optimizer step.

        All ranks must pass the same `steps_done`, the number of optimizer steps of the run so far.
        """
        self._last, self._next, self._interval = steps_done, steps_done + 1, 1
        self._time_s = time.monotonic()

    def poll(self, steps_done: int) -> tuple[int, bool]:
        """Decide whether to stop or save. All ranks must call this method after every optimizer step.

        Args:
            steps_done: Optimizer steps of the run so far.

        Returns:
            A tuple (signal, save) that is the same on all ranks. `signal` is the number of the signal that stops the
            run, or 0. `save` is True if a checkpoint is due. After steps without communication, the tuple is
            (0, False).
        """
        if self._is_alone:
            return self._pending_signal(), self._is_due()
        if steps_done < self._next:
            return 0, False
        mine = (int(self._is_due()), self._next_interval(steps_done)) if is_first_rank() else (0, 0)
        signal, due, self._interval = collectives.max_over_ranks([self._pending_signal(), *mine])
        self._last, self._next, self._time_s = steps_done, steps_done + self._interval, time.monotonic()
        return signal, bool(due)

    def poll_now(self) -> int:
        """Communicate now, and return the number of a signal that any rank has received, or 0 if there is none.

        All ranks must call this method.
        """
        return collectives.max_over_ranks([self._pending_signal()])[0]

    def _next_interval(self, steps_done: int) -> int:
        """Return the number of steps until the next communication, from 1 to twice the previous number."""
        step_s = (time.monotonic() - self._time_s) / max(steps_done - self._last, 1)
        return max(1, min(2 * self._interval, int(self._poll_interval_s / max(step_s, 1e-6))))
