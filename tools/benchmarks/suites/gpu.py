"""Parts of `tools/benchmark.py all` on a GPU, most important first. The default time limit is PART_S per part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from configs.schema import AugConfig, AutoAugmentConfig, Config, DataConfig
from pipelines.open import load_dataset
from tools.benchmarks.engine import datasets, ours, results, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.measured_tables import Case, InterleavedTable, RowTable, TableSpec
from tools.benchmarks.engine.ours import OURS, Variants
from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites import dali_checks, programs
from tools.benchmarks.suites.augmentations import augmentation_table
from tools.benchmarks.suites.datasets import image_dataset, load_config_on
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP, loading_table
from tools.benchmarks.suites.progressive import stage_changes
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.benchmarks.suites.training import training_table
from tools.perf.batch_size_search import Trial, search_fastest


class TrainingCase(NamedTuple):
    """A table of training on a resident batch and end to end, with raw pixels on the device and on the host."""

    title: str  # model and image size
    config: str  # name of one of this project's configs
    side: int  # stored image size in pixels
    batch_size: int  # maximum batch size
    image_size: int | None = None  # after augmentation in pixels, or None for the stored size
    jpeg: bool = False  # whether to also measure end-to-end training on JPEG
    policy: str | None = None  # override of aug.auto.policy, or None to keep the config's


PART_S = 170.0  # default time limit of a part
PLACEMENTS: Variants = {"npy, device": {"placement": "device"}, "npy, host": {"placement": "host"}}
RAND_AUGMENT = ("randaugment", "rand-m9-mstd0.5-inc1")
CIFAR_TRAINING = (
    TrainingCase("ResNet-18 32x32", "cifar10_resnet18", 32, 1024),
    TrainingCase("LeNet 32x32", "cifar10_lenet", 32, 1024),
    TrainingCase("AlexNet 70x70", "cifar10_alexnet", 32, 1024, image_size=70),
)
LARGER_TRAINING = (
    TrainingCase("ResNet-18 224x224", "medium_imagenet_224_resnet18", 224, 512, jpeg=True),
    TrainingCase("ResNet-18 96x96", "medium_imagenet_96_resnet18", 96, 1024, jpeg=True),
    *(
        TrainingCase(f"ResNet-18 96x96 with {policy}", "medium_imagenet_96_resnet18", 96, 1024, policy=policy)
        for policy in RAND_AUGMENT
    ),
    TrainingCase("ResNet-50 96x96", "medium_imagenet_96_resnet50", 96, 1024),
)
LOADERS = (  # side, augmentation and placement of raw pixels
    *((side, aug, "host") for aug in (None, RESIZED_CROP) for side in (224, 96)),
    *((32, aug, "device") for aug in (None, PAD_CROP)),
)
DECODER_LOADS = (0.65, 0.9, 1.0, 0.35, 0.0)
FEW_THREADS_LOADS = DECODER_LOADS[:3]  # fewer threads leave more to the hardware
PADDING = ("device_memory_padding", "host_memory_padding")  # 16 and 8 MiB per thread by default
DECODER_MEMORY: Variants = {
    "default": {},
    "no padding": {"decoder_memory": dict.fromkeys(PADDING, 0)},
    "padding 64 MiB": {"decoder_memory": dict.fromkeys(PADDING, 2**26)},
    "size hint": {"decoder_memory": {"preallocate_width_hint": 224, "preallocate_height_hint": 224}},
}
TARGETS = {"cifar10_resnet18": 0.95, "cifar10_alexnet": 0.77}
BATCH_SIZES_SHARE = 0.5  # share of part resnet50's time limit that its first table may use
DEFAULT_BATCH_SIZE = 256  # batch size in part resnet50 if none was measured
PROFILED_STEPS = 20
MEMORY_FIELDS = ("memory_gib", "reserved_gib", "device_memory_gib")


def _training(settings: Settings, case: TrainingCase) -> InterleavedTable:
    raw = image_dataset(settings, case.side)
    batch_size = limited_batch_size(raw, case.batch_size)
    config = load_config_on(case.config, raw, batch_size=batch_size, image_size=case.image_size or case.side)
    if case.policy is not None:
        aug = config.aug.model_copy(update={"auto": AutoAugmentConfig(policy=case.policy)})
        config = config.model_copy(update={"aug": aug})
    variants = dict(PLACEMENTS)
    if case.jpeg:
        variants["jpeg"] = {"path": str(image_dataset(settings, case.side, "jpeg")), "placement": "auto"}
    return training_table(settings, case.title, config, variants)


def cifar_training(settings: Settings) -> Iterator[TableSpec]:
    return (_training(settings, case) for case in CIFAR_TRAINING)


def speedrun(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table of this project's speedrun to 94 % and the published script airbench94_muon.py, in this order."""

    def rows(limits: Limits) -> Iterator[Row]:
        last = Row()
        for last in programs.speedrun(settings, "cifar10_speedrun_94"):
            yield last
        yield from programs.reference(settings, last.get("time_s_mean"))

    note = "ratio: mean time of the published script divided by ours."
    yield RowTable("Speedrun to 94 %", "speedrun", programs.SPEEDRUN_COLUMNS, rows, {"note": note})


