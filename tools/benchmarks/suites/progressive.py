"""Cost of changing the image or batch size between stages of training (data.stages).

Each stage's rate in its first epoch is compared to that in its second.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from configs.schema import Config, StageConfig
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.interleaved import run_in_subprocess
from tools.benchmarks.engine.measured_tables import RowTable, TableSpec
from tools.benchmarks.engine.results import Row, new_row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites.datasets import load_config_on, medium_dataset, small_dataset
from tools.benchmarks.suites.settings import Settings
from train.build import Job
from train.distributed.process_group import Ranks, process_group
from train.engine.epoch import train_epoch
from train.engine.warm_up import warm_up


def measure_stage_changes(config: Config, ranks: Ranks, rounds: int) -> list[Row]:
    """Measure the training rates after a stage change, with the real loader and training step.

    Each round trains for two epochs in each stage. An uncounted warm-up round precedes the `rounds` rounds. `ratio` is
    a stage's rate in its first epoch divided by that in its second. It is the median over all changes to the same image
    and batch size.

    Returns:
        A row per combination of image size and batch size.
    """
    warm_up_epochs = 2 * len(config.data.stages)
    epochs = range(0, warm_up_epochs * (rounds + 1), 2)  # in which a stage begins
    sizes = itertools.cycle(config.data.stages)
    stages = tuple(size.model_copy(update={"epoch": epoch}) for epoch, size in zip(epochs, sizes, strict=False))
    data = config.data.model_copy(update={"stages": stages})
    train = config.train.model_copy(update={"epochs": epochs.stop})
    job = Job.load(config.model_copy(update={"data": data, "train": train}), ranks)
    rates: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with process_group(ranks) as device:
        job = job.on(device)
        loader = job.train_loader()
        state = job.build_state(max(stage.image_size for stage in loader.stages), pretrained=False)
        warm_up(state, loader)
        for epoch in epochs:
            shape = (loader.image_size, loader.plan.batch_size)
            pair = []
            for _ in range(2):
                times = train_epoch(state, loader, seed=config.seed, rank=0)
                pair.append(times.micro_steps * shape[1] / times.time_s)
            if epoch >= warm_up_epochs:
                rates.setdefault(shape, []).append((pair[0], pair[1]))
    return [
        new_row(
            f"{size}x{size}, batch {batch}",
            device=device.type,
            images_per_s=round(statistics.median(steady for _, steady in pairs), 1),
            after_change=round(statistics.median(first for first, _ in pairs), 1),
            ratio=round(statistics.median(first / steady for first, steady in pairs), 4),
            changes=len(pairs),
        )
        for (size, batch), pairs in rates.items()
    ]


def title(config: Config) -> str:
    return f"changes of image and batch size, {config.model.name}"


def stage_changes(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table of stage changes in training ResNet-18 (on a GPU) or LeNet (on the CPU).

    LeNet is trained in two stages, with the smallest and the largest image size that it accepts: 32 and 35 pixels.
    """
    if settings.device == "cuda":
        folder, name = medium_dataset(settings), "medium_imagenet_96_resnet18_progressive"
        config = load_config_on(name, folder, batch_size=limited_batch_size(folder, 1024))
    else:
        stages = (StageConfig(epoch=0, image_size=32), StageConfig(epoch=1, image_size=35))
        config = load_config_on("cifar10_lenet", small_dataset(settings), stages=stages)

    def rows(limits: Limits) -> Iterator[Row]:
        call = (measure_stage_changes, config, Ranks(), settings.rounds)
        yield from run_in_subprocess(*call, deadline=settings.deadline)

    yield RowTable(title(config), "stages", None, rows)
