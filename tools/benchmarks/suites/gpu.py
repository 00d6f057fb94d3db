"""Measure on a GPU in parts of three minutes at most, the most important first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import AugConfig, AutoAugmentConfig, Config, DataConfig
from tools.benchmarks.engine import datasets, ours, results, roofline
from tools.benchmarks.engine.datasets import batch_of
from tools.benchmarks.engine.interleaved import Contestant, apart, measure
from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites import augmentations, dali_checks, programs
from tools.benchmarks.suites.groups import OURS, Group, Measurable, Table, loading, training
from tools.benchmarks.suites.suite import (
    PAD,
    RESIZED,
    SAMPLES,
    Part,
    Settings,
    changes,
    check_time,
    config_on,
    is_over,
    medium,
    small,
)
from tools.perf.batch_size_search import Size, worthwhile

PART_S = 170.0  # the default time limit of a part
MAKING_S = 20.0  # that a data set takes at most
PLACEMENTS = {"npy, device": {"placement": "device"}, "npy, host": {"placement": "host"}}
DECODER_LOADS = (0.65, 0.9, 1.0, 0.35, 0.0)
RAND_AUGMENT = ("randaugment", "rand-m9-mstd0.5-inc1")
TARGETS = {"cifar10_resnet18": 0.95, "cifar10_alexnet": 0.77}
SHARE_OF_RAMP = 0.5  # of the time of part resnet50; the profile gets what is left
DEFAULT_BATCH = 256  # of part resnet50 where no batch sizes were measured
PROFILED_STEPS = 20


def images_of(settings: Settings, side: int, encoding: str = "npy") -> Path:
    """Return a data set of this size and encoding; make it from the small or the medium set unless it exists."""
    if (side, encoding) == (32, "npy"):
        return small(settings)
    base = small(settings) if side == 32 else medium(settings)
    if (side, encoding) == (96, "npy"):
        return base
    samples = settings.samples or SAMPLES["cuda"]
    out = settings.data / f"{base.name}-{side}-{encoding}-{samples}"
    if not (out / "dataset.json").is_file():
        check_time(settings, min(MAKING_S, (settings.part_s or MAKING_S) / 2))
    return datasets.remake(base, out, encoding=encoding, size=side, samples=samples)


def trained(
    settings: Settings,
    title: str,
    name: str,
    side: int,
    batch: int,
    image_size: int | None = None,
    jpeg: bool = False,
    policy: str | None = None,
) -> Group:
    """Compare end-to-end training with a resident batch, for every placement of the data. policy: sets aug.auto."""
    raw = images_of(settings, side)
    config = config_on(name, raw, batch_size=batch_of(raw, batch), image_size=image_size or side)
    if policy is not None:
        aug = config.aug.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
        config = config.model_copy(update={"aug": aug})
    variants: dict[str, dict[str, Any]] = dict(PLACEMENTS)
    if jpeg:
        variants["jpeg"] = {"path": str(images_of(settings, side, "jpeg")), "placement": "auto"}
    return training(title, config, variants, device="cuda")


def cifar_training(settings: Settings) -> Iterator[Measurable]:
    yield trained(settings, "ResNet-18 32x32", "cifar10_resnet18", 32, 1024)
    yield trained(settings, "LeNet 32x32", "cifar10_lenet", 32, 1024)
    yield trained(settings, "AlexNet 70x70", "cifar10_alexnet", 32, 1024, 70)


def speedrun(settings: Settings) -> Iterator[Measurable]:
    """Measure the speedrun to 94 % and the published script."""

    def rows(found: Limits) -> Iterator[Row]:
        last: Row = {}
        for last in speedrun_rows(settings, "cifar10_speedrun_94", found):
            yield last
        yield from programs.reference(
            settings.reference, small(settings), settings.seeds, settings.data, last, settings.deadline
        )

    yield Table("Speedrun to 94 %", "speedrun", programs.SPEEDRUN_COLUMNS, rows,
                {"note": "ratio: mean time of the published script divided by ours."})  # fmt: skip


def further_speedruns(settings: Settings) -> Iterator[Measurable]:
    for percent in (95, 96):
        rows = partial(speedrun_rows, settings, f"cifar10_speedrun_{percent}")
        yield Table(f"Speedrun to {percent} %", "speedrun", programs.SPEEDRUN_COLUMNS, rows)


def speedrun_rows(settings: Settings, name: str, found: Limits) -> Iterator[Row]:
    del found
    return programs.speedrun(name, small(settings), settings.seeds, settings.scratch, settings.deadline)


def loaders(settings: Settings) -> Iterator[Measurable]:
    """Measure the loaders of raw pixels: 224 and 96 pixels from the host, 32 pixels from the device.

    From the host the limit is the copy from pinned memory, which takes turns with the loader.
    """
    for aug in (None, RESIZED):
        for side in (224, 96):
            yield loaded(settings, side, aug, ("host",))
    for aug in (None, PAD):
        yield loaded(settings, 32, aug, ("device",))


def loaded(settings: Settings, side: int, aug: AugConfig | None, placements: tuple[str, ...]) -> Group:
    folder = images_of(settings, side)
    batch = batch_of(folder, 4096 if side == 32 else 1024)
    return loading([folder], aug, size=side, batch_size=batch, device="cuda", placements=placements)


def decoding(settings: Settings) -> Iterator[Measurable]:
    """Measure JPEG decoding by hw_decoder_load and number of threads, and RandAugment on raw pixels."""
    cores = len(os.sched_getaffinity(0))
    for threads in dict.fromkeys((cores, max(1, cores // 2), max(1, cores // 4))):
        for side in (224, 96):
            yield decoded(settings, side, threads)
        if threads == cores:
            for policy in RAND_AUGMENT:
                aug = RESIZED.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
                yield loaded(settings, 96, aug, ("device", "host"))


def decoded(settings: Settings, side: int, threads: int) -> Group:
    """Measure JPEG decoding without augmentation, for every hw_decoder_load."""
    folder = images_of(settings, side, "jpeg")
    batch = batch_of(folder, 512)
    data = DataConfig(path=str(folder), batch_size=batch, image_size=side, threads=threads)
    variants = {f"hw_decoder_load {load}": {"hw_decoder_load": load} for load in DECODER_LOADS}
    contestant = Contestant(OURS, ours.loading, (data, ours.PLAIN, "cuda", variants))
    title = f"JPEG {side}x{side} decoded with {threads} threads"
    return Group(title, "decoding", [contestant], [{"ours": True, "device": "cuda", "batch_size": batch}])


def resnet50(settings: Settings) -> Iterator[Measurable]:
    """Measure timm's ResNet-50: the step by batch size, its profile at the fastest batch, and training end to end.

    Where no batch size was measured (--only, lack of time), profile and training use DEFAULT_BATCH.
    """
    raw = images_of(settings, 224)
    config = config_on("medium_imagenet_224_resnet50", raw, image_size=224)
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": "timm/resnet50"})})
    sizes: list[Size] = []
    columns = ("images_per_s", "lowest", "highest", "share", "memory_gib", "reserved_gib", "device_memory_gib")
    yield Table("timm/resnet50 224x224, training step by batch size", "ramp", columns,
                lambda found: ramp_rows(settings, config, sizes, found),
                {"note": "share: of the arithmetic peak that a matrix product reaches here."})  # fmt: skip
    fitting = [size for size in sizes if size.fits]
    if sizes and not fitting:
        return
    fastest = batch_of(raw, max(fitting, key=lambda size: size.rate).batch if fitting else DEFAULT_BATCH)
    data = config.data.model_copy(update={"batch_size": fastest, "val_split": datasets.SPLIT})  # there is no other
    config = config.model_copy(update={"data": data})
    profiled = programs.profile(config, settings.scratch, settings.deadline, steps=PROFILED_STEPS,
                                seconds=3 * settings.seconds)  # fmt: skip
    yield Table("timm/resnet50 224x224, profile of the step", "profile", programs.PROFILE_COLUMNS,
                lambda found: profiled, {"note": f"Batch {fastest}."})  # fmt: skip
    yield training("timm/resnet50 224x224", config, PLACEMENTS, device="cuda")


def ramp_rows(settings: Settings, config: Config, sizes: list[Size], found: Limits) -> Iterator[Row]:
    """Yield a row for each batch size and append the sizes to `sizes`."""
    deadline = settings.deadline
    if deadline is not None and settings.part_s is not None:
        deadline -= (1 - SHARE_OF_RAMP) * settings.part_s
    flops = roofline.training_flops(config.model, len(datasets.load_dataset(config.data.path)["classes"]), 224)
    for size in worthwhile(config, settings.seconds, settings.rounds, deadline):
        sizes.append(size)
        row: Row = {"name": f"batch {size.batch}", "ours": True, "error": size.error, "batch_size": size.batch}
        if size.fits:
            row |= results.rates(size.rates)
            names = ("memory_gib", "reserved_gib", "device_memory_gib")
            row |= {name: round(value, 4) for name in names if (value := getattr(size, name)) is not None}
            results.add_bound(row, {roofline.ARITHMETIC: found.get(roofline.ARITHMETIC, 0) / flops}, "the step")
        elif not size.is_failure:
            row |= {"error": None, "note": "does not fit into the GPU's memory"}
        yield row
    if not sizes:
        yield results.skipped("first batch size")


def accuracy(settings: Settings) -> Iterator[Measurable]:
    """Train ResNet-18 and AlexNet to their target accuracies. A third of the time is reserved for AlexNet."""

    def rows(found: Limits) -> Iterator[Row]:
        del found
        last = list(TARGETS)[-1]
        for name, target in TARGETS.items():
            deadline = settings.deadline
            if deadline is not None and settings.part_s is not None and name != last:
                deadline -= settings.part_s / 3
            yield from programs.training_to(name, target, small(settings), settings.scratch, deadline, settings.epochs)

    yield Table("Accuracy on CIFAR-10", "accuracy", programs.ACCURACY_COLUMNS, rows)


def dali(settings: Settings) -> Iterator[Measurable]:
    yield Table("DALI: does it free an output that a stream has still to read?", "dali",
                ("equal", "held", "reused", "batches"), partial(output_rows, settings),
                {"note": "equal: the held stream read the bytes as they were; held: until all later batches had been "
                         "taken; reused: one of these lay at the same address."})  # fmt: skip
    yield Table("DALI: are pinned inputs copied to the GPU as they are?", "dali", ("gb_per_s",),
                partial(transfer_rows, settings))  # fmt: skip
    yield Table("GPU memory of a loader: DALI's pools, buffers, resident data", "dali",
                ("batch_size", "loader_memory_gib", "batch_gib", "images_per_s"),
                partial(memory_rows, settings))  # fmt: skip


def output_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    del found
    for encoding in ("npy", "jpeg"):
        folder = images_of(settings, 96, encoding)
        data = DataConfig(path=str(folder), batch_size=batch_of(folder, 256), image_size=96, placement="host")
        answer = apart(dali_checks.output_survives, data, RESIZED, deadline=settings.deadline)
        yield {"name": f"96x96, {encoding}", "ours": True, "error": None, **answer}


def transfer_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    del found
    batch = 256 if settings.samples is None else 16
    outcomes = measure([Contestant("", dali_checks.transfers, (batch,))], settings.seconds, settings.rounds,
                       settings.deadline)  # fmt: skip
    for outcome in outcomes:
        row = results.row(outcome, ours=True)
        yield row | ({"gb_per_s": float(f"{outcome.rate / 1e9:.4g}")} if outcome.rates else {})


def memory_rows(settings: Settings, found: Limits) -> Iterator[Row]:
    """Measure the GPU memory of one loader at a time."""
    del found
    cases = [(224, "npy", "host"), (224, "jpeg", "auto"), (96, "npy", "host"), (96, "npy", "device"),
             (96, "jpeg", "auto"), (32, "npy", "device")]  # fmt: skip
    for side, encoding, placement in cases:
        name = f"{side}x{side} {encoding}, {placement}"
        if is_over(settings):
            yield results.skipped(name)
            continue
        folder = images_of(settings, side, encoding)
        batch = batch_of(folder, 1024)
        data = DataConfig(path=str(folder), batch_size=batch, image_size=side, placement=placement)  # type: ignore[arg-type]
        contestant = Contestant(name, ours.loading, (data, PAD if side == 32 else RESIZED, "cuda"))
        (outcome,) = measure([contestant], settings.seconds, 1, settings.deadline)
        yield results.row(outcome, ours=True, batch_size=batch, batch_gib=round(batch * side * side * 3 / 2**30, 4))


def beside_peers(settings: Settings) -> Iterator[Measurable]:
    common: dict[str, Any] = {"device": "cuda", "scratch": settings.scratch, "workers": settings.workers}
    raw = images_of(settings, 32)
    config = config_on("cifar10_resnet18", raw, batch_size=batch_of(raw, 512))
    yield training("ResNet-18 32x32 beside peers", config, {"npy": {}}, **common)
    for folder, aug, size in ((raw, PAD, 32), (images_of(settings, 96, "jpeg"), RESIZED, 96)):
        yield loading([folder], aug, size=size, batch_size=batch_of(folder, 512), **common)


def larger_training(settings: Settings) -> Iterator[Measurable]:
    yield trained(settings, "ResNet-18 224x224", "medium_imagenet_224_resnet18", 224, 512, jpeg=True)
    yield trained(settings, "ResNet-18 96x96", "medium_imagenet_96_resnet18", 96, 1024, jpeg=True)
    for policy in RAND_AUGMENT:
        title = f"ResNet-18 96x96 with {policy}"
        yield trained(settings, title, "medium_imagenet_96_resnet18", 96, 1024, policy=policy)
    yield trained(settings, "ResNet-50 96x96", "medium_imagenet_96_resnet50", 96, 1024)
    yield from changes(settings)


def augmented(settings: Settings) -> Iterator[Measurable]:
    for side, batch in ((96, 1024), (32, 4096)):
        folder = images_of(settings, side)
        yield augmentations.group(folder, batch_size=batch_of(folder, batch), device="cuda", placement="device")


PARTS = (
    Part("training", ("training",), cifar_training),
    Part("speedrun", ("speedrun",), speedrun, is_bounded=False),
    Part("loaders", ("reading", "loading"), loaders),
    Part("decoding", ("decoding", "loading"), decoding),
    Part("resnet50", ("ramp", "profile", "training"), resnet50),
    Part("accuracy", ("accuracy",), accuracy, is_bounded=False),
    Part("dali", ("dali",), dali, is_bounded=False),
    Part("peers", ("training", "loading"), beside_peers),
    Part("larger-training", ("training", "stages"), larger_training),
    Part("augmentations", ("augment",), augmented, is_bounded=False),
    Part("further-speedruns", ("speedrun",), further_speedruns, is_bounded=False),
)
