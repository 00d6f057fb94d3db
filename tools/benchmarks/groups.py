"""Groups: contestants that are measured together and shown as one table, and the bounds beside their figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import AugConfig, Config, DataConfig
from pipelines.shards import load_dataset, open_split
from tools.benchmarks import limits, ours, peers
from tools.benchmarks.datasets import SPLIT
from tools.benchmarks.limits import Limits
from tools.benchmarks.peers import PeerSource, loops
from tools.benchmarks.results import Row, add_bound, add_ratios, failed, row
from tools.benchmarks.turns import Contestant, Outcome, measure

OURS = "Model Zhu"
ONE_COPY = "bound: one copy of the bytes"
AUGMENTED = "the cores' work on every image"


@dataclass
class Group:
    """`finish` completes the rows with bounds, once they are measured."""

    title: str
    stage: str  # reading, loading, training, limits
    contestants: list[Contestant]
    rows: list[dict[str, Any]]  # facts of each contestant's rows, `ours` among them
    facts: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[list[Row], Limits], None] = lambda rows, found: None

    def run(self, found: Limits, seconds: float, rounds: int, deadline: float | None) -> dict[str, Any]:
        outcomes = measure(self.contestants, seconds, rounds, deadline)
        return self.entry(outcomes, found)

    def entry(self, outcomes: list[Outcome], found: Limits) -> dict[str, Any]:
        facts = {c.name: f for c, f in zip(self.contestants, self.rows, strict=True)}
        rows = [row(outcome, **facts[outcome.contestant]) for outcome in outcomes]
        try:
            self.finish(rows, found)
        except Exception as error:  # figures without their bounds are better than none
            rows.append(failed("bounds", f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.facts, "rows": rows}


def loading(
    folders: list[Path],
    aug: AugConfig | None,
    *,
    size: int,
    batch_size: int,
    device: str,
    scratch: Path | None = None,
    workers: int = 1,
    data: DataConfig | None = None,
) -> Group:
    """Reading (aug None) or reading with augmentation, from data sets of the same images; with a scratch folder peers
    too.

    size: side of the images that augmentation gives; a data set of raw pixels is placed on the host and on a GPU.
    """
    contestants: list[Contestant] = []
    facts: list[dict[str, Any]] = []
    sizes: dict[str, tuple[float, float]] = {}
    encodings = []
    for folder in folders:
        split = open_split(folder, SPLIT)
        raw = split.encoding == "npy"
        encodings.append(split.encoding)
        base = data or DataConfig(path=str(folder))
        stored = int(split.heights[0])
        side = stored if aug is None else size
        sizes[split.encoding] = (float(split.size.mean()), side * side * 3.0)
        for placement in ("host", "device") if device == "cuda" and raw else ("auto",):
            changes = {"path": str(folder), "batch_size": batch_size, "image_size": side, "placement": placement}
            parts = (split.encoding,) if len(folders) > 1 else ()
            shown = placement if device == "cuda" and raw else ""
            name = ", ".join([OURS, *parts, *filter(None, [shown])])
            arguments = (base.model_copy(update=changes), aug or ours.PLAIN, device)
            contestants.append(Contestant(name, ours.loading, arguments))
            facts.append({"ours": True, "device": device, "placement": shown, "encoding": split.encoding,
                          "batch_size": batch_size})  # fmt: skip
        if scratch is not None:
            source = PeerSource(folder, scratch, batch_size, workers, side, aug, device)
            for name, peer in peers.available(peers.LOADERS, split.encoding).items():
                contestants.append(Contestant(name, peers.loading, (peer, source)))
                facts.append({"device": device, "encoding": split.encoding, "batch_size": batch_size})
        if device == "cpu" and raw:
            batch_bytes = batch_size * side * side * 3
            contestants.append(Contestant(ONE_COPY, limits.one_copy, (batch_bytes, batch_size)))
            facts.append({"device": device, "batch_size": batch_size})

    def finish(rows: list[Row], found: Limits) -> None:
        copy = max((row.get("images_per_s", 0.0) for row in rows if row["name"].startswith(ONE_COPY)), default=0.0)
        for each in rows:
            if "encoding" not in each:
                continue
            stored_bytes, output_bytes = sizes[each["encoding"]]
            bounds = limits.loading_bounds(found, placement=each.get("placement", ""), device=device,
                                           stored_bytes=stored_bytes, output_bytes=output_bytes)  # fmt: skip
            if copy:
                bounds = {ONE_COPY.removeprefix("bound: "): copy}  # of batches of this size, in turns with the others
            bounds |= limits.disk_bound(found, stored_bytes, stored_bytes * split_samples)
            add_bound(
                each,
                bounds,
                otherwise="latency of scattered samples" if aug is None and each["encoding"] == "npy" else AUGMENTED,
            )
        add_ratios([each for each in rows if "encoding" in each])

    split_samples = len(open_split(folders[0], SPLIT))
    stage = "reading" if aug is None else "loading"
    stored_side = int(open_split(folders[0], SPLIT).heights[0])
    what = "reading alone" if aug is None else describe(aug)
    sides = f"{stored_side}x{stored_side}" if size == stored_side or aug is None else f"{stored_side} to {size}"
    title = f"{sides} {'raw' if encodings == ['npy'] else 'JPEG' if encodings == ['jpeg'] else 'raw and JPEG'}, {what}"
    group_facts = {"image_size": size, "encoding": encodings[0] if len(encodings) == 1 else "npy and jpeg"}
    return Group(title, stage, contestants, facts, group_facts, finish)


def describe(aug: AugConfig) -> str:
    """What the loader does, in its order."""
    jitter = aug.color_jitter
    parts = {
        {"none": "", "pad": "pad and crop", "random-resized": "random-resized crop"}[aug.crop]: aug.crop != "none",
        "flip": aug.flip > 0,
        aug.auto.policy: aug.auto.policy != "none",
        "colour jitter": any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)),
        "greyscale": aug.grayscale > 0,
        "blur": aug.blur.probability > 0,
        "erasing": aug.erase.probability > 0,
        "cutout": aug.cutout > 0,
    }
    return ", ".join(part for part, is_on in parts.items() if is_on) or "no augmentation"


def crop_and_flip(aug: AugConfig) -> AugConfig:
    """The part of an augmentation that all peers have."""
    return AugConfig(crop=aug.crop, padding=aug.padding, scale=aug.scale, ratio=aug.ratio, flip=aug.flip)


def training(
    title: str,
    config: Config,
    variants: dict[str, dict[str, Any]],
    *,
    device: str,
    facts: dict[str, Any] | None = None,
    scratch: Path | None = None,
    workers: int = 1,
) -> Group:
    """Ours on a resident batch and end to end (see ours.training); with a scratch folder peers end to end too.

    facts: what else the group's entry shall hold.
    """
    contestants = [Contestant(OURS, ours.training, (config, variants))]
    rows: list[dict[str, Any]] = [{"ours": True, "device": device, "encoding": ""}]
    size, batch_size = config.data.image_size or _stored_side(config), config.data.batch_size
    if scratch is not None:
        source = PeerSource(Path(config.data.path), scratch, batch_size, workers, size, config.aug, device)
        for name, peer in peers.available(peers.LOOPS, source.encoding).items():
            contestants.append(Contestant(name, loops.training, (peer, source, config)))
            rows.append({"device": device, "batch_size": batch_size})
    classes = config.model.num_classes or len(load_dataset(config.data.path)["classes"])

    def finish(rows: list[Row], found: Limits) -> None:
        flops = limits.training_flops(config.model, classes, size)
        resident = next((row for row in rows if row["ours"] and row["name"].endswith(ours.RESIDENT)), {})
        ceiling = resident.get("images_per_s", 0.0)
        end_to_end = [row for row in rows if row is not resident]
        for each in rows:
            peak = found.get(limits.ARITHMETIC, 0) / flops
            if each["ours"] and ceiling and each is not resident and "images_per_s" in each:
                each["of_resident"] = float(f"{each['images_per_s'] / ceiling:.4g}")
            add_bound(each, {limits.ARITHMETIC: peak}, _what_binds(each, each is resident))
            each["training_gflop"] = round(flops / 1e9, 4)
        add_ratios(end_to_end)

    common = {"image_size": size, "model": config.model.name, **(facts or {})}
    return Group(f"training {title}", "training", contestants, rows, common, finish)


def _what_binds(each: Row, resident: bool) -> str:
    if resident:
        return "the step: memory traffic and launches, not arithmetic"
    if not each["ours"]:
        return ""
    return "the step (see resident batch)" if each.get("of_resident", 0) >= 0.95 else "the loader"


def _stored_side(config: Config) -> int:
    return int(open_split(config.data.path, SPLIT).heights[0])


def limit_rows(outcomes: list[Outcome]) -> list[Row]:
    """The limits themselves as rows, in the units that people know."""
    rows = []
    for outcome in outcomes:
        unit = limits.UNITS.get(outcome.stream, "")
        each: Row = {"name": outcome.stream or outcome.contestant, "ours": False, "error": outcome.error, "unit": unit}
        if outcome.error is None and outcome.rates:
            each["value"] = float(f"{outcome.rate / (1e12 if unit == 'TFLOP/s' else 1e9):.4g}")
        rows.append(each)
    return rows
