"""Train an image classifier: torchrun --nproc_per_node=N train/ddp.py --cfg configs/FILE.yaml

Reads from top to bottom as the whole run: config, data, model, training, evaluation, checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from configs.errors import UserError, run_main
from configs.load import load_config, to_yaml
from configs.schema import AugConfig, Config, ModelConfig, Section, TrainConfig
from models import build_configured
from models.pretrained import build_pretrained
from pipelines import build_eval_loader, build_train_loader
from pipelines.loader import Loader
from pipelines.mixing import check_mixing, is_on
from pipelines.shards import fingerprint, load_dataset
from pipelines.staged import TrainLoader
from train import checkpoint, dist
from train.clock import Clock
from train.dist import Ranks
from train.ema import average_counts, build_ema, counted_weights
from train.facts import dataset_facts, describe, facts_of, global_batch
from train.freeze import freeze
from train.log import RunLog
from train.lookahead import build_lookahead
from train.loop import Training, build_training, evaluate, timeline_of, train_epoch
from train.meter import Meter, peak_memory_gib
from train.optim import build_optimizer
from train.proxy import build_proxy, check_proxy
from train.run_folder import find_run, make_folder
from train.schedule import Timeline, scaled, watch
from train.showcase import show_predictions, show_samples
from train.throughput import measure_images_per_s
from train.transfer import load_finetune, without_start
from train.warm_up import check_sizes, warm_up
from train.whitening import whiten, whitening_images

# Settings of training that results do not follow from, or not to the last digit, which a resumed run may change.
FREE = ("accumulation_steps", "amp", "compile", "cuda_graph", "channels_last", "save_every_steps", "save_every_epochs",
        "eval_every_epochs")  # fmt: skip
SAVE_EVERY_S = 300.0  # where train.save_every_steps is not set


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file, configs/….yaml")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="settings that override the file: train.epochs=5 or train.epochs 5")  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="data.batch_size, per rank")
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--output", help="folder of all runs; this one goes to OUTPUT/NAME")
    parser.add_argument("--resume", metavar="auto|PATH", help="the latest run of this name, a checkpoint or its folder")
    parser.add_argument("--eval", action="store_true", help="evaluate the checkpoint to resume from, do not train")
    parser.add_argument("--throughput", action="store_true", help="print training images/s of this config and stop")
    return parser.parse_args(arguments)


def main() -> None:
    clock = Clock()
    arguments = parse_arguments(sys.argv[1:])
    replacements = {
        "data.batch_size": arguments.batch_size,
        "data.path": arguments.data_path,
        "output": arguments.output,
    }
    config = load_config(arguments.cfg, arguments.opts, **replacements)
    resume = config.resume if arguments.resume is None else arguments.resume
    evaluates_only = arguments.eval or config.eval.only
    if evaluates_only and resume is None:
        asks = "--eval" if arguments.eval else "eval.only"
        raise UserError(f"{asks} needs a checkpoint; give --resume PATH or --resume auto")
    dataset = load_dataset(config.data.path)
    classes = check_classes(config, dataset)
    ranks = Ranks.from_environment()
    check_proxy(config.train, ranks.world_size, is_on(config.aug.mix))
    check_mixing(config.data, config.aug.mix)

    with dist.process_group(ranks) as device:
        where: dict[str, Any] = {
            "device": device,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "local_world_size": ranks.local_world_size,
        }
        val_loader = build_eval_loader(config.data, config.eval, **where)
        val_samples = dataset["splits"][config.data.val_split]["samples"]

        folder, source = dist.from_first_rank(lambda: find_run(config, resume))
        content = checkpoint.load(source) if source else None
        if evaluates_only and content is None:
            raise UserError(f"no run {config.name!r} in {config.output!r} has a checkpoint; give --resume PATH")
        start = config if content is None else without_start(config)
        training = build_all(start, dataset, classes, val_loader.image_size, device)

        if evaluates_only and content is not None and source is not None:
            is_average = checkpoint.restore_weights(training, content, source, config.eval.weights)
            result = evaluate(training, val_loader, val_samples, config.eval.tta)
            if ranks.is_first:
                which = " (moving average)" if is_average else ""
                print(f"{source}{which}: {result.sentence(config.data.val_split)}")
            return

        train_loader = build_train_loader(
            config.data, config.aug, seed=config.seed, accumulation_steps=config.train.accumulation_steps, **where
        )
        if arguments.throughput:
            for stage in train_loader.stages:
                throughput = measure_images_per_s(training, stage, ranks.world_size)
                if ranks.is_first:
                    size = f" at {stage.image_size} pixels" if len(train_loader.stages) > 1 else ""
                    where_it_ran = f"{ranks.world_size} x {device.type}"
                    print(f"{config.name}{size}: {throughput:,.0f} images/s in training on {where_it_ran}")
            return
        check_sizes(training, train_loader)

        average_counts(training, config.eval.weights)  # raises where there is none
        stream = stream_identity(config, dataset, ranks)
        progress: dict[str, Any] = {"best_top1": -1.0}
        images = whitening_images(training, config.data)
        if content is None:
            clock.add(whiten(training, images))
            train_loader.state = {"epoch": config.train.first_epoch, "step": 0}
        del images
        if content is not None and source is not None:
            checkpoint.check_same_run(content, stream, source, default_settings())
            checkpoint.restore(training, content, source)
            if not ranks.is_first:
                training.sums.zero_()  # the checkpoint holds the sums over all ranks
            position = content["position"]
            step = position["step"] * config.train.accumulation_steps
            train_loader.state = {"epoch": position["epoch"], "step": step}
            progress = content["progress"]
            content = None  # a second copy of the weights
        folder = folder or dist.from_first_rank(lambda: make_folder(config))
        about: dict[str, Any] = {
            "stream": stream,
            "config": to_yaml(config),
            "dataset": dataset_facts(dataset, val_loader.image_size),
        }
        facts = facts_of(config, dataset, training, train_loader, ranks)
        with RunLog(folder if ranks.is_first else None) as log:
            log.record(about["config"], facts)
            log.keep_epochs(train_loader.state["epoch"])
            if source is not None:
                log.say(f"resumed from {source} at {train_loader.state}")
            log.say(describe(config, facts, device))
            for note in training.notes:
                log.say(note)
            if train_loader.state["epoch"] < config.train.epochs:
                done = updates_done(train_loader, timeline_of(training.config, train_loader), config)
                log.start_trackers(config.log, {**config.model_dump(mode="json"), "facts": facts}, done)
            fit(config, training, train_loader, val_loader, val_samples, progress, about, folder, log, ranks, clock)


def fit(
    config: Config,
    training: Training,
    train_loader: TrainLoader,
    val_loader: Loader,
    val_samples: int,
    progress: dict[str, Any],
    about: dict[str, Any],
    folder: Path,
    log: RunLog,
    ranks: Ranks,
    clock: Clock,
) -> None:
    """Epochs from where the loader stands; a checkpoint after each, and within one as train.save_every_steps says.

    about: what every checkpoint of this run says of it.
    """
    if train_loader.state["epoch"] >= config.train.epochs:
        log.say(f"nothing to do: the run in {folder} has finished its {config.train.epochs} epochs")
        return
    accumulation = config.train.accumulation_steps
    timeline = timeline_of(training.config, train_loader)

    def save(name: str) -> None:
        sums = dist.sum_over_ranks(training.sums.clone())  # so all ranks must come here at the same step
        if ranks.is_first:
            # in optimizer steps, which mean the same however a global batch is cut into ranks and forward passes
            position = {"epoch": train_loader.state["epoch"], "step": train_loader.state["step"] // accumulation}
            checkpoint.save(folder / name, training, sums, position=position, progress=progress, **about)

    def is_due(done: int) -> bool:
        if config.train.save_every_steps is not None:
            return done % config.train.save_every_steps == 0
        # the first rank's clock decides; looked at once per log interval, since all ranks wait for the answer
        return done % config.log.every_steps == 0 and dist.from_first_rank(
            lambda: time.monotonic() - saved_at >= SAVE_EVERY_S
        )

    saved_at = time.monotonic()
    bar = tqdm(disable=log.is_silent or not sys.stderr.isatty(), unit="step", leave=False, file=sys.stderr)

    def after_update(update: int, lr: float) -> None:
        nonlocal saved_at
        bar.update()
        done = update + 1
        if not log.is_silent and done % config.log.every_steps == 0:
            loss, _, seen = training.sums.tolist()  # synchronises, once per log interval
            bar.set_postfix(loss=f"{loss / seen:.3f}", lr=f"{lr:.2g}")
            measured = {**meter.read(done, loss, seen), "lr": lr, "memory_gib": peak_memory_gib(training.device)}
            log.steps(measured, done)
        if train_loader.state["step"] != 0 and is_due(done):  # the end of an epoch saves anyhow
            save("last.pt")
            saved_at = time.monotonic()

    prepared_s = warm_up(training, train_loader, val_loader, config.eval.tta)
    if training.prepares:
        log.say(f"compiled{' and captured' if training.captures else ''} the step in {prepared_s:.1f} s")
    classes = about["dataset"]["classes"]
    if config.log.images and train_loader.state == {"epoch": config.train.first_epoch, "step": 0}:
        show_samples(log, train_loader, classes)
    begin = time.monotonic()
    meter = Meter(train_loader)
    for epoch in range(train_loader.state["epoch"], config.train.epochs):
        bar.reset(timeline.updates[epoch])
        bar.update(train_loader.state["step"] // accumulation)
        bar.set_description(f"epoch {epoch + 1}/{config.train.epochs}")
        loss, _, seen = training.sums.tolist() if train_loader.state["step"] else (0.0, 0.0, 0.0)
        batch_size = train_loader.plan.batch_size * ranks.world_size
        meter.begin(
            updates_done(train_loader, timeline, config), loss, seen, images_per_update=batch_size * accumulation
        )
        if len(train_loader.stages) > 1 and (epoch == 0 or train_loader.at(epoch) is not train_loader.at(epoch - 1)):
            side = train_loader.image_size
            log.say(f"epoch {epoch}: images of {side} x {side} pixels, global batch {batch_size * accumulation}")
        lr = [0.0]

        def note(update: int, now: float, lr: list[float] = lr) -> None:
            lr[0] = now
            after_update(update, now)

        times = train_epoch(
            training, train_loader, seed=config.seed, rank=ranks.rank, after_update=note, timeline=timeline,
            decays=progress.get("plateau", {}).get("decays", 0),
        )  # fmt: skip
        clock.add(times.time_s)
        is_last = epoch + 1 == config.train.epochs
        loss, correct, seen = dist.sum_over_ranks(training.sums.clone()).tolist()
        training.sums.zero_()
        metrics = {
            "epoch": epoch,
            "step": timeline.first(epoch + 1),
            "train_loss": loss / seen,
            "train_top1": correct / seen,
            "val_loss": None,
            "val_top1": None,
            "val_top5": None,
            **({"ema_val_loss": None, "ema_val_top1": None, "ema_val_top5": None} if training.ema is not None else {}),
            "lr": lr[0],
            "images_per_s": times.batches * batch_size / times.time_s,
            "data_wait_fraction": times.wait_s / times.time_s,
            "epoch_time_s": times.time_s,
            "memory_gib": peak_memory_gib(training.device),
        }
        improved = False
        if is_last or (epoch + 1) % config.train.eval_every_epochs == 0:
            with clock if is_last else nullcontext():
                counted = evaluate(training, val_loader, val_samples, config.eval.tta)
            metrics |= {"val_loss": counted.loss, "val_top1": counted.top1, "val_top5": counted.top5}
            if training.ema is not None:
                with training.ema.in_place():
                    average = evaluate(training, val_loader, val_samples, config.eval.tta)
                metrics |= {"ema_val_loss": average.loss, "ema_val_top1": average.top1, "ema_val_top5": average.top5}
                counted = average if average_counts(training, config.eval.weights) else counted
            improved = counted.top1 > progress["best_top1"]
            progress["best_top1"] = max(progress["best_top1"], counted.top1)
        if config.train.schedule == "plateau":
            progress["plateau"] = watch(progress.get("plateau", {}), metrics, config.train.schedule_options)
        log.epoch(metrics)
        if improved:
            save("best.pt")
        if is_last or (epoch + 1) % config.train.save_every_epochs == 0:
            save("last.pt")
            saved_at = time.monotonic()
    bar.close()
    log.say(f"done in {time.monotonic() - begin:.1f} s: best {config.data.val_split} top1 {progress['best_top1']:.4f}; "
            f"the run lies in {folder}")  # fmt: skip
    log.say(f"epochs and last evaluation {clock.training_s:.2f} s, whole command {clock.command_s:.2f} s")
    log.summary({"training_s": clock.training_s, "command_s": clock.command_s})
    if config.log.images and dist.from_first_rank(lambda: log.is_tracked):
        with counted_weights(training, config.eval.weights):
            show_predictions(log, training, val_loader, config, classes, step=timeline.total)


def updates_done(train_loader: TrainLoader, timeline: Timeline, config: Config) -> int:
    """Optimizer steps from the start of training to where the loader stands."""
    state = train_loader.state
    return timeline.first(state["epoch"]) + state["step"] // config.train.accumulation_steps


def build_all(config: Config, dataset: dict[str, Any], classes: int, image_size: int, device: torch.device) -> Training:
    """The model as config.seed draws it or as it is to start, its optimizer, and what config.train puts beside them.

    Learning rates are those of the global batch. A model that a checkpoint is loaded into is built from
    `without_start(config)`.
    """
    train = scaled(config.train, global_batch(config, dist.world_size()))
    model, notes = config.model, []
    shape: dict[str, Any] = {"image_size": image_size, "mean": dataset["mean"], "std": dataset["std"]}

    def on_device(network: nn.Module) -> nn.Module:
        return to_device(network, device, train.channels_last)

    torch.manual_seed(config.seed)
    if model.pretrained is False:
        network = on_device(build_configured(model, classes, **shape))
    else:
        pretrained, note = build_pretrained(model, classes, **shape)
        network, notes = on_device(pretrained), [note]
    if model.finetune is not None:
        notes.append(load_finetune(network, model.finetune, dataset["classes"]))
    if model.freeze:
        notes.append(freeze(network, model.freeze))
    optimizer = build_optimizer(network, train.optimizer, train.lr)
    training = build_training(network, optimizer, train, device, mixes=is_on(config.aug.mix))
    training.is_drawn = model.pretrained is False and model.finetune is None
    training.notes = tuple(notes)
    training.lookahead = build_lookahead(network, train.lookahead)
    training.ema = build_ema(network, train.ema)
    training.proxy = build_proxy(
        train, lambda name: on_device(build_configured(ModelConfig(name=name), classes, **shape)), device
    )
    return training


def check_classes(config: Config, dataset: dict[str, Any]) -> int:
    """The model's number of outputs, which is the data set's number of classes."""
    classes = len(dataset["classes"])
    wanted = config.model.num_classes
    if wanted is not None and wanted != classes:
        raise UserError(
            f"model.num_classes={wanted}, but the data set in {config.data.path} has {classes} classes; "
            f"set it to {classes} or leave it out"
        )
    for split in (config.data.train_split, config.data.val_split):
        entry = dataset["splits"].get(split)
        if entry is None or not entry["labelled"]:
            fit_for_use = [name for name, other in dataset["splits"].items() if other["labelled"]]
            missing = "does not exist" if entry is None else "has no labels"
            raise UserError(f"split {split!r} of {config.data.path} {missing}; splits with labels: {fit_for_use}")
    return classes


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def stream_identity(config: Config, dataset: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What the stream of samples, the schedule and the optimizer follow from; a resumed run must agree in all of it."""
    data, train = config.data, config.train
    return {
        "data set": fingerprint(dataset),
        "seed": config.seed,
        "global batch": global_batch(config, ranks.world_size),
        "data.train_split": data.train_split,
        "data.order": data.order,
        "data.window_shards": data.window_shards if data.order == "sequential-window" else None,
        "data.image_size": data.image_size,
        "data.interpolation": data.interpolation,
        "data.antialias": data.antialias,
        "data.stages": [stage.model_dump() for stage in data.stages],
        **aug_settings(config.aug),
        **{
            f"model.{key}": value
            for key, value in config.model.model_dump(mode="json").items()
            if key != "num_classes"  # a check that the data set has as many
        },
        **flat_settings("train", train),
        "train.eval_every_epochs": train.eval_every_epochs if train.schedule == "plateau" else None,
    }


def default_settings() -> dict[str, Any]:
    """What settings of the stream's identity mean that a checkpoint of an older version does not name."""
    return {**aug_settings(AugConfig()), **flat_settings("train", TrainConfig())}


def aug_settings(aug: AugConfig) -> dict[str, Any]:
    return {f"aug.{key}": value for key, value in aug.model_dump(mode="json").items()}


def flat_settings(name: str, section: Section) -> dict[str, Any]:
    """The section's settings by dotted keys, those of sections inside as well, without FREE ones."""
    flat: dict[str, Any] = {}
    for key, value in section.model_dump(mode="json").items():
        inner = getattr(section, key)
        if isinstance(inner, Section):
            flat |= flat_settings(f"{name}.{key}", inner)
        elif key not in FREE:
            flat[f"{name}.{key}"] = value
    return flat


if __name__ == "__main__":
    run_main(main)
