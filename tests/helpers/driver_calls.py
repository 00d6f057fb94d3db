"""Count the calls to the CUDA driver per training step and per evaluated batch, in the log of the stand-in driver.

    FAKECUDA_LEVEL=2 FAKECUDA_LOG=FILE DRIVER/fakecuda python tests/helpers/driver_calls.py DATA [KIND …]

prints a table, or with --json its numbers. DATA is the converted digits. `make gpu-calls` does all of this.

The log contains launches, copies, fills, events and waits, but not calls that only the host sees, such as creating an
event or asking whether a stream is capturing. Calls within DALI are left out, since they are those of a stand-in.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from nvidia.dali.pipeline import Pipeline

from configs.load import load_config
from pipelines.interfaces import Position
from pipelines.loader import epoch_iterator, gathering
from train.build import Job
from train.distributed.process_group import Ranks, process_group
from train.engine.epoch import training_steps
from train.engine.evaluate import loss_and_hits, predictions
from train.engine.warm_up import warm_up

# Who calls: the step, with autograd's thread; the training thread in the loader; the loader's own threads.
STEP, NEXT, THREADS = "step", "next batch", "gathering threads"
DALI = "DALI"  # in the training thread
SYNCHRONIZING = ("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize", "cuMemAlloc", "cuMemFree")
LINE = re.compile(r"\[fakecuda \d+/(\d+)\] (\w+)(?: (0x\w+) <- (0x\w+) \d+)?")
CONFIG = Path(__file__).parents[2] / "configs" / "digits_lenet.yaml"
PLAIN, DEVICE, HOST = "train.compile=off", "data.placement=device", "data.placement=host"
RESIZED = ("aug.crop=random-resized", "aug.flip=0.5")
DROPOUT = ("model.name=lenet", "model.drop_rate=0.1")
KINDS: dict[str, tuple[str, ...]] = {
    "captured, device": (PLAIN, DEVICE),
    "captured, host": (PLAIN, HOST),
    "captured, device, DALI": (PLAIN, DEVICE, *RESIZED),
    "captured, host, DALI": (PLAIN, HOST, *RESIZED),
    "captured, device, dropout": (PLAIN, DEVICE, *DROPOUT),
    "captured, device, mixing": (PLAIN, DEVICE, "aug.mix.mixup=0.2"),
    "captured, device, average": (PLAIN, DEVICE, "train.ema.decay=0.9"),
    "captured, device, DDP": (PLAIN, DEVICE, "train.cuda_graph=on"),
    "eager, device": (PLAIN, DEVICE, "train.cuda_graph=off"),
    "eager, device, DDP": (PLAIN, DEVICE, "train.cuda_graph=off"),
    "captured, compiled, device": ("train.compile=default", DEVICE),
    "compiled, device": ("train.compile=default", "train.cuda_graph=off", DEVICE),
}
Calls = dict[str, Counter[str]]  # by caller


class Log:
    """The log of the stand-in driver in this process."""

    def __init__(self, path: Path) -> None:
        self._path, self._driver = path, ctypes.CDLL("libcuda.so.1")
        self._main, self._gathering = threading.get_native_id(), set[int]()
        self._spans: dict[str, list[tuple[int, int]]] = {NEXT: [], DALI: []}  # parts of the log, in bytes

    @property
    def end(self) -> int:
        return self._path.stat().st_size

    @contextmanager
    def marks_callers(self) -> Iterator[None]:
        """Note which threads gather, and the parts of the log that `next` on a loader's iterator and DALI write."""
        gather = gathering._gather

        def marked_gather(*arguments: Any) -> None:
            self._gathering.add(threading.get_native_id())
            gather(*arguments)

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(gathering, "_gather", marked_gather))
            patches.enter_context(self._marks(NEXT, epoch_iterator.EpochIterator, "__next__"))
            for name in ("feed_input", "schedule_run", "outputs"):
                patches.enter_context(self._marks(DALI, Pipeline, name))
            yield

    def _marks(self, name: str, owner: type, method: str) -> AbstractContextManager[object]:
        original = getattr(owner, method)

        def marked(*arguments: Any, **options: Any) -> Any:
            begin = self.end
            try:
                return original(*arguments, **options)
            finally:
                self._spans[name].append((begin, self.end))

        return mock.patch.object(owner, method, marked)

    def lines(self, begin: int) -> list[bytes]:
        with self._path.open("rb") as file:
            file.seek(begin)
            return file.read().splitlines(keepends=True)

    def calls(self, begin: int) -> Calls:
        """Count the calls logged since `begin`."""
        found: Calls = {STEP: Counter(), NEXT: Counter(), THREADS: Counter()}
        place = begin
        for line in self.lines(begin):
            match = LINE.match(line.decode(errors="replace"))
            if match is not None and (caller := self._caller(int(match[1]), place)) != DALI:
                found[caller][self._name(match)] += 1
            place += len(line)
        return found

    def _caller(self, thread: int, place: int) -> str:
        if thread in self._gathering:
            return THREADS
        if thread == self._main:
            for name in (DALI, NEXT):
                spans = self._spans[name]
                index = bisect_right(spans, (place, sys.maxsize)) - 1
                if index >= 0 and place < spans[index][1]:
                    return name
        return STEP

    def _name(self, match: re.Match[str]) -> str:
        call = match[2]
        if match[3]:
            return f"copy from {self._memory(match[4])} to {self._memory(match[3])} memory"
        if call.startswith(SYNCHRONIZING):
            return f"{call} (waits)"
        for start, name in (
            ("cuMemset", "memset"),
            ("cuGraphLaunch", "graph launch"),
            ("cuEventRecord", "event record"),
        ):
            if call.startswith(start):
                return name
        return {"cuStreamWaitEvent": "wait of a stream", "cuEventQuery": "query", "cuStreamQuery": "query"}.get(
            call, call
        )

    def _memory(self, address: str) -> str:
        kind = ctypes.c_uint()
        fails = self._driver.cuPointerGetAttribute(ctypes.byref(kind), 2, ctypes.c_uint64(int(address, 16)))
        return "pageable" if fails else {1: "pinned", 2: "device"}[kind.value]  # CUmemorytype


