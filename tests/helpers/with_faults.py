"""Run train/ddp.py with faults: with_faults.py '{"nan_at": [37], "rank": 1}' --cfg …

Faults:
    nan_at: Optimizer steps, counted from 0, whose loss is nan.
    rank: The only rank with nan losses. Default: all ranks.
    times: How often each of these steps has a nan. Default: always.
    pause_at: Optimizer steps before which to wait a second.
    evaluation_s: Additional time of each batch of an evaluation.
    evaluates: A file to create when the first evaluation starts.
    census: A file that gets a line of memory (MiB), threads and file descriptors at the end of each epoch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from train import ddp, trainer
from train.checkpoint.writer import CheckpointWriter
from train.distributed.launcher import run_distributed
from train.engine import epoch as loop
from train.engine import evaluate as evaluation
from train.engine.state import TrainState
from train.reporting.run_log import RunLog

ROOT = Path(__file__).parents[2]


def build_in(faults: dict[str, Any]) -> None:
    run_step, loss_and_hits, done = loop.run_step, evaluation.loss_and_hits, Counter[int]()
    is_here = faults.get("rank") in (None, int(os.environ.get("RANK", "0")))

    def faulty(training: TrainState, batch: Any, number: int, *, optimizer_step: bool) -> None:
        sound = training.loss_and_counts
        if number in faults.get("pause_at", []):
            time.sleep(1)
        if is_here and number in faults.get("nan_at", []) and done[number] < faults.get("times", 10**9):
            done[number] += 1

            def not_a_number(*parts: Any) -> Any:
                loss, counts = sound(*parts)
                return loss * float("nan"), counts * counts.new_tensor([float("nan"), 1, 1])

            training.loss_and_counts = not_a_number
        run_step(training, batch, number, optimizer_step=optimizer_step)
        training.loss_and_counts = sound

    def slow(*parts: Any) -> Any:
        time.sleep(faults.get("evaluation_s", 0))
        return loss_and_hits(*parts)

    def told(*parts: Any) -> Any:
        if "evaluates" in faults:
            Path(faults["evaluates"]).touch()
        return evaluate(*parts)

    def counted(log: RunLog, metrics: dict[str, Any], **options: bool) -> None:
        epoch(log, metrics, **options)
        if "census" in faults:
            savings[-1].wait()  # otherwise its open files would be counted
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            line = {
                "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
                "threads": int(status["Threads"]),
                "descriptors": len(os.listdir("/proc/self/fd")),
            }
            with Path(faults["census"]).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def known(saving: CheckpointWriter) -> CheckpointWriter:
        savings.append(saving)
        return saving

    savings: list[CheckpointWriter] = []
    CheckpointWriter.__enter__ = known  # type: ignore[method-assign]
    epoch, evaluate = RunLog.log_epoch, trainer.evaluate
    trainer.evaluate = told
    loop.run_step, evaluation.loss_and_hits, RunLog.log_epoch = faulty, slow, counted  # type: ignore[method-assign]


if __name__ == "__main__":
    build_in(json.loads(sys.argv[1]))
    sys.argv = [str(ROOT / "train" / "ddp.py"), *sys.argv[2:]]
    run_distributed(ddp.main)
