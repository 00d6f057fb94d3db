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

from tqdm import tqdm

from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import Config
from pipelines import build_eval_loader, build_train_loader
from pipelines.loader import Loader
from pipelines.mixing import check_mixing, is_on
from pipelines.shards import fingerprint, load_dataset
from pipelines.staged import TrainLoader
from train import checkpoint, dist, restart
from train.assemble import build_all, check_classes
from train.clock import Clock
from train.dist import Ranks
from train.ema import average_counts, counted_weights
from train.facts import dataset_facts, describe, facts_of, unreached_stages
from train.identity import check_same_run, stream_of
from train.log import RunLog
from train.loop import Training, evaluate, timeline_of, train_epoch
from train.meter import Meter, peak_memory_gib
from train.proxy import check_proxy
from train.rank_errors import run_ranks
from train.run_folder import find_run, make_folder
from train.saving import Saving
from train.schedule import Timeline, remarks, watch
from train.showcase import show_predictions, show_samples
from train.throughput import measure_images_per_s
from train.transfer import as_trained, without_start
from train.warm_up import check_sizes, warm_up
from train.whitening import whiten, whitening_images

RESULTS = ("loss", "top1", "top5")  # of an evaluation, in metrics


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
    if not evaluates_only:
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

        launch = [] if evaluates_only or arguments.throughput else restart.agents()
        in_use, resume = dist.from_first_rank(lambda: restart.find_folder(config, resume, launch))
        folder, source = dist.from_first_rank(lambda: find_run(config, resume))
        content = checkpoint.load(source) if source is not None else None
        if evaluates_only:
            if content is None or source is None:
                raise UserError(f"no run {config.name!r} in {config.output!r} has a checkpoint; give --resume PATH")
            trained = as_trained(config, content, dataset["classes"], source)
            training = build_all(trained, dataset, classes, val_loader.image_size, device)
            is_average = checkpoint.restore_weights(training, content, source, config.eval.weights)
            result = evaluate(training, val_loader, val_samples, config.eval.tta)
            if ranks.is_first:
                which = " (moving average)" if is_average else ""
                print(f"{source}{which}: {result.sentence(config.data.val_split)}")
            return

        stream = stream_of(config, fingerprint(dataset), ranks.world_size * config.train.accumulation_steps)
        if content is not None and source is not None and not arguments.throughput:
            check_same_run(content, config, stream, source)
        start = config if content is None else without_start(config)
        training = build_all(start, dataset, classes, val_loader.image_size, device)
        train_loader = build_train_loader(
            config.data, config.aug, seed=config.seed, accumulation_steps=config.train.accumulation_steps, **where
        )
        check_sizes(training, train_loader, val_loader.image_size)
        if arguments.throughput:
            print_throughput(config, training, train_loader, ranks)
            return

        average_counts(training, config.eval.weights)  # raises where there is none
        if content is None or source is None:
            clock.add(whiten(training, whitening_images(training, config.data)))
            train_loader.state = {"epoch": config.train.first_epoch, "step": 0}
            progress: dict[str, Any] = {"best_top1": -1.0}
        else:
            progress = go_on(training, train_loader, content, source)
            content = None  # a second copy of the weights
        folder = dist.from_first_rank(lambda: restart.note(in_use or folder or make_folder(config), launch))
        about: dict[str, Any] = {
            "stream": stream,
            "config": to_yaml(config),
            "dataset": dataset_facts(dataset, val_loader.image_size),
            "progress": progress,  # changes in training
        }
        saving = Saving(folder, training, train_loader, about, config.log.every_steps)
        facts = facts_of(config, dataset, training, train_loader, ranks)
        with RunLog(folder if ranks.is_first else None) as log:
            log.record(about["config"], facts)
            log.keep_epochs(train_loader.state["epoch"])
            if source is not None:
                log.say(f"resumed from {source} at {train_loader.state}")
            log.say(describe(config, facts, device))
            timeline = timeline_of(training.config, train_loader)
            for note in (*training.notes, *unreached_stages(config), *remarks(config.train, timeline)):
                log.say(note)
            if train_loader.state["epoch"] >= config.train.epochs:
                log.say(f"nothing to do: the run in {folder} has finished its {config.train.epochs} epochs")
                return
            done = timeline.first(train_loader.state["epoch"]) + saving.position["step"]
            log.start_trackers(config.log, {**config.model_dump(mode="json"), "facts": facts}, done)
            prepared_s = warm_up(training, train_loader, val_loader, config.eval.tta)
            if training.prepares:
                log.say(f"compiled{' and captured' if training.captures else ''} the step in {prepared_s:.1f} s")
            if config.log.images and train_loader.state == {"epoch": config.train.first_epoch, "step": 0}:
                show_samples(log, train_loader, dataset["classes"])
            begin = time.monotonic()
            fit(config, training, train_loader, val_loader, val_samples, timeline, progress, saving, log, ranks, clock)
            which = " of the moving average" if average_counts(training, config.eval.weights) else ""
            log.say(f"done in {time.monotonic() - begin:.1f} s: best {config.data.val_split} top1{which} "
                    f"{progress['best_top1']:.4f}; the run lies in {folder}")  # fmt: skip
            log.say(f"epochs and last evaluation {clock.training_s:.2f} s, whole command {clock.command_s:.2f} s")
            log.summary({"training_s": clock.training_s, "command_s": clock.command_s})
            if config.log.images and dist.from_first_rank(lambda: log.is_tracked):
                with counted_weights(training, config.eval.weights):
                    show_predictions(log, training, val_loader, config, dataset["classes"], step=timeline.total)


