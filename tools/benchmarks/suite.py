"""The whole run, on a CPU or on a GPU: which groups there are, in which order, and what happens when one fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.load import load_config
from configs.schema import AugConfig, AutoAugmentConfig, Config, StageConfig
from tools.benchmarks import augmentations, datasets, limits, peers, results, scale, stage_changes
from tools.benchmarks.groups import Group, limit_rows, loading, training
from tools.benchmarks.limits import Limits
from tools.benchmarks.ramp import best_batch
from tools.benchmarks.turns import Contestant, measure
from train.dist import Ranks

ROOT = Path(__file__).parents[2]
PAD = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED = AugConfig(crop="random-resized", scale=(0.25, 1.0), flip=0.5)
GPU_SAMPLES = 16_384  # of the larger sizes: some dozen batches per epoch, and a few GiB on disk
SPEEDRUNS = (94, 95, 96)
SPEEDRUN_S = 45.0  # kept free for each speedrun, of which the program runs as many as fit


@dataclass(frozen=True)
class Settings:
    """Of one whole run."""

    scratch: Path  # folder for made data sets and the peers' files
    small: Path | None = None  # converted 32x32 data set
    medium: Path | None = None  # converted 96x96 data set
    source: Path | None = None  # raw CIFAR-10, where none is converted
    seconds: float = 0.5
    rounds: int = 5
    workers: int = 1  # of the peers
    deadline: float | None = None  # of time.monotonic()
    speedruns: int = 1  # runs of each; 0: none
    samples: int | None = None  # of made data sets; None: the default of the device
    only: tuple[str, ...] = ()  # stages; empty: all


Entry = dict[str, Any]
Part = tuple[str, Callable[[], Iterator[Group]]]  # what it is called when it fails, and what makes its groups


def run_all(settings: Settings) -> dict[str, Any]:
    """The content of the JSON file; what failed stands in it as rows with an error."""
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit_outcomes = measure(
        [Contestant("limits", limits.limits, (device, settings.scratch))],
        settings.seconds, min(3, settings.rounds), settings.deadline,
    )  # fmt: skip
    found = limits.limits_of(limit_outcomes)
    groups: list[Entry] = [{"title": "Limits of the machine", "stage": "limits", "rows": limit_rows(limit_outcomes)}]
    parts = gpu_parts(settings) if device == "cuda" else cpu_parts(settings)
    for name, make in tqdm(parts, desc="parts", leave=False):
        groups += run_part(name, make, found, settings)
    if wanted(settings, "scale"):
        groups.append(scale.group(settings.scratch, settings.seconds))
    if wanted(settings, "stages"):
        groups.append(changes(settings, device))
    if wanted(settings, "speedrun") and device == "cuda":
        groups += speedruns(settings)
    missing = [*peers.missing(peers.LOADERS), *peers.missing(peers.LOOPS)]
    return run_record(groups, missing, time.monotonic() - begin)


def run_record(groups: list[Entry], missing: list[str], duration_s: float) -> dict[str, Any]:
    """What goes to the JSON file."""
    return {
        "format": results.FORMAT,
        "version": results.VERSION,
        "command": " ".join(["python", *sys.argv]),
        "duration_s": round(duration_s, 1),
        "environment": results.environment(),
        "missing_peers": missing,
        "groups": groups,
    }


def run_part(name: str, make: Callable[[], Iterator[Group]], found: Limits, settings: Settings) -> list[Entry]:
    """Measure a part's groups and print their tables; what cannot even be made is a group with one failed row."""
    entries: list[Entry] = []
    try:
        if settings.deadline is not None and time.monotonic() > settings.deadline:
            raise TimeoutError("not measured: the time of the whole run was over")
        for group in make():
            if not wanted(settings, group.stage):
                continue
            entries.append(group.run(found, settings.seconds, settings.rounds, settings.deadline))
            tqdm.write(f"\n{entries[-1]['title']}\n{results.table(entries[-1]['rows'])}")
    except Exception as error:  # whatever it is, the other parts go on
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        entries.append({"title": name, "stage": "failed", "rows": [results.failed(name, sentence)]})
    return entries


def wanted(settings: Settings, stage: str) -> bool:
    return not settings.only or stage in settings.only


