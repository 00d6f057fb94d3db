"""Parts of `tools/benchmark.py all` on a GPU, most important first. The default time limit is PART_S per part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from configs.schema import AugConfig, AutoAugmentConfig, Config, DataConfig
from pipelines.storage.dataset import load_dataset
from tools.benchmarks.engine import datasets, ours, results, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.measured_tables import InterleavedTable, RowTable, TableSpec
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites import dali_checks, programs
from tools.benchmarks.suites.augmentations import augmentation_table
from tools.benchmarks.suites.datasets import image_dataset, load_config_on, small_dataset
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP, loading_table
from tools.benchmarks.suites.progressive import stage_changes
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.benchmarks.suites.training import training_table
from tools.perf.batch_size_search import Trial, search_fastest

PART_S = 170.0  # default time limit of a part
PLACEMENTS = {"npy, device": {"placement": "device"}, "npy, host": {"placement": "host"}}
DECODER_LOADS = (0.65, 0.9, 1.0, 0.35, 0.0)
RAND_AUGMENT = ("randaugment", "rand-m9-mstd0.5-inc1")
TARGETS = {"cifar10_resnet18": 0.95, "cifar10_alexnet": 0.77}
BATCH_SIZES_SHARE = 0.5  # share of part resnet50's time limit that its first table may use
DEFAULT_BATCH_SIZE = 256  # batch size in part resnet50 if none was measured
PROFILED_STEPS = 20


def _training(
    settings: Settings,
    title: str,
    name: str,
    side: int,
    batch_size: int,
    image_size: int | None = None,
    jpeg: bool = False,
    policy: str | None = None,
) -> InterleavedTable:
    """Return a table of training on a resident batch and end to end, with raw pixels on the device or on the host.

    Args:
        settings: Settings of the benchmark.
        title: Model and image size.
        name: Name of one of this project's configs.
        side: Stored image size in pixels.
        batch_size: Maximum batch size.
        image_size: Image size after augmentation in pixels, or None for the stored size.
        jpeg: Whether to also measure end-to-end training on JPEG.
        policy: Override of aug.auto.policy, or None to keep the config's.
    """
    raw = image_dataset(settings, side)
    config = load_config_on(name, raw, batch_size=limited_batch_size(raw, batch_size), image_size=image_size or side)
    if policy is not None:
        aug = config.aug.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
        config = config.model_copy(update={"aug": aug})
    variants: dict[str, dict[str, Any]] = dict(PLACEMENTS)
    if jpeg:
        variants["jpeg"] = {"path": str(image_dataset(settings, side, "jpeg")), "placement": "auto"}
    return training_table(title, config, variants, device="cuda")


def cifar_training(settings: Settings) -> Iterator[TableSpec]:
    yield _training(settings, "ResNet-18 32x32", "cifar10_resnet18", 32, 1024)
    yield _training(settings, "LeNet 32x32", "cifar10_lenet", 32, 1024)
    yield _training(settings, "AlexNet 70x70", "cifar10_alexnet", 32, 1024, 70)


def speedrun(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table of this project's speedrun to 94 % and the published script airbench94_muon.py, in this order."""

    def rows(limits: Limits) -> Iterator[Row]:
        last: Row = {}
        for last in _speedrun_rows(settings, "cifar10_speedrun_94", limits):
            yield last
        yield from programs.reference(
            settings.reference, small_dataset(settings), settings.seeds, settings.data, last, settings.deadline
        )

    yield RowTable(
        "Speedrun to 94 %",
        "speedrun",
        programs.SPEEDRUN_COLUMNS,
        rows,
        {"note": "ratio: mean time of the published script divided by ours."},
    )


def further_speedruns(settings: Settings) -> Iterator[TableSpec]:
    for percent in (95, 96):
        rows = partial(_speedrun_rows, settings, f"cifar10_speedrun_{percent}")
        yield RowTable(f"Speedrun to {percent} %", "speedrun", programs.SPEEDRUN_COLUMNS, rows)


def _speedrun_rows(settings: Settings, name: str, limits: Limits) -> Iterator[Row]:
    del limits
    return programs.speedrun(name, small_dataset(settings), settings.seeds, settings.scratch, settings.deadline)


