"""Helpers for tests of train/: whole runs, small training states, and groups of processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import OptimizerConfig, TrainConfig
from models import build_model
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch
from train import ddp
from train.checkpoint.writer import CheckpointWriter
from train.distributed.process_group import Ranks, process_group
from train.engine.execution import build_plan
from train.engine.state import TrainState, build_state
from train.optim.factory import build_optimizer
from train.reporting.run_log import RunLog

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DIGITS = ROOT / "configs" / "digits_lenet.yaml"
# One thread, so that many tests share few cores; no GPU, no W&B login and no settings of an outer torchrun.
CLEAN = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TORCHELASTIC_"))},
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def restore_signal_handlers() -> None:
    """Restore default handlers of SIGINT and SIGHUP, as a preexec_fn.

    A shell that starts the tests in the background, or nohup, ignores them, and children inherit this.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class Run:
    """A finished run and its data set."""

    folder: Path  # best.pt, last.pt, config.yaml, metrics.jsonl …
    data: Path  # the converted digits: splits train and val


@contextmanager
def alone() -> Iterator[torch.device]:
    """A process group of this process only, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with process_group(Ranks()) as device:
            yield device


def command_line(*arguments: str | Path, processes: int = 0) -> list[str]:
    """Return `python train/ddp.py …`, run by torchrun if `processes` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, str(ROOT / "train" / "ddp.py"), *map(str, arguments)]


def run_script(*arguments: str | Path, processes: int = 0) -> subprocess.CompletedProcess[str]:
    command = command_line(*arguments, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=CLEAN)


@contextmanager
def after_each_save(look: Callable[[str, dict[str, int]], None]) -> Iterator[None]:
    """Call look(name, position) for each file of every checkpoint that a run in this process writes."""
    save = CheckpointWriter.save

    def save_and_look(saving: CheckpointWriter, names: tuple[str, ...], position: Position, *parts: Any) -> None:
        save(saving, names, position, *parts)
        saving.wait()
        for name in names:
            look(name, asdict(position))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", save_and_look)
        yield


@contextmanager
def broken_after(is_enough: Callable[[str, dict[str, int]], bool]) -> Iterator[None]:
    """Stop a run in this process after the first checkpoint for which is_enough(name, position) is true."""

    class Stop(Exception):
        pass

    def stop(name: str, position: dict[str, int]) -> None:
        if is_enough(name, position):
            raise Stop

    with after_each_save(stop), pytest.raises(Stop):
        yield


def run_here(*arguments: str | Path, stop_at: dict[str, int] | None = None) -> None:
    """Run train/ddp.py in this process on the CPU, without curves.png, which would take most of the time.

    Args:
        stop_at: Position of the checkpoint after which the run is stopped.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(RunLog, "draw_curves", lambda *_: None)
        patch.setattr(sys, "argv", ["train/ddp.py", *map(str, arguments)])
        with nullcontext() if stop_at is None else broken_after(lambda _, position: position == stop_at):
            ddp.main()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, like a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, parsed without accepting NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class SmallNet(nn.Module):
    """A network whose dropout and batch norm make results depend on the random state and on train or eval mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, kernel_size=4, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 8 * 8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.stem(images.to(self.stem.weight.dtype) / 255)))
        logits: torch.Tensor = self.head(self.dropout(features.flatten(1)))
        return logits


def lenet(seed: int = 0, classes: int = 10) -> nn.Module:
    """LeNet for raw pixels, float32."""
    torch.manual_seed(seed)
    return build_model("lenet", classes, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


def small_net(num_classes: int = 12, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallNet(num_classes)


def make_state(
    network: nn.Module, optimizer: dict[str, Any] | None = None, *, mixes: bool = False, **settings: Any
) -> TrainState:
    """Wrap `network` for training on the CPU with these fields of the `train` section."""
    config = TrainConfig(optimizer=OptimizerConfig(**(optimizer or {})), **settings)
    built = build_optimizer(network, config.optimizer, config.lr)
    return build_state(network, built, config, build_plan(config, CPU, mixes=mixes))


def random_batch(samples: int, seed: int = 0, classes: int = 10) -> Batch:
    """Return a batch of 32x32 noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, 32, 32, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(images, torch.randint(0, classes, (samples,), generator=generator))


def record_gradients(training: TrainState) -> list[list[torch.Tensor]]:
    """Return a list that receives the gradients of every optimizer step."""
    seen: list[list[torch.Tensor]] = []

    def note(*_: Any) -> None:
        seen.append([p.grad.clone() for p in training.network.parameters() if p.grad is not None])

    training.optimizer.register_step_pre_hook(note)
    return seen


# 100 ports for each of 220 test processes, below those that the kernel gives to clients and to servers on port 0.
_first_port = 10_000 + os.getpid() % 220 * 100
_ports = itertools.cycle(range(_first_port, _first_port + 100))


def free_port() -> int:
    """Return a port that is unlikely to be taken by another process before it is used."""
    for port in itertools.islice(_ports, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"all ports from {_first_port} to {_first_port + 99} are in use")


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call function(ranks, *arguments) in a gloo group of `world_size` processes and return the results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.training", "pipelines.build", "torch._dynamo"])  # once, for all groups
    port = free_port()
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        futures = [pool.submit(_member, rank, world_size, port, function, arguments) for rank in range(world_size)]
        return [future.result(timeout=300) for future in futures]


def _member(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks(rank, rank, world_size, world_size)
    with process_group(ranks):
        return function(ranks, *arguments)
