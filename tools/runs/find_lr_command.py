"""Run a learning-rate range test with `tools/find_lr.py`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.load import load_config, split_overrides
from configs.schema import Config
from configs.stages import config_at
from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from pipelines.loader.train_loader import TrainLoader
from tools.common.tables import csv_text, make_folder, write_json, write_text
from tools.runs.lr_range import LossCurve, Suggestion, divergence_index, smooth_losses, suggest_lr
from train.build import Job
from train.distributed.process_group import Ranks, process_group
from train.engine.cpu_settings import limit_threads
from train.engine.epoch import set_whitening_bias_grad
from train.engine.state import TrainState
from train.engine.warm_up import warm_up
from train.engine.whitening import whiten, whitening_images
from train.optim.factory import set_learning_rate
from train.optim.freeze import set_training_mode
from train.optim.schedule import OWN_RATES, lr_factor, scale_learning_rates
from train.reporting import figures
from train.reporting.run_info import global_batch
from train.throughput import endless_batches, full_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure
MIN_STEPS, MAX_STEPS = 100, 300  # bounds of the default number of steps, which is one epoch


SYNC_EVERY = 10  # steps between two reads of losses from the device


def run(options: argparse.Namespace) -> None:
    """Run the range test that the arguments of `tools/find_lr.py` describe."""
    config = load_config(options.cfg, options.opts, **{"data.path": options.data_path})
    config = config_at(config, config.train.first_epoch)
    out = options.out or Path(config.output) / f"{config.name}-find-lr"
    if (out / "metrics.jsonl").exists() or (out / "last.pt").exists():
        raise UserError(f"{out} is the folder of a run; choose another --out")
    ranks = Ranks.alone("tools/find_lr.py")
    job = Job.load(config, ranks)
    make_folder(out)
    with process_group(ranks) as device:
        limit_threads(device)
        job = job.on(device)
        loader = job.train_loader().single_stage()
        steps = options.steps or min(MAX_STEPS, max(MIN_STEPS, len(loader) // config.train.accumulation_steps))
        state = job.build_state(loader.image_size)
        whiten(state, whitening_images(state, config.data))
        warm_up(state, loader)
        curve = range_test(state, loader, np.geomspace(options.first, options.last, steps))
    suggestion = suggest_lr(curve)
    write_results(out, config, curve, suggestion)
    given = [f"{key}={value}" for key, value in split_overrides(options.opts)]
    path = [] if options.data_path is None else ["--data-path", options.data_path]
    command = shlex.join(["zhu", "train", options.cfg, *path, *given])
    print(summary(config, curve, suggestion, command))
    print(f"curve and figures are in {out}")


def range_test(state: TrainState, loader: TrainLoader, rates: np.ndarray) -> LossCurve:
    """Take one optimizer step per learning rate, and return the losses up to and including the first diverged one.

    Losses are read every SYNC_EVERY steps, since reading synchronizes with the device. `state` is trained in place, so
    it cannot be used for a run afterwards.
    """
    set_training_mode(state.forward)
    set_whitening_bias_grad(state, 0)
    losses: list[float] = []
    sums: list[torch.Tensor] = []  # state.sums after each step, on the device
    before = state.sums.clone()
    batches = endless_batches(loader)
    for step, lr in enumerate(progress_bar(rates, desc="range test", unit="step")):
        for part in state.parts():
            set_learning_rate(part.optimizer, float(lr))
        full_step(state, batches, step)
        sums.append(state.sums.clone())
        if (step + 1) % SYNC_EVERY == 0 or step + 1 == len(rates):
            differences = torch.diff(torch.stack([before, *sums]), dim=0).cpu().numpy()  # synchronizes
            losses.extend(differences[:, 0] / differences[:, 2])
            before, sums = sums[-1], []
            if (end := divergence_index(smooth_losses(losses, rates))) is not None:
                losses = losses[: end + 1]
                break
    smoothed = smooth_losses(losses, rates)
    return LossCurve(rates[: len(losses)], np.array(losses), smoothed)


def options_for(config: Config, lr: float) -> str:
    """Return the settings that set the learning rate `lr` and scale the config's other rates by the same factor.

    Args:
        config: The config of the range test.
        lr: Learning rate at the global batch size of the test. If train.lr_batch_size is set, the returned train.lr is
            converted to that batch size.
    """
    train = config.train
    lr /= lr_factor(train, global_batch(config, 1))
    factor = lr / train.lr
    rates = {f"train.{name}": getattr(train, name) for name in ("min_lr", "warmup_lr")}
    rates |= {f"train.optimizer.{name}": getattr(train.optimizer, name) for name in OWN_RATES}
    others = [f"{name}={value * factor:.2g}" for name, value in rates.items() if value]
    return " ".join([f"train.lr={lr:.2g}", *others])


def summary(config: Config, curve: LossCurve, suggestion: Suggestion, command: str) -> str:
    """Return the text to print: `command` with the suggested learning rate, or the reason why there is none."""
    ended = "; the loss diverged there" if divergence_index(curve.smoothed) is not None else ""
    lines = [f"{title(config)}: {len(curve.lr)} steps from {curve.lr[0]:.2g} to {curve.lr[-1]:.2g}{ended}"]
    if suggestion.lr is None:
        lines.append(f"no suggestion: {suggestion.reason}; check the curve, or change --from, --to or --steps")
    else:
        minimum, tenth = suggestion.lr_at_minimum, suggestion.tenth_of_minimum
        lines.append(f"second opinion: a tenth of {minimum:.2g}, where the smoothed loss is lowest, is {tenth:.2g}")
        lines.append(f"suggestion (steepest descent): {command} {options_for(config, suggestion.lr)}")
        lines.append(f"the config sets train.lr={config.train.lr:.2g}")
        if config.train.lr_batch_size is not None:
            lines.append(f"train.lr is for train.lr_batch_size={config.train.lr_batch_size}, the curve for this batch")
    return "\n".join(lines)


def title(config: Config) -> str:
    return f"{config.model.name}, {config.train.optimizer.name}, global batch {global_batch(config, 1)}"


def write_results(out: Path, config: Config, curve: LossCurve, suggestion: Suggestion) -> None:
    """Write find_lr.csv, find_lr.json and find_lr.png."""
    columns = ("update", "lr", "loss", "smoothed_loss")
    steps = range(len(curve.lr))
    lines = zip(steps, curve.lr.tolist(), curve.loss.tolist(), curve.smoothed.tolist(), strict=True)
    content = {
        "name": config.name,
        "model": config.model.name,
        "data": config.data.path,
        "optimizer": config.train.optimizer.name,
        "global_batch": global_batch(config, 1),
        "updates": len(steps),
        "diverged": divergence_index(curve.smoothed) is not None,
        "suggestion": {**asdict(suggestion), "tenth_of_minimum": suggestion.tenth_of_minimum},
        "opts": None if suggestion.lr is None else options_for(config, suggestion.lr),
        "source": "arXiv:1506.01186",
    }
    write_text(out / "find_lr.csv", csv_text([columns, *lines]))
    write_json(out / "find_lr.json", content)
    figures.save(plot(config, curve, suggestion), out / "find_lr.png")


def plot(config: Config, curve: LossCurve, suggestion: Suggestion) -> Figure:
    """Plot the loss against the learning rate.

    The loss axis ends slightly above the losses of the first steps, so that diverged losses are cut off.
    """
    figure, (axis,) = figures.new_figure(size=(8, 5))
    axis.plot(curve.lr, curve.loss, ".", color="#9db8d6", markersize=4, label="loss of one step")
    axis.plot(curve.lr, curve.smoothed, color="#1f4e89", label="smoothed")
    if suggestion.lr is not None and suggestion.tenth_of_minimum is not None:
        axis.axvline(suggestion.lr, color=figures.WRONG, label=f"suggestion {suggestion.lr:.2g} (steepest descent)")
        second = f"a tenth of the minimum's: {suggestion.tenth_of_minimum:.2g}"
        axis.axvline(suggestion.tenth_of_minimum, color="grey", linestyle=":", label=second)
    configured = scale_learning_rates(config.train, global_batch(config, 1)).lr
    if curve.lr[0] <= configured <= curve.lr[-1]:
        label = f"the config's train.lr {configured:.2g}"
        axis.axvline(configured, color="grey", linestyle="--", linewidth=0.8, label=label)
    finite = curve.loss[np.isfinite(curve.loss)]
    if len(finite):
        low, high = float(finite.min()), float(finite[: max(10, len(finite) // 5)].max())
        axis.set_ylim(low - 0.05 * (high - low), high + 0.35 * (high - low))  # room for the legend
    axis.set_xscale("log")
    axis.set_xlim(curve.lr[0], curve.lr[-1])
    figures.style_axes(axis, "learning rate", "training loss")
    remark = "" if suggestion.lr is not None else "\nno suggestion: the loss has no clear descent"
    axis.set_title(f"Learning-rate range test: {title(config)}{remark}", fontsize=11, parse_math=False)
    axis.legend(fontsize=9)
    return figure
