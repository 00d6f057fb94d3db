"""The batch size that trains the most images/s: powers of two, each in a process of its own, until one does not pay.

A size that does not fit into memory ends its process and with it the search, and leaves nothing behind for the next.
"""

from __future__ import annotations

import time
from typing import Any

from configs.schema import Config
from tools.benchmarks import ours
from tools.benchmarks.turns import Contestant, measure

SIZES = (256, 512, 1024, 2048)
GAIN = 1.02  # a doubled batch that gives less is not worth its memory
TIME_S = 150.0  # no further size is begun after that: each has to be compiled


def ramp(config: Config, seconds: float, rounds: int, deadline: float | None) -> tuple[Config, dict[str, Any]]:
    """The config at the best size, and what each size reached: images/s, or the error that ended the search.

    Raises RuntimeError with the error of the first size where not even that one could be measured.
    """
    reached: dict[str, Any] = {}
    best, best_rate = config, 0.0
    begin = time.monotonic()
    for size in SIZES:
        candidate = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": size})})
        (outcome,) = measure([Contestant(f"batch {size}", ours.training, (candidate, {}))], seconds, rounds, deadline)
        if outcome.error is not None or not outcome.rates:
            reached[str(size)] = outcome.error or "not measured"
            break
        reached[str(size)] = float(f"{outcome.rate:.5g}")
        if outcome.rate < GAIN * best_rate:
            break
        best, best_rate = candidate, outcome.rate
        if time.monotonic() - begin > TIME_S:
            break
    if not best_rate:
        raise RuntimeError(f"batch {SIZES[0]}: {reached[str(SIZES[0])]}")
    return best, reached