def difference(longer: Calls, shorter: Calls, count: int) -> dict[str, dict[str, float]]:
    """Return the calls per step, from runs of which one is `count` steps longer."""
    names = {caller: sorted(longer[caller] | shorter[caller]) for caller in longer}
    return {
        caller: {name: (longer[caller][name] - shorter[caller][name]) / count for name in names[caller]}
        for caller in longer
    }


def count_calls(log: Log, data: str, kind: str, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """Return the calls per step of one kind of training, and of an evaluation with the same settings."""
    # the epoch below is the last one, so that the threads do not go on with the next
    common = ("data.batch_size=16", "eval.batch_size=16", "data.threads=1", "train.epochs=2")
    options = [f"data.path={data}", *common, *KINDS[kind]]
    job = Job.load(load_config(CONFIG, options), Ranks()).on(device)
    val_loader, loader = job.val_loader(), job.train_loader()
    with mock.patch.object(torch.distributed, "get_world_size", return_value=2 if "DDP" in kind else 1):
        state = job.build_state(val_loader.image_size)
    warm_up(state, loader)  # without the evaluation, whose check needs computed values

    def train(first: int) -> Calls:
        loader.position = Position(1, first)
        begin = log.end
        for _ in training_steps(state, loader, seed=0):
            pass
        return log.calls(begin)

    def evaluate(batches: int) -> Calls:
        begin = log.end
        for number, result in enumerate(predictions(state, val_loader), 1):
            loss_and_hits(*result)
            if number == batches:
                break
        return log.calls(begin)

    steps = len(loader) - 20
    train(0), evaluate(20)  # fills the caches of torch's allocators
    return {
        "training": difference(train(10), train(10 + steps), steps),
        "evaluation": difference(evaluate(20), evaluate(10), 10),
    }


GROUPS = {
    "graph launches": "graph launch",
    "launches": "launch",
    "copies": "copy",
    "events": "event record|wait of a stream",
    "queries": "query",
    "waits": r".*\(waits\)",
}


def table(counts: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the calls per step as a Markdown table, with a row for each kind and caller."""
    rows = [["calls", "by", "total", *GROUPS], ["---"] * (len(GROUPS) + 3)]
    for kind, parts in counts.items():
        for part, callers in parts.items():
            for caller, calls in callers.items():
                groups = [
                    sum(count for name, count in calls.items() if re.fullmatch(f"({pattern}).*", name))
                    for pattern in GROUPS.values()
                ]
                numbers = [f"{number:.3g}" for number in (sum(calls.values()), *groups)]
                rows.append([f"{kind}, {part}", caller, *numbers])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    log = Log(Path(os.environ["FAKECUDA_LOG"]))
    with process_group(Ranks()) as device, log.marks_callers():
        counts = {kind: count_calls(log, arguments.data, kind, device) for kind in arguments.kinds}
    if arguments.json is None:
        print(table(counts))
    else:
        arguments.json.write_text(json.dumps(counts))