def print_throughput(config: Config, training: Training, train_loader: TrainLoader, ranks: Ranks) -> None:
    """A line for each stage."""
    for stage in train_loader.stages:
        throughput = measure_images_per_s(training, stage, ranks.world_size)
        if ranks.is_first:
            size = f" at {stage.image_size} pixels" if len(train_loader.stages) > 1 else ""
            where = f"{ranks.world_size} x {training.device.type}"
            print(f"{config.name}{size}: {throughput:,.0f} images/s in training on {where}")


def go_on(training: Training, train_loader: TrainLoader, content: dict[str, Any], source: Path) -> dict[str, Any]:
    """Put all of a checkpoint in place; what the run had achieved by then."""
    checkpoint.restore(training, content, source)
    if not dist.is_first_rank():
        training.sums.zero_()  # the checkpoint holds the sums over all ranks
    position = content["position"]
    step = position["step"] * training.config.accumulation_steps
    train_loader.state = {"epoch": position["epoch"], "step": step}
    progress: dict[str, Any] = content["progress"]
    return progress


def fit(
    config: Config,
    training: Training,
    train_loader: TrainLoader,
    val_loader: Loader,
    val_samples: int,
    timeline: Timeline,
    progress: dict[str, Any],
    saving: Saving,
    log: RunLog,
    ranks: Ranks,
    clock: Clock,
) -> None:
    """Epochs from where the loader stands; a checkpoint after each, and within one as train.save_every_steps says."""
    bar = tqdm(disable=log.is_silent or not sys.stderr.isatty(), unit="step", leave=False, file=sys.stderr)
    meter = Meter(train_loader)
    last_lr = 0.0

    def after_update(update: int, lr: float) -> None:
        nonlocal last_lr
        bar.update()
        done, last_lr = update + 1, lr
        if not log.is_silent and done % config.log.every_steps == 0:
            loss, _, seen = training.sums.tolist()  # synchronises, once per log interval
            bar.set_postfix(loss=f"{loss / seen:.3f}", lr=f"{lr:.2g}")
            measured = {**meter.read(done, loss, seen), "lr": lr, "memory_gib": peak_memory_gib(training.device)}
            log.steps(measured, done)
        saving.save_within_epoch(done)

    first_epoch = train_loader.state["epoch"]
    for epoch in range(first_epoch, config.train.epochs):
        done = saving.position["step"]
        bar.reset(timeline.updates[epoch])
        bar.update(done)
        bar.set_description(f"epoch {epoch + 1}/{config.train.epochs}")
        loss, _, seen = training.sums.tolist() if done else (0.0, 0.0, 0.0)
        passed = train_loader.plan.batch_size * ranks.world_size  # images, by all ranks in a forward pass
        global_batch = passed * config.train.accumulation_steps
        meter.begin(timeline.first(epoch) + done, loss, seen, images_per_update=global_batch)
        if len(train_loader.stages) > 1 and (
            epoch == first_epoch or train_loader.at(epoch) is not train_loader.at(epoch - 1)
        ):
            size = train_loader.image_size
            log.say(f"epoch {epoch}: images of {size} x {size} pixels, {timeline.updates[epoch]} steps at global batch "
                    f"{global_batch}")  # fmt: skip
        decays = progress.get("plateau", {}).get("decays", 0)
        times = train_epoch(training, train_loader, seed=config.seed, rank=ranks.rank, after_update=after_update,
                            timeline=timeline, decays=decays)  # fmt: skip
        clock.add(times.time_s)
        is_last = epoch + 1 == config.train.epochs
        loss, correct, seen = dist.sum_over_ranks(training.sums.clone()).tolist()
        training.sums.zero_()
        weights = ("",) if training.ema is None else ("", "ema_")
        metrics = {
            "epoch": epoch,
            "step": timeline.first(epoch + 1),
            "train_loss": loss / seen,
            "train_top1": correct / seen,
            **dict.fromkeys(f"{which}val_{result}" for which in weights for result in RESULTS),
            "lr": last_lr,
            "images_per_s": times.batches * passed / times.time_s,
            "data_wait_fraction": times.wait_s / times.time_s,
            "epoch_time_s": times.time_s,
            "memory_gib": peak_memory_gib(training.device),
        }
        improved = False
        if is_last or (epoch + 1) % config.train.eval_every_epochs == 0:
            with clock if is_last else nullcontext():
                results, top1 = validate(config, training, val_loader, val_samples)
            metrics |= results
            improved = top1 > progress["best_top1"]
            progress["best_top1"] = max(progress["best_top1"], top1)
        if config.train.schedule == "plateau":
            progress["plateau"] = watch(progress.get("plateau", {}), metrics, config.train.schedule_options)
        log.epoch(metrics)
        if improved:
            saving.save("best.pt")
        if is_last or (epoch + 1) % config.train.save_every_epochs == 0:
            saving.save_last()
    bar.close()


def validate(
    config: Config, training: Training, val_loader: Loader, val_samples: int
) -> tuple[dict[str, float], float]:
    """Results of the weights, and of their moving average where one is kept; and the accuracy of those that count."""
    evaluations = {"": evaluate(training, val_loader, val_samples, config.eval.tta)}
    if training.ema is not None:
        with training.ema.in_place():
            evaluations["ema_"] = evaluate(training, val_loader, val_samples, config.eval.tta)
    results = {f"{which}val_{result}": getattr(one, result) for which, one in evaluations.items() for result in RESULTS}
    return results, evaluations["ema_" if average_counts(training, config.eval.weights) else ""].top1


if __name__ == "__main__":
    run_ranks(main)