def loaders(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of our loader on raw pixels: 224x224 and 96x96 images on the host, and 32x32 images on the device.

    If the images are on the host, one bound is a copy from pinned memory, measured alternately with the loader.
    """
    for aug in (None, RESIZED_CROP):
        for side in (224, 96):
            yield _loading(settings, side, aug, ("host",))
    for aug in (None, PAD_CROP):
        yield _loading(settings, 32, aug, ("device",))


def _loading(settings: Settings, side: int, aug: AugConfig | None, placements: tuple[str, ...]) -> InterleavedTable:
    folder = image_dataset(settings, side)
    batch_size = limited_batch_size(folder, 4096 if side == 32 else 1024)
    return loading_table(folder, aug, size=side, batch_size=batch_size, device="cuda", placements=placements)


def decoding(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of JPEG decoding by number of threads and hw_decoder_load, and of RandAugment on raw pixels."""
    cores = len(os.sched_getaffinity(0))
    for threads in dict.fromkeys((cores, max(1, cores // 2), max(1, cores // 4))):
        for side in (224, 96):
            yield _decoding(settings, side, threads)
        if threads == cores:
            for policy in RAND_AUGMENT:
                aug = RESIZED_CROP.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
                yield _loading(settings, 96, aug, ("device", "host"))


def _decoding(settings: Settings, side: int, threads: int) -> InterleavedTable:
    """Return a table of JPEG decoding without augmentation, with a row for each value of hw_decoder_load."""
    folder = image_dataset(settings, side, "jpeg")
    batch_size = limited_batch_size(folder, 512)
    data = DataConfig(path=str(folder), batch_size=batch_size, image_size=side, threads=threads)
    variants = {f"hw_decoder_load {load}": {"hw_decoder_load": load} for load in DECODER_LOADS}
    candidate = Candidate(OURS, ours.loading, (data, ours.PLAIN, "cuda", variants))
    title = f"JPEG {side}x{side} decoded with {threads} threads"
    row = {"ours": True, "device": "cuda", "batch_size": batch_size}
    return InterleavedTable(title, "decoding", [candidate], [row])


def resnet50(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of timm's ResNet-50: the training step by batch size, its profile, and training.

    The profile and training use the fastest batch size, or DEFAULT_BATCH_SIZE if none was measured because of --only or
    a lack of time. They are left out if all measured batch sizes failed or did not fit.
    """
    raw = image_dataset(settings, 224)
    config = load_config_on("medium_imagenet_224_resnet50", raw, image_size=224)
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": "timm/resnet50"})})
    trials: list[Trial] = []
    columns = ("images_per_s", "lowest", "highest", "share", "memory_gib", "reserved_gib", "device_memory_gib")
    yield RowTable(
        "timm/resnet50 224x224, training step by batch size",
        "ramp",
        columns,
        lambda limits: _batch_size_rows(settings, config, trials, limits),
        {"note": "share: of the arithmetic peak that a matrix product reaches here."},
    )
    fitting = [trial for trial in trials if trial.fits]
    if trials and not fitting:
        return
    fastest = max(fitting, key=lambda trial: trial.rate).batch_size if fitting else DEFAULT_BATCH_SIZE
    batch_size = limited_batch_size(raw, fastest)
    # the generated data set has no validation split
    data = config.data.model_copy(update={"batch_size": batch_size, "val_split": datasets.SPLIT})
    config = config.model_copy(update={"data": data})
    profiled = programs.profile(
        config, settings.scratch, settings.deadline, steps=PROFILED_STEPS, seconds=3 * settings.seconds
    )
    yield RowTable(
        "timm/resnet50 224x224, profile of the step",
        "profile",
        programs.PROFILE_COLUMNS,
        lambda limits: profiled,
        {"note": f"Batch {batch_size}."},
    )
    yield training_table("timm/resnet50 224x224", config, PLACEMENTS, device="cuda")


def _batch_size_rows(settings: Settings, config: Config, trials: list[Trial], limits: Limits) -> Iterator[Row]:
    """Measure increasing batch sizes. Append each trial to `trials` and yield its row.

    If there is no time for the first batch size, yield a skipped row.
    """
    deadline = settings.deadline
    if deadline is not None and settings.part_s is not None:
        deadline -= (1 - BATCH_SIZES_SHARE) * settings.part_s
    flops = roofline.training_flops(config.model, len(load_dataset(config.data.path).classes), 224)
    for trial in search_fastest(config, settings.seconds, settings.rounds, deadline):
        trials.append(trial)
        row: Row = {
            "name": f"batch {trial.batch_size}",
            "ours": True,
            "error": trial.error,
            "batch_size": trial.batch_size,
        }
        if trial.fits:
            row |= results.rate_fields(trial.rates)
            names = ("memory_gib", "reserved_gib", "device_memory_gib")
            row |= {name: round(value, 4) for name in names if (value := getattr(trial, name)) is not None}
            results.add_bound(row, {roofline.ARITHMETIC: limits.get(roofline.ARITHMETIC, 0) / flops}, "the step")
        elif not trial.is_failure:
            row |= {"error": None, "note": "does not fit into the GPU's memory"}
        yield row
    if not trials:
        yield results.skipped_row("first batch size")


def accuracy(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table of ResNet-18 and AlexNet trained to their target accuracies.

    If the part has a time limit, a third of it is reserved for AlexNet.
    """

    def rows(limits: Limits) -> Iterator[Row]:
        del limits
        last = list(TARGETS)[-1]
        for name, target in TARGETS.items():
            deadline = settings.deadline
            if deadline is not None and settings.part_s is not None and name != last:
                deadline -= settings.part_s / 3
            yield from programs.train_to_accuracy(
                name, target, small_dataset(settings), settings.scratch, deadline, settings.epochs
            )

    yield RowTable("Accuracy on CIFAR-10", "accuracy", programs.ACCURACY_COLUMNS, rows)


def dali(settings: Settings) -> Iterator[TableSpec]:
    yield RowTable(
        "DALI: does it free an output that a stream has still to read?",
        "dali",
        ("equal", "held", "reused", "batches"),
        partial(dali_checks.output_rows, settings),
        {
            "note": "equal: the held stream read the bytes as they were; held: until all later batches had been "
            "taken; reused: one of these lay at the same address."
        },
    )
    yield RowTable(
        "DALI: are pinned inputs copied to the GPU as they are?",
        "dali",
        ("gb_per_s",),
        partial(dali_checks.transfer_rows, settings),
    )
    yield RowTable(
        "GPU memory of a loader: DALI's pools, buffers, resident data",
        "dali",
        ("batch_size", "loader_memory_gib", "batch_gib", "images_per_s"),
        partial(dali_checks.memory_rows, settings),
    )


def beside_peers(settings: Settings) -> Iterator[TableSpec]:
    common: dict[str, Any] = {"device": "cuda", "scratch": settings.scratch, "workers": settings.workers}
    raw = image_dataset(settings, 32)
    config = load_config_on("cifar10_resnet18", raw, batch_size=limited_batch_size(raw, 512))
    yield training_table("ResNet-18 32x32 beside peers", config, {"npy": {}}, **common)
    for folder, aug, size in ((raw, PAD_CROP, 32), (image_dataset(settings, 96, "jpeg"), RESIZED_CROP, 96)):
        yield loading_table(folder, aug, size=size, batch_size=limited_batch_size(folder, 512), **common)


def larger_training(settings: Settings) -> Iterator[TableSpec]:
    yield _training(settings, "ResNet-18 224x224", "medium_imagenet_224_resnet18", 224, 512, jpeg=True)
    yield _training(settings, "ResNet-18 96x96", "medium_imagenet_96_resnet18", 96, 1024, jpeg=True)
    for policy in RAND_AUGMENT:
        title = f"ResNet-18 96x96 with {policy}"
        yield _training(settings, title, "medium_imagenet_96_resnet18", 96, 1024, policy=policy)
    yield _training(settings, "ResNet-50 96x96", "medium_imagenet_96_resnet50", 96, 1024)
    yield from stage_changes(settings)


def augmented(settings: Settings) -> Iterator[TableSpec]:
    for side, max_batch_size in ((96, 1024), (32, 4096)):
        folder = image_dataset(settings, side)
        batch_size = limited_batch_size(folder, max_batch_size)
        yield augmentation_table(folder, batch_size=batch_size, device="cuda", placement="device")


PARTS = (
    Part("training", ("training",), cifar_training),
    Part("speedrun", ("speedrun",), speedrun, needs_limits=False),
    Part("loaders", ("reading", "loading"), loaders),
    Part("decoding", ("decoding", "loading"), decoding),
    Part("resnet50", ("ramp", "profile", "training"), resnet50),
    Part("accuracy", ("accuracy",), accuracy, needs_limits=False),
    Part("dali", ("dali",), dali, needs_limits=False),
    Part("peers", ("training", "loading"), beside_peers),
    Part("larger-training", ("training", "stages"), larger_training),
    Part("augmentations", ("augment",), augmented, needs_limits=False),
    Part("further-speedruns", ("speedrun",), further_speedruns, needs_limits=False),
)
