"""Describe a run: plain values for trackers and checkpoints, and a one-line summary for the console."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from configs.utils.console import counted
from pipelines.loader.train_loader import TrainLoader
from pipelines.storage.dataset import DatasetInfo
from train.distributed.process_group import Ranks
from train.engine.state import TrainState
from train.optim.schedule import lr_factor

Facts = dict[str, Any]  # contents of facts.json


def global_batch(config: Config, world_size: int) -> int:
    """Return the global batch size: samples per optimizer step over all ranks. Ignores batch sizes in data.stages."""
    return config.data.batch_size * world_size * config.train.accumulation_steps


def collect_run_info(
    config: Config, dataset: DatasetInfo, state: TrainState, loader: TrainLoader, val_samples: int, ranks: Ranks
) -> Facts:
    """Return properties of a run that depend on its config, data set and machine.

    Args:
        config: Config of the run.
        dataset: Contents of dataset.json.
        state: The training state.
        loader: The training loader.
        val_samples: Number of samples in an evaluation, over all ranks.
        ranks: Rank and world size of this process.

    Returns:
        Plain values by name. Image size, global batch size and steps per epoch are those of epoch train.first_epoch.
    """
    accumulation, first = config.train.accumulation_steps, loader.at(config.train.first_epoch)
    stages = {
        f"from epoch {stage.epoch}": [loader.at(stage.epoch).image_size, loader.at(stage.epoch).plan.batch_size]
        for stage in config.data.stages
    }
    return {
        "dataset": dataset.name,
        "classes": len(dataset.classes),
        "train_samples": len(loader.split),
        "val_samples": val_samples,
        "image_size": first.image_size,
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "world_size": ranks.world_size,
        "global_batch": first.plan.batch_size * ranks.world_size * accumulation,
        **({"views": config.data.views} if config.data.views > 1 else {}),
        "steps_per_epoch": len(first) // accumulation,
        **({"stages": stages} if stages else {}),
        "precision": str(state.plan.amp or torch.float32),
        "device": device_name(state.device),
        **({"cpu_threads": torch.get_num_threads()} if state.device.type == "cpu" else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summary_line(config: Config, facts: Facts, device: torch.device) -> str:
    """Return one line that summarizes the run for the console. `facts` is from `collect_run_info`."""
    train = config.train
    factor = lr_factor(train, facts["global_batch"])
    threads = f" with {counted(facts['cpu_threads'], 'thread')}" if "cpu_threads" in facts else ""
    views = f" with {config.data.views} views of each sample" if config.data.views > 1 else ""
    rates = f", learning rates x {factor:.4g} ({train.lr_scaling} from train.lr_batch_size={train.lr_batch_size})"
    return (
        f"{config.model.name} ({facts['parameters']:,} parameters) on {facts['dataset']} "
        f"({facts['train_samples']:,} train samples), {counted(config.train.epochs, 'epoch')} of "
        f"{counted(facts['steps_per_epoch'], 'step')} "
        f"at global batch {facts['global_batch']}{views}, {facts['world_size']} x {device.type}{threads}, "
        f"precision {facts['precision']}{rates if train.lr_batch_size is not None else ''}"
    )


def stage_warnings(config: Config) -> list[str]:
    """Return a list with one warning if any stage starts after the last epoch, or an empty list."""
    late = [stage.epoch for stage in config.data.stages if stage.epoch >= config.train.epochs]
    first = min(late, default=0)
    text = (
        f"data.stages with epoch={first} or later are not reached with train.epochs={config.train.epochs}, since these "
        f"settings count from 0: the last epoch is {config.train.epochs - 1}"
    )
    return [text] if late else []


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor if the device is the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
