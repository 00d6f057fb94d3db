"""Train an image classifier: torchrun --nproc_per_node=N train/ddp.py --cfg configs/FILE.yaml"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from math import isnan
from typing import Any

from configs.load import load_config, to_yaml
from configs.utils.errors import UserError
from configs.utils.files import path_text
from pipelines.interfaces import Position
from train.build import Job
from train.checkpoint import relaunch
from train.checkpoint.compatibility import check_same_run, stream_info
from train.checkpoint.run_dir import (
    create_run_dir,
    is_explicit_checkpoint,
    lock_run_dir,
    refresh_candidates,
    resolve_resume,
)
from train.checkpoint.store import load_newest_on_all_ranks
from train.checkpoint.writer import CheckpointWriter
from train.distributed import collectives
from train.distributed.launcher import run_distributed
from train.distributed.process_group import Ranks, process_group
from train.distributed.signals import Preempted, catch_signals
from train.engine.cpu_settings import limit_threads
from train.engine.epoch import build_timeline
from train.engine.evaluate import evaluate
from train.engine.metrics import RunTimer
from train.engine.warm_up import check_image_sizes, warm_up
from train.engine.whitening import whiten, whitening_images
from train.evaluation import build_for_evaluation
from train.optim.averaging import eval_weights, uses_ema
from train.optim.schedule import config_warnings
from train.reporting.run_info import collect_run_info, dataset_info, stage_warnings, summary_line
from train.reporting.run_log import RunLog
from train.reporting.sample_images import show_predictions, show_samples
from train.throughput import print_throughput
from train.trainer import Trainer, fit, restore_run


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file, configs/….yaml")
    parser.add_argument(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the file: train.epochs=5 or train.epochs 5",
    )
    parser.add_argument("--batch-size", type=int, help="data.batch_size, per rank")
    parser.add_argument("--data-path", help="data.path, the converted data set")
    parser.add_argument("--output", help="folder of all runs; this one goes to OUTPUT/NAME")
    parser.add_argument(
        "--resume", type=path_text, metavar="auto|PATH", help="the latest run of this name, a checkpoint or its folder"
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the checkpoint to resume from, also the homework's ckpt_best.pth; do not train",
    )
    parser.add_argument("--throughput", action="store_true", help="print training images/s of this config and stop")
    return parser.parse_args(arguments)


def main() -> int:
    """Train, evaluate or measure throughput, depending on the arguments and the config, and return the exit status."""
    clock = RunTimer()
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
        flag_name = "--eval" if arguments.eval else "eval.only"
        raise UserError(f"{flag_name} needs a checkpoint; give --resume PATH or --resume auto")
    ranks = Ranks.from_environment()
    job = Job.load(config, ranks, trains=not evaluates_only)
    config, dataset = job.config, job.dataset

    with process_group(ranks) as device, ExitStack() as stack:
        job = job.on(device)
        val_loader, val_samples = job.val_loader(), job.val_samples

        trains = not (evaluates_only or arguments.throughput)
        launcher_ids = relaunch.launcher_ids() if trains else []
        active_run_dir, resume = collectives.from_first_rank(
            lambda: relaunch.find_active_run_dir(config, resume, launcher_ids)
        )
        folder, candidates = collectives.from_first_rank(lambda: resolve_resume(config, resume))
        folder = active_run_dir or folder
        # If no candidate exists, the run is refused and must not leave files in the folder.
        is_run = not candidates or any(path.exists() for path in candidates)
        if folder is not None and trains and is_run:  # lock before reading its checkpoints
            stack.enter_context(lock_run_dir(folder))
            is_explicit = active_run_dir is None and is_explicit_checkpoint(resume)
            candidates = collectives.from_first_rank(
                partial(refresh_candidates, folder, candidates, is_explicit=is_explicit)
            )
        if evaluates_only:
            state, which = build_for_evaluation(job, candidates, val_loader.image_size)
            result = evaluate(state, val_loader, val_samples, config.eval.tta)
            if ranks.is_first:
                print(f"{which}: {result.sentence(config.data.val_split)}")
            return 0
        source, content = load_newest_on_all_ranks(candidates) if candidates else (None, None)
        if content is None or "threads" not in content:  # otherwise `restore_threads` sets the number
            limit_threads(device)

        stream = stream_info(config, dataset, ranks.world_size * config.train.accumulation_steps)
        if content is not None and source is not None and not arguments.throughput:
            check_same_run(content, config, stream, source)
        state = job.build_state(val_loader.image_size, pretrained=content is None)
        train_loader = job.train_loader()
        check_image_sizes(state, train_loader, val_loader.image_size)
        if arguments.throughput:
            print_throughput(config, state, train_loader, ranks)
            return 0

        uses_ema(state.ema, config.eval.weights)  # raises if eval.weights needs an average and there is none
        timeline = build_timeline(state.config, train_loader)
        position = {"epoch": config.train.first_epoch, "step": 0}
        progress: dict[str, Any] = {"best_top1": -1.0}
        if content is None or source is None:
            clock.add(whiten(state, whitening_images(state, config.data)))
            train_loader.position = Position(**position)
        else:
            position, progress = restore_run(state, train_loader, timeline, content, source), content["progress"]
            clock.restore(content)
            content = None  # frees a second copy of the weights
        done = timeline.first_step(position["epoch"]) + position["step"]
        if folder is None:
            folder = collectives.from_first_rank(lambda: create_run_dir(config))
            stack.enter_context(lock_run_dir(folder))
        collectives.from_first_rank(lambda: relaunch.record_launch(folder, launcher_ids))
        run_info: dict[str, Any] = {
            "stream": stream,
            "config": to_yaml(config),
            "dataset": dataset_info(dataset, val_loader.image_size),
            "progress": progress,  # updated during training
            "times": clock.times,  # updated during training
        }
        facts = collect_run_info(config, dataset, state, train_loader, ranks)
        log_folder, peers_wait = folder if ranks.is_first else None, ranks.world_size > 1
        run_log = RunLog(log_folder, peers_wait=peers_wait, loss=config.train.loss)
        with run_log as log, CheckpointWriter(folder, state, run_info) as saving:
            log.write_config(run_info["config"], facts)
            log.drop_epochs_from(position["epoch"])
            if source is not None:
                saving.mark_saved(source, done)
                log.info(f"resumed from {source} at {position}")
            elif resume is not None:
                log.info(f"starting a new run, since --resume {resume} found no checkpoint")
            log.info(summary_line(config, facts, device))
            for note in (*state.notes, *stage_warnings(config), *config_warnings(config.train, timeline)):
                log.info(note)
            if position["epoch"] >= config.train.epochs:
                log.info(f"nothing to do: the run in {folder} has finished its {config.train.epochs} epochs")
                return 0
            log.start_trackers(config.log, {**config.model_dump(mode="json"), "facts": facts}, done)

            def prepare() -> float:
                return warm_up(state, train_loader, val_loader, config.eval.tta)

            prepared_s = prepare()
            if state.plan.needs_warmup:
                log.info(
                    f"compiled{' and captured' if state.plan.uses_cuda_graph else ''} the step in {prepared_s:.1f} s"
                )
            if config.log.images and done == timeline.first_step(config.train.first_epoch):
                show_samples(log, train_loader, dataset.classes)
            start_s = time.monotonic()
            trainer = Trainer(
                config,
                state,
                train_loader,
                val_loader,
                val_samples,
                timeline,
                progress,
                saving,
                log,
                ranks,
                clock,
                prepare,
            )
            try:
                with catch_signals() as pending:
                    fit(trainer, position, pending)
            except Preempted as preempted:
                log.fast_shutdown = True
                return preempted.exit_code
            if progress.get("left_out"):
                log.info(f"steps skipped in total: {progress['left_out']} of {timeline.total}")
            which = " of the moving average" if uses_ema(state.ema, config.eval.weights) else ""
            log.info(
                f"done in {time.monotonic() - start_s:.1f} s: best {config.data.val_split} top1{which} "
                f"{progress['best_top1']:.4f}; the run is in {folder}"
            )
            if not isnan(clock.training_s):
                log.info(f"epochs and last evaluation {clock.training_s:.2f} s")
                log.update_summary({"training_s": clock.training_s})
            log.info(f"whole command {clock.command_s:.2f} s")
            log.update_summary({"command_s": clock.command_s})
            if config.log.images and collectives.from_first_rank(lambda: log.has_trackers):
                with eval_weights(state.ema, config.eval.weights):
                    show_predictions(log, state, val_loader, config, dataset.classes, step=timeline.total)
    return 0


if __name__ == "__main__":
    run_distributed(main)