def further_speedruns(settings: Settings) -> Iterator[TableSpec]:
    return (_speedrun_table(settings, percent) for percent in (95, 96))


def _speedrun_table(settings: Settings, percent: int) -> RowTable:
    name, columns = f"cifar10_speedrun_{percent}", programs.SPEEDRUN_COLUMNS
    return RowTable(f"Speedrun to {percent} %", "speedrun", columns, lambda _: programs.speedrun(settings, name))


def loaders(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of our loader on raw pixels: 224x224 and 96x96 images on the host, and 32x32 images on the device.

    If the images are on the host, one bound is a copy from pinned memory, measured alternately with the loader.
    """
    return (_loading(settings, side, aug, (placement,)) for side, aug, placement in LOADERS)


def _loading(settings: Settings, side: int, aug: AugConfig | None, placements: tuple[str, ...]) -> InterleavedTable:
    folder = image_dataset(settings, side)
    batch_size = limited_batch_size(folder, 4096 if side == 32 else 1024)
    return loading_table(settings, folder, aug, size=side, batch_size=batch_size, placements=placements)


def decoding(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of JPEG decoding by hw_decoder_load, threads and memory, and of RandAugment on raw pixels.

    Each table takes about half a minute, so those with fewer threads come last.
    """
    cores = len(os.sched_getaffinity(0))
    for side in (224, 96):
        yield _decoding(settings, side, cores, _by_load(DECODER_LOADS))
    yield _decoding(settings, 224, cores, DECODER_MEMORY, " by memory")
    for policy in RAND_AUGMENT:
        aug = RESIZED_CROP.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
        yield _loading(settings, 96, aug, ("device", "host"))
    for threads in dict.fromkeys((max(1, cores // 4), max(1, cores // 2))):
        if threads != cores:
            yield _decoding(settings, 224, threads, _by_load(FEW_THREADS_LOADS))


def _by_load(loads: tuple[float, ...]) -> Variants:
    return {f"hw_decoder_load {load}": {"hw_decoder_load": load} for load in loads}


def _decoding(settings: Settings, side: int, threads: int, variants: Variants, suffix: str = "") -> InterleavedTable:
    """Return a table of JPEG decoding without augmentation, with a row for each variant."""
    folder = image_dataset(settings, side, "jpeg")
    batch_size = limited_batch_size(folder, 512)
    data = DataConfig(path=str(folder), batch_size=batch_size, image_size=side, threads=threads)
    candidate = Candidate(OURS, ours.loading, (data, ours.PLAIN, "cuda", variants))
    case = Case(candidate, {"ours": True, "device": "cuda", "batch_size": batch_size})
    return InterleavedTable(f"JPEG {side}x{side} decoded with {threads} threads{suffix}", "decoding", [case])


def resnet50(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables of timm's ResNet-50: the training step by batch size, its profile, and training.

    The profile and training use the fastest batch size, or DEFAULT_BATCH_SIZE if none was measured because of --only or
    a lack of time. They are left out if all measured batch sizes failed or did not fit.
    """
    raw = image_dataset(settings, 224)
    config = load_config_on("medium_imagenet_224_resnet50", raw, image_size=224)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"name": "timm/resnet50", "options": {}})}
    )
    trials: list[Trial] = []
    columns: tuple[str, ...] = ("images_per_s", "lowest", "highest", "share", *MEMORY_FIELDS)
    rows = partial(_batch_size_rows, settings, config, trials)
    note = "share: of the arithmetic peak that a matrix product reaches here."
    yield RowTable("timm/resnet50 224x224, training step by batch size", "ramp", columns, rows, {"note": note})
    fitting = [trial for trial in trials if trial.fits]
    if trials and not fitting:
        return
    fastest = max(fitting, key=lambda trial: trial.rate).batch_size if fitting else DEFAULT_BATCH_SIZE
    batch_size = limited_batch_size(raw, fastest)
    # the generated data set has no validation split
    data = config.data.model_copy(update={"batch_size": batch_size, "val_split": datasets.SPLIT})
    config = config.model_copy(update={"data": data})
    title, columns = "timm/resnet50 224x224, profile of the step", programs.PROFILE_COLUMNS
    profiled = programs.profile(settings, config, PROFILED_STEPS)  # runs when its rows are taken
    yield RowTable(title, "profile", columns, lambda _: profiled, {"note": f"Batch {batch_size}."})
    yield training_table(settings, "timm/resnet50 224x224", config, PLACEMENTS)


def _batch_size_rows(settings: Settings, config: Config, trials: list[Trial], limits: Limits) -> Iterator[Row]:
    """Measure increasing batch sizes. Append each trial to `trials` and yield its row.

    If there is no time for the first batch size, yield a skipped row.
    """
    reserved_s = (1 - BATCH_SIZES_SHARE) * (settings.part_s or 0)
    deadline = settings.deadline and settings.deadline - reserved_s
    flops = roofline.training_flops(config.model, len(load_dataset(config.data.path, config.data.classes).classes), 224)
    for trial in search_fastest(config, settings.seconds, settings.rounds, deadline):
        trials.append(trial)
        fields: dict[str, object] = {"batch_size": trial.batch_size, "error": trial.error}
        if trial.fits:
            memory = {name: getattr(trial, name) for name in MEMORY_FIELDS}
            fields |= {name: round(gib, 4) for name, gib in memory.items() if gib is not None}
            fields |= results.rate_fields(trial.rates)
        elif not trial.is_failure:
            fields |= {"error": None, "note": "does not fit into the GPU's memory"}
        row = results.new_row(f"batch {trial.batch_size}", **fields)
        results.add_bound(row, {roofline.ARITHMETIC: limits.get(roofline.ARITHMETIC, 0) / flops}, "the step")
        yield row
    if not trials:
        yield results.skipped_row("first batch size")


def accuracy(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table of ResNet-18 and AlexNet trained to their target accuracies.

    If the part has a time limit, a third of it is reserved for AlexNet.
    """

    def rows(limits: Limits) -> Iterator[Row]:
        for name, target in TARGETS.items():
            reserved_s = 0.0 if name == list(TARGETS)[-1] else (settings.part_s or 0) / 3
            earlier = replace(settings, deadline=settings.deadline and settings.deadline - reserved_s)
            yield from programs.train_to_accuracy(earlier, name, target)

    yield RowTable("Accuracy on CIFAR-10", "accuracy", programs.ACCURACY_COLUMNS, rows)


def dali(settings: Settings) -> Iterator[TableSpec]:
    title = "DALI: does it free an output that a stream has still to read?"
    columns: tuple[str, ...] = ("equal", "held", "reused", "batches")
    note = (
        "equal: the held stream read the bytes as they were; held: until all later batches had been taken; "
        "reused: one of these lay at the same address."
    )
    yield RowTable(title, "dali", columns, lambda _: dali_checks.output_rows(settings), {"note": note})
    title, columns = "DALI: are pinned inputs copied to the GPU as they are?", ("gb_per_s",)
    yield RowTable(title, "dali", columns, lambda _: dali_checks.transfer_rows(settings))
    title = "GPU memory of a loader: DALI's pools, buffers, resident data"
    columns = ("batch_size", "loader_memory_gib", "batch_gib", "images_per_s")
    yield RowTable(title, "dali", columns, lambda _: dali_checks.memory_rows(settings))


def beside_peers(settings: Settings) -> Iterator[TableSpec]:
    raw = image_dataset(settings, 32)
    config = load_config_on("cifar10_resnet18", raw, batch_size=limited_batch_size(raw, 512))
    yield training_table(settings, "ResNet-18 32x32 beside peers", config, {"npy": {}}, with_peers=True)
    for folder, aug, size in ((raw, PAD_CROP, 32), (image_dataset(settings, 96, "jpeg"), RESIZED_CROP, 96)):
        batch_size = limited_batch_size(folder, 512)
        yield loading_table(settings, folder, aug, size=size, batch_size=batch_size, with_peers=True)


def larger_training(settings: Settings) -> Iterator[TableSpec]:
    yield from (_training(settings, case) for case in LARGER_TRAINING)
    yield from stage_changes(settings)


def augmented(settings: Settings) -> Iterator[TableSpec]:
    for side, max_batch_size in ((96, 1024), (32, 4096)):
        folder = image_dataset(settings, side)
        batch_size = limited_batch_size(folder, max_batch_size)
        yield augmentation_table(settings, folder, batch_size=batch_size, with_peer=False, placement="device")


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
