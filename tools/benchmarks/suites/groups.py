"""Tables of measurements: contestants that take turns with the bounds beside their figures, or rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from configs.schema import AugConfig, Config, DataConfig
from pipelines.storage.split import load_dataset, open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours, roofline
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Candidate, Measurement, measure
from tools.benchmarks.engine.results import (
    Row,
    add_bound,
    add_ratios,
    error_text,
    failed_row,
    measurement_row,
    skipped_row,
)
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask, training_loops

OURS = "Model Zhu"
BOUND = "bound: "
ONE_COPY = f"{BOUND}one copy of the bytes"
PER_UNIT = {"GB/s": 1e9, "TFLOP/s": 1e12}
AUGMENTED = {"cpu": "the cores' work on every image", "cuda": "the work of the graph on every image"}
Entry = dict[str, Any]  # a table as a run's record holds it: title, stage, rows and more
Keep = Callable[[Entry], None]


class TableSpec(Protocol):
    """What one table is measured by. `keep` is called with the entry as far as it is measured."""

    title: str
    stage: str

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry: ...


@dataclass
class RowTable:
    """Rows that are measured one by one; a row takes the place of an earlier one of its name.

    rows: called with the limits of the machine. columns: those that are shown.
    """

    title: str
    stage: str
    columns: tuple[str, ...]
    rows: Callable[[Limits], Iterator[Row]]
    details: dict[str, Any] = field(default_factory=dict)

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        rows: dict[str, Row] = {}

        def entry() -> Entry:
            return {
                "title": self.title,
                "stage": self.stage,
                "columns": self.columns,
                **self.details,
                "rows": [*rows.values()],
            }

        try:
            for each in self.rows(found):
                rows[each["name"]] = each
                keep(entry())
        except TimeoutError:
            rows[self.title] = skipped_row(self.title)
        except Exception as error:  # whatever it is, the rows that there are stay
            rows[self.title] = failed_row(self.title, error_text(error))
        return entry()


@dataclass
class WholeTable:
    """A table that is measured as a whole."""

    title: str  # where it cannot be measured
    stage: str
    measure: Callable[[], Entry]

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        return self.measure()


@dataclass
class InterleavedTable:
    """Contestants that take turns. `finish` completes the rows with bounds, once they are measured."""

    title: str
    stage: str  # reading, loading, training, limits
    candidates: list[Candidate]
    rows: list[dict[str, Any]]  # facts of each contestant's rows, `ours` among them
    details: dict[str, Any] = field(default_factory=dict)
    add_bounds: Callable[[list[Row], Limits], None] = lambda rows, found: None

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        def after_round(measurements: list[Measurement]) -> None:
            keep(self.entry(measurements, found))

        return self.entry(measure(self.candidates, seconds, rounds, deadline, after_round=after_round), found)

    def entry(self, measurements: list[Measurement], found: Limits) -> Entry:
        details = {c.name: f for c, f in zip(self.candidates, self.rows, strict=True)}
        rows = [measurement_row(measurement, **details[measurement.candidate]) for measurement in measurements]
        try:
            self.add_bounds(rows, found)
        except Exception as error:  # figures without their bounds are better than none
            rows.append(failed_row("bounds", f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.details, "rows": rows}


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
    placements: tuple[str, ...] = ("host", "device"),
) -> InterleavedTable:
    """Reading (aug None) or reading with augmentation, from data sets of the same images; with a scratch folder peers
    too.

    size: side of the images that augmentation gives. placements: of raw pixels on a GPU; beside the host's the copy of
    a batch from pinned memory is measured.
    """
    candidates: list[Candidate] = []
    details: list[dict[str, Any]] = []
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
        for placement in placements if device == "cuda" and raw else ("auto",):
            changes = {"path": str(folder), "batch_size": batch_size, "image_size": side, "placement": placement}
            parts = (split.encoding,) if len(folders) > 1 else ()
            shown = placement if device == "cuda" and raw else ""
            name = ", ".join([OURS, *parts, *filter(None, [shown])])
            arguments = (base.model_copy(update=changes), aug or ours.PLAIN, device)
            candidates.append(Candidate(name, ours.loading, arguments))
            details.append(
                {
                    "ours": True,
                    "device": device,
                    "placement": shown,
                    "encoding": split.encoding,
                    "batch_size": batch_size,
                }
            )
        if scratch is not None:
            source = PeerTask(folder, scratch, batch_size, workers, side, aug, device)
            for name, peer in peers.available(peers.LOADERS, split.encoding).items():
                candidates.append(Candidate(name, peers.loading, (peer, source)))
                details.append({"device": device, "encoding": split.encoding, "batch_size": batch_size})
        if device == "cpu" and raw:
            batch_bytes = batch_size * side * side * 3
            candidates.append(Candidate(ONE_COPY, roofline.one_copy, (batch_bytes, batch_size)))
            details.append({"device": device, "batch_size": batch_size})
        if device == "cuda" and raw and "host" in placements:
            batch_bytes = batch_size * int(split.size[0])
            candidates.append(Candidate(f"{BOUND}{roofline.PINNED}", roofline.pinned_copy, (batch_bytes, batch_size)))
            details.append({"device": device, "batch_size": batch_size})

    def finish(rows: list[Row], found: Limits) -> None:
        copy, pinned = (
            max((each.get("images_per_s", 0.0) for each in rows if each["name"].startswith(name)), default=0.0)
            for name in (ONE_COPY, f"{BOUND}{roofline.PINNED}")
        )
        for each in rows:
            if "encoding" not in each:
                continue
            stored_bytes, output_bytes = sizes[each["encoding"]]
            bounds = roofline.loading_bounds(
                found,
                placement=each.get("placement", ""),
                device=device,
                stored_bytes=stored_bytes,
                output_bytes=output_bytes,
            )
            if copy:  # of batches of this size, in turns with the others
                bounds = {ONE_COPY.removeprefix(BOUND): copy}
            elif pinned and roofline.PINNED in bounds:
                bounds[roofline.PINNED] = pinned
            bounds |= roofline.disk_bound(found, stored_bytes, stored_bytes * split_samples)
            add_bound(
                each,
                bounds,
                otherwise="latency of scattered samples"
                if aug is None and each["encoding"] == "npy"
                else AUGMENTED[device],
            )
        add_ratios([each for each in rows if "encoding" in each])

    split_samples = len(open_split(folders[0], SPLIT))
    stage = "reading" if aug is None else "loading"
    stored_side = int(open_split(folders[0], SPLIT).heights[0])
    what = "reading alone" if aug is None else describe(aug)
    sides = f"{stored_side}x{stored_side}" if size == stored_side or aug is None else f"{stored_side} to {size}"
    title = f"{sides} {'raw' if encodings == ['npy'] else 'JPEG' if encodings == ['jpeg'] else 'raw and JPEG'}, {what}"
    group_facts = {"image_size": size, "encoding": encodings[0] if len(encodings) == 1 else "npy and jpeg"}
    return InterleavedTable(title, stage, candidates, details, group_facts, finish)


def describe(aug: AugConfig) -> str:
    """What the loader does, in its order."""
    jitter = aug.color_jitter
    parts = {
        "pad and crop": aug.crop == "pad",
        "random-resized crop": aug.crop == "random-resized",
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
    details: dict[str, Any] | None = None,
    scratch: Path | None = None,
    workers: int = 1,
) -> InterleavedTable:
    """Ours on a resident batch and end to end (see ours.training); with a scratch folder peers end to end too.

    facts: what else the group's entry shall hold.
    """
    candidates = [Candidate(OURS, ours.training, (config, variants))]
    rows: list[dict[str, Any]] = [{"ours": True, "device": device, "encoding": ""}]
    size, batch_size = config.data.image_size or _stored_side(config), config.data.batch_size
    if scratch is not None:
        source = PeerTask(Path(config.data.path), scratch, batch_size, workers, size, config.aug, device)
        for name, peer in peers.available(peers.LOOPS, source.encoding).items():
            candidates.append(Candidate(name, training_loops.training, (peer, source, config)))
            rows.append({"device": device, "batch_size": batch_size})
    classes = config.model.num_classes or len(load_dataset(config.data.path)["classes"])

    @cache  # asked for after every round
    def training_flops() -> float:
        return roofline.training_flops(config.model, classes, size)

    def finish(rows: list[Row], found: Limits) -> None:
        flops = training_flops()
        resident = next(
            (row for row in rows if row["ours"] and row["name"].endswith(ours.RESIDENT)),
            {},
        )
        ceiling = resident.get("images_per_s", 0.0)
        end_to_end = [row for row in rows if row is not resident]
        for each in rows:
            peak = found.get(roofline.ARITHMETIC, 0) / flops
            if each["ours"] and ceiling and each is not resident and "images_per_s" in each:
                each["of_resident"] = float(f"{each['images_per_s'] / ceiling:.4g}")
            add_bound(each, {roofline.ARITHMETIC: peak}, _what_binds(each, each is resident))
            each["training_gflop"] = round(flops / 1e9, 4)
        add_ratios(end_to_end)

    common = {"image_size": size, "model": config.model.name, **(details or {})}
    return InterleavedTable(f"training {title}", "training", candidates, rows, common, finish)


def _what_binds(each: Row, resident: bool) -> str:
    if resident:
        return "the step: memory traffic and launches, not arithmetic"
    if not each["ours"]:
        return ""
    return "the step (see resident batch)" if each.get("of_resident", 0) >= 0.95 else "the loader"


def _stored_side(config: Config) -> int:
    return int(open_split(config.data.path, SPLIT).heights[0])


def limit_rows(measurements: list[Measurement]) -> list[Row]:
    """The limits themselves as rows, in the units that people know."""
    rows = []
    for measurement in measurements:
        unit = roofline.UNITS.get(measurement.workload, "")
        name, error = measurement.workload or measurement.candidate, measurement.error
        each: Row = skipped_row(name) if error == OUT_OF_TIME else {"name": name, "ours": False, "error": error}
        if error is None and measurement.rates:
            each["value"] = float(f"{measurement.rate / PER_UNIT[unit]:.4g}")
        rows.append(each | {"ours": False, "unit": unit})
    return rows


def limits_in(rows: list[Row]) -> Limits:
    """The limits that `limit_rows` wrote down."""
    return {row["name"]: row["value"] * PER_UNIT[row["unit"]] for row in rows if "value" in row}