def cpu_parts(settings: Settings) -> list[Part]:
    """Loading beside all peers at 32x32 and 96x96, raw and JPEG; training LeNet beside all peers."""
    common: dict[str, Any] = {
        "device": "cpu",
        "scratch": settings.scratch,
        "workers": settings.workers,
        "batch_size": 512,
    }

    def loaders(given: Path, aug: AugConfig, size: int) -> Iterator[Group]:
        jpeg = datasets.remake(
            given, settings.scratch / f"{given.name}-jpeg", encoding="jpeg", samples=settings.samples
        )
        for folder in (given, jpeg):
            batch = min(512, _train_samples(folder) // 4)
            for augmentation in (None, aug):
                yield loading([folder], augmentation, size=size, **{**common, "batch_size": batch})

    def small() -> Iterator[Group]:
        yield from loaders(_small(settings), PAD, 32)

    def medium() -> Iterator[Group]:
        yield from loaders(_medium(settings, settings.samples or 4096), RESIZED, 64)

    def lenet() -> Iterator[Group]:
        config = _config("cifar10_lenet", _small(settings))
        yield training("LeNet 32x32", config, {"end to end": {}}, device="cpu", scratch=settings.scratch,
                       workers=settings.workers)  # fmt: skip

    def augmented(folder: Path) -> Iterator[Group]:
        yield augmentations.group(folder, **{**common, "batch_size": min(512, _train_samples(folder) // 4)})

    return [
        ("32x32", small),
        ("LeNet", lenet),
        ("96x96", medium),
        ("augmentations 32x32", lambda: augmented(_small(settings))),
        ("augmentations 96x96", lambda: augmented(_medium(settings, settings.samples or 4096))),
    ]


def gpu_parts(settings: Settings) -> list[Part]:
    """Training first, since it is what counts if time runs out; then the loaders alone; then peers."""
    samples = settings.samples or GPU_SAMPLES
    folders: dict[tuple[int, str], Path] = {}

    def folder(size: int, encoding: str) -> Path:
        if (size, encoding) not in folders:
            if size == 32 and encoding == "npy":
                folders[size, encoding] = _small(settings)
            else:
                base = _small(settings) if size == 32 else _medium(settings, samples)
                count = None if size == 32 else samples
                out = settings.scratch / f"{size}-{encoding}"
                side = None if size == 32 else size
                folders[size, encoding] = datasets.remake(base, out, encoding=encoding, size=side, samples=count)
        return folders[size, encoding]

    def trained(
        title: str, name: str, size: int, batch: int | None, image_size: int | None = None
    ) -> Part:  # batch None: by the ramp
        def make() -> Iterator[Group]:
            if not wanted(settings, "training"):
                return
            raw, jpeg = folder(size, "npy"), folder(size, "jpeg")
            reached: dict[str, Any] = {}
            config = _config(name, raw, batch_size=batch or 1, image_size=image_size or size)
            if batch is None:
                config, reached = best_batch(config, settings.seconds, 2, settings.deadline)
            variants = {
                "npy, device": {"placement": "device"},
                "npy, host": {"placement": "host"},
                "jpeg": {"path": str(jpeg), "placement": "auto"},
            }
            yield training(title, config, variants, device="cuda", facts={"ramp": reached} if reached else None)

        return title, make

    def loaders(size: int) -> Part:
        def make() -> Iterator[Group]:
            batch = 4096 if size == 32 else 1024
            for aug in (None, PAD if size == 32 else RESIZED):
                yield loading(
                    [folder(size, "npy"), folder(size, "jpeg")], aug, size=size, batch_size=batch, device="cuda"
                )

        return f"loader {size}x{size}", make

    def augmented() -> Iterator[Group]:
        for size, batch in ((96, 1024), (32, 4096)):
            yield augmentations.group(folder(size, "npy"), batch_size=batch, device="cuda", placement="device")

    def rand_augmented() -> Iterator[Group]:
        """RandAugment beside no augmentation but crop and flip: what the loader costs the whole."""
        for policy in ("randaugment", "rand-m9-mstd0.5-inc1"):
            config = _config(medium, folder(96, "npy"), batch_size=1024, image_size=96)
            aug = config.aug.model_copy(update={"auto": AutoAugmentConfig(policy=policy)})
            variants = {"npy, device": {"placement": "device"}, "npy, host": {"placement": "host"}}
            title = f"ResNet-18 96x96 with {policy}"
            yield training(title, config.model_copy(update={"aug": aug}), variants, device="cuda")

    def beside_peers() -> Iterator[Group]:
        common: dict[str, Any] = {"device": "cuda", "scratch": settings.scratch, "workers": settings.workers}
        config = _config("cifar10_resnet18", folder(32, "npy"), batch_size=512)
        yield training("ResNet-18 32x32 beside peers", config, {"npy": {}}, **common)
        yield loading([folder(32, "npy")], PAD, size=32, batch_size=512, **common)
        yield loading([folder(96, "jpeg")], RESIZED, size=96, batch_size=512, **common)

    resnet, medium = "cifar10_resnet18", "medium_imagenet_96_resnet18"
    return [
        trained("ResNet-50 224x224, batch by ramp", "medium_imagenet_224_resnet50", 224, None),
        ("RandAugment end to end", rand_augmented),
        ("augmentations", augmented),
        trained("ResNet-18 32x32", resnet, 32, 1024),
        trained("LeNet 32x32", "cifar10_lenet", 32, 1024),
        trained("AlexNet 70x70", "cifar10_alexnet", 32, 1024, 70),
        loaders(32),
        loaders(96),
        loaders(224),
        trained("ResNet-18 96x96", medium, 96, 1024),
        trained("ResNet-50 96x96", "medium_imagenet_96_resnet50", 96, 1024),
        trained("ResNet-18 224x224", "medium_imagenet_224_resnet18", 224, 512),
        ("beside peers", beside_peers),
    ]


def _train_samples(folder: Path) -> int:
    return len(datasets.open_split(folder, datasets.SPLIT))


def _small(settings: Settings) -> Path:
    given = settings.small or ROOT / "data" / "cifar10"
    return datasets.small_set(given, settings.source, settings.scratch)


def _medium(settings: Settings, samples: int) -> Path:
    """96x96 images; where none are converted, the small set enlarged."""
    given = settings.medium or ROOT / "data" / "medium-imagenet-96"
    if (given / "dataset.json").is_file():
        return given
    small = _small(settings)
    return datasets.remake(small, settings.scratch / f"{small.name}-96", size=96, samples=samples)


def _config(name: str, folder: Path, **data: Any) -> Config:
    changes = {f"data.{key}": value for key, value in {"path": str(folder), **data}.items()}
    return load_config(ROOT / "configs" / f"{name}.yaml", **changes)


def changes(settings: Settings, device: str) -> Entry:
    """Changes of the image size: ResNet-18 on a GPU, LeNet, which takes 32 to 35 pixels, elsewhere."""
    try:
        if device == "cuda":
            config = _config("medium_imagenet_96_resnet18_progressive", _medium(settings, GPU_SAMPLES), batch_size=1024)
        else:
            stages = (StageConfig(epoch=0, image_size=32), StageConfig(epoch=1, image_size=35))
            config = _config("cifar10_lenet", _small(settings), stages=stages)
        return stage_changes.group(config, Ranks(), settings.rounds)
    except Exception as error:  # whatever it is, the other figures stay
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return {"title": "stages", "stage": "failed", "rows": [results.failed("stages", sentence)]}


def speedruns(settings: Settings) -> list[Entry]:
    """Each speedrun by its own program, where the project has it; its JSON is kept as it is, beside one row."""
    program = ROOT / "tools" / "speedrun.py"
    rows = []
    for percent in SPEEDRUNS if program.exists() and settings.speedruns else ():
        name = f"cifar10_speedrun_{percent}"
        output = settings.scratch / f"{name}.json"
        left = None if settings.deadline is None else max(1.0, settings.deadline - time.monotonic() + SPEEDRUN_S)
        command = [sys.executable, str(program), "--cfg", str(ROOT / "configs" / f"{name}.yaml"),
                   "--data-path", str(_small(settings)), "--runs", str(settings.speedruns),
                   "--json", str(output)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=ROOT, check=False)
            tail = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            error = None if done.returncode == 0 else f"exit code {done.returncode}: {' '.join(tail)}"
            content = json.loads(output.read_text()) if error is None else None
            rows.append({"name": name, "ours": True, "error": error, "result": content})
        except (subprocess.TimeoutExpired, OSError, ValueError) as failure:
            rows.append({"name": name, "ours": True, "error": f"{type(failure).__name__}: {failure}"[:300]})
    return [{"title": "Speedruns", "stage": "speedrun", "rows": rows}] if rows else []
