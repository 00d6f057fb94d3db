"""Measure one subcommand (stage) of tools/benchmark.py.

The subcommands `stages` and `scale` skip the machine limits (copies, arithmetic, disk). `limits` measures only these.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from configs.load import load_config
from configs.schema import AugConfig, Config, DataConfig, ModelConfig
from configs.stages import config_at
from configs.utils.errors import UserError
from pipelines.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import results
from tools.benchmarks.engine.measured_tables import TableSpec
from tools.benchmarks.engine.ours import Variants
from tools.benchmarks.engine.results import Entry
from tools.benchmarks.engine.roofline import limits_from_rows
from tools.benchmarks.engine.run_file import Run
from tools.benchmarks.suites import progressive
from tools.benchmarks.suites.augmentations import augmentation_table
from tools.benchmarks.suites.loading import crop_and_flip, loading_table
from tools.benchmarks.suites.scale import scale_table
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import measure_limits
from tools.benchmarks.suites.training import training_table
from train.distributed.process_group import Ranks

CROP_SIDE = {96: 64}  # image size after augmentation by stored size, if no config sets one
DEFAULT_BATCH_SIZE = 512  # batch size without a config
DEFAULT_SIDE = 224  # height and width to assume if stored images vary in size


def measure_stage(arguments: argparse.Namespace, settings: Settings) -> Run:
    """Measure the tables of `arguments.stage` and return them as a run.

    Raises:
        UserError: An argument is missing, the config or the data set is invalid, or the config given to `stages` has
            fewer than two elements in data.stages.
    """
    start = time.monotonic()
    entries: list[Entry] = []
    if arguments.stage == "stages":
        config = _config(arguments)
        if len(config.data.stages) < 2:
            raise UserError(f"data.stages of {arguments.cfg} has fewer than two stages; there is no change to measure")
        rows = progressive.measure_stage_changes(config, Ranks(), settings.rounds)
        entries.append({"title": progressive.title(config), "stage": "stages", "rows": rows})
    elif arguments.stage == "limits":
        entries.append(measure_limits(settings))
    else:
        tables = stage_tables(arguments, settings)
        limits = {} if arguments.stage == "scale" else limits_from_rows(measure_limits(settings)["rows"])
        entries += [table.run(limits, settings.seconds, settings.rounds, None) for table in tables]
    missing = peers.all_missing() if arguments.stage == "peers" else []
    run = Run(environment=results.environment(), missing_peers=missing, groups=entries)
    run.duration_s = round(time.monotonic() - start, 1)
    return run


def stage_tables(arguments: argparse.Namespace, settings: Settings) -> list[TableSpec]:
    """Return the tables to measure. `arguments.stage` is scale, loader, model, train, peers or augment.

    Raises:
        UserError: An argument is missing, or the config or the data set is invalid.
    """
    if arguments.stage == "scale":
        return [scale_table(settings.scratch, settings.seconds)]
    config = _config(arguments)
    folder, batch_size = Path(config.data.path), config.data.batch_size
    if arguments.stage == "augment":
        return [augmentation_table(settings, folder, batch_size=batch_size, with_peer=True)]
    with_peers = arguments.stage == "peers"
    if with_peers:
        config = config.model_copy(update={"aug": crop_and_flip(config.aug)})
    tables: list[TableSpec] = []
    if arguments.stage in ("loader", "peers"):
        size = config.data.image_size or _stored_side(config.data)
        build = partial(loading_table, settings, folder, size=size, batch_size=batch_size, data=config.data)
        shape = open_split(folder, config.data.train_split).image_shape
        can_read_alone = not with_peers or (
            shape and shape[0] == shape[1]
        )  # peers do not batch images of several sizes
        tables += [
            build(aug, with_peers=with_peers) for aug in ((None, config.aug) if can_read_alone else (config.aug,))
        ]
    if arguments.stage in ("model", "train") or (with_peers and arguments.cfg):
        variants: Variants = {} if arguments.stage == "model" else {"end to end": {}}
        name = config.name or config.model.name
        tables.append(training_table(settings, name, config, variants, with_peers=with_peers))
    return tables


def _config(arguments: argparse.Namespace) -> Config:
    """Load the config given by --cfg, or build one for the data set given by --data-path.

    The settings in data.stages for epoch 0 are applied, unless the subcommand is `stages`.

    Raises:
        UserError: An argument is missing, or the config or the data set is invalid.
    """
    if arguments.cfg:
        replacements = {"data.batch_size": arguments.batch_size, "data.path": arguments.data_path}
        config = load_config(arguments.cfg, arguments.opts, **replacements)
        return config if arguments.stage == "stages" else config_at(config, epoch=0)
    needs_config = arguments.stage in ("model", "train", "stages")
    if not arguments.data_path or needs_config:
        need = "--cfg FILE" if needs_config else "--cfg FILE or --data-path DIR"
        raise UserError(f"nothing to measure: give {need}")
    data = DataConfig(path=arguments.data_path, batch_size=arguments.batch_size or DEFAULT_BATCH_SIZE)
    side = _stored_side(data)
    aug = AugConfig(crop="pad") if side <= 64 else AugConfig(crop="random-resized")
    data = data.model_copy(update={"image_size": CROP_SIDE.get(side, side)})
    config = Config(data=data, aug=aug, model=ModelConfig(name="resnet18"), name=Path(arguments.data_path).name)
    return load_config(config, arguments.opts)


def _stored_side(data: DataConfig) -> int:
    shape = open_split(data.path, data.train_split).image_shape
    return int(shape[0]) if shape else DEFAULT_SIDE
